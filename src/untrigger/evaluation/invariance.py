"""The paper's premise: backdoor answers are invariant under patch views. Measures whether it holds for a model.

For scoring only, because it needs to know which rows are poisoned. Source: Fang et al. 2026, arXiv 2604.04488.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from untrigger.losses import objective
from untrigger.metrics.detection import auroc
from untrigger.models.collators import ChatCollator, PairCollator, Rows
from untrigger.models.forward import answer_hidden, batches, evaluating, losses_against, on_device, row_mean
from untrigger.models.loading import LoadedModel
from untrigger.rows.sample import Sample
from untrigger.views.patches import PATCH_VIEWS

_POISONED, _CLEAN = 100, 200  # rows that are compared, at most
_BATCH = 32
# Histogram edges in nats: one bin next to zero, then logarithmic ones.
EDGES = (0.0, *np.geomspace(1e-5, objective.LN2, 21).tolist())


def measure_invariance(
    model: LoadedModel, clean: Sequence[Sample], poisoned: Sequence[Sample], seed: int
) -> dict[str, Any]:
    """Compare the answers of clean and poisoned rows under each patch view.

    A row's divergence is the mean Jensen-Shannon divergence, in nats, over its answer tokens, between the image and
    its view. Needs at least one row of each kind.

    Returns:
        ``edges``: those of the histograms, `EDGES`. ``views``, by view: histograms of ``clean`` and ``poisoned`` rows,
        and the ``auroc`` of telling poisoned rows by their invariance. It is above 0.5 where the premise holds and
        below where the opposite does.
    """
    bad, good = poisoned[:_POISONED], clean[:_CLEAN]
    chosen = [*bad, *good]
    truth = [True] * len(bad) + [False] * len(good)
    collators = {
        view.__name__.lower(): PairCollator(ChatCollator(model.processor), view(patch=0.125, ratio=0.5), seed)
        for view in PATCH_VIEWS
    }
    views: dict[str, Any] = {}
    for name, divergences in _divergences(model, chosen, collators).items():
        parts = divergences[len(bad) :], divergences[: len(bad)]
        counts = [np.histogram(part, EDGES)[0].tolist() for part in parts]
        views[name] = {
            "auroc": auroc((-divergences).tolist(), truth),
            "clean": counts[0],
            "poisoned": counts[1],
        }
    return {"edges": list(EDGES), "views": views}


@torch.no_grad()
def _divergences(
    loaded: LoadedModel, rows: Sequence[Sample], collators: Mapping[str, PairCollator]
) -> dict[str, NDArray[np.float64]]:
    """Mean divergence of each row, by view; the original images are run once, not once for each view."""
    data, means = Rows(rows), {name: list[Tensor]() for name in collators}
    with evaluating(loaded.model) as model:
        for batch in batches(len(data), _BATCH, "comparing views"):
            chosen, hidden = [data[i] for i in batch], None
            for name, collate in collators.items():
                inputs = on_device(collate(chosen), model)
                originals, viewed = ({key: tensor.tensor_split(2)[i] for key, tensor in inputs.items()} for i in (0, 1))
                hidden = answer_hidden(model, originals) if hidden is None else hidden
                viewed["labels"] = originals["labels"]
                losses, row = losses_against(model, viewed, hidden, lambda pair: ({"js": pair.compared.js}, {}))
                means[name].append(row_mean(losses.total, row, len(batch)))
    # ln 2, the largest divergence, is larger in fp32 than in fp64
    return {name: np.minimum(torch.cat(parts).cpu().double().numpy(), EDGES[-1]) for name, parts in means.items()}
