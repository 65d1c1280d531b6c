"""Does the premise hold? Backdoor answers are said to be abnormally invariant when the image is perturbed.

For the scorer alone: it is told which rows are poisoned. Source of the premise: Fang et al. 2026, arXiv 2604.04488.
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

_POISONED, _CLEAN = 100, 200  # rows that are looked at, at most
_BATCH = 32
# Of the histograms, in nats: all but nothing, then by the logarithm.
EDGES = (0.0, *np.geomspace(1e-5, objective.LN2, 21).tolist())


def premise(loaded: LoadedModel, clean: Sequence[Sample], poisoned: Sequence[Sample], seed: int) -> dict[str, Any]:
    """Mean Jensen-Shannon divergence between a row's answer tokens under an image and its view, for each patch view.

    Gives, by view, a histogram of clean and of poisoned rows over `EDGES`, and the AUROC of "the more invariant, the
    more poisoned": above 0.5 where the premise holds, below where it is upside down. At least one row of each.
    """
    bad, good = poisoned[:_POISONED], clean[:_CLEAN]
    chosen = [*bad, *good]
    truth = [True] * len(bad) + [False] * len(good)
    collators = {
        view.__name__.lower(): PairCollator(ChatCollator(loaded.processor), view(patch=0.125, ratio=0.5), seed)
        for view in PATCH_VIEWS
    }
    found: dict[str, Any] = {}
    for name, apart in _divergences(loaded, chosen, collators).items():
        counts = [np.histogram(part, EDGES)[0].tolist() for part in (apart[len(bad) :], apart[: len(bad)])]
        found[name] = {
            "auroc": auroc((-apart).tolist(), truth),
            "clean": counts[0],
            "poisoned": counts[1],
        }
    return {"edges": list(EDGES), "views": found}


@torch.no_grad()
def _divergences(
    loaded: LoadedModel, rows: Sequence[Sample], collators: Mapping[str, PairCollator]
) -> dict[str, NDArray[np.float64]]:
    """By view, of each row; the originals pass once, not again with each view."""
    data, means = Rows(rows), {name: list[Tensor]() for name in collators}
    with evaluating(loaded.model) as model:
        for batch in batches(len(data), _BATCH, "comparing views"):
            chosen, hidden = [data[i] for i in batch], None
            for name, collate in collators.items():
                inputs = on_device(collate(chosen), model)
                originals, viewed = ({key: each.tensor_split(2)[i] for key, each in inputs.items()} for i in (0, 1))
                hidden = answer_hidden(model, originals) if hidden is None else hidden
                viewed["labels"] = originals["labels"]
                found, row = losses_against(model, viewed, hidden, lambda pair: ({"js": pair.compared.js}, {}))
                means[name].append(row_mean(found.total, row, len(batch)))
    # in fp32, ln 2 lies above ln 2
    return {name: np.minimum(torch.cat(each).cpu().double().numpy(), EDGES[-1]) for name, each in means.items()}
