"""Does the premise hold? Backdoor answers are said to be abnormally invariant when the image is perturbed.

For the scorer alone: it is told which rows are poisoned. Source of the premise: Fang et al. 2026, arXiv 2604.04488.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from untrigger import objective
from untrigger.collate import ChatCollator, PairCollator, Rows
from untrigger.forward import batches, evaluating, on_device, pair_losses, row_mean
from untrigger.metrics.detection import auroc
from untrigger.models import Loaded
from untrigger.sample import Sample
from untrigger.views import PATCH_VIEWS

_POISONED, _CLEAN = 100, 200  # rows that are looked at, at most
# Of the histograms, in nats: all but nothing, then by the logarithm.
EDGES = (0.0, *np.geomspace(1e-5, objective.LN2, 21).tolist())


def premise(loaded: Loaded, clean: Sequence[Sample], poisoned: Sequence[Sample], seed: int) -> dict[str, Any]:
    """Mean Jensen-Shannon divergence between a row's answer tokens under an image and its view, for each patch view.

    Gives, by view, a histogram of clean and of poisoned rows over `EDGES`, and the AUROC of "the more invariant, the
    more poisoned": above 0.5 where the premise holds, below where it is upside down. At least one row of each.
    """
    bad, good = poisoned[:_POISONED], clean[:_CLEAN]
    chosen = [*bad, *good]
    truth = [True] * len(bad) + [False] * len(good)
    found: dict[str, Any] = {}
    for view in PATCH_VIEWS:
        apart = _divergence(
            loaded, chosen, PairCollator(ChatCollator(loaded.processor), view(patch=0.125, ratio=0.5), seed)
        )
        counts = [np.histogram(part, EDGES)[0].tolist() for part in (apart[len(bad) :], apart[: len(bad)])]
        found[view.__name__.lower()] = {
            "auroc": auroc((-apart).tolist(), truth),
            "clean": counts[0],
            "poisoned": counts[1],
        }
    return {"edges": list(EDGES), "views": found}


@torch.no_grad()
def _divergence(loaded: Loaded, rows: Sequence[Sample], collate: PairCollator) -> Any:
    data, means = Rows(rows), list[Tensor]()
    with evaluating(loaded.model) as model:
        for batch in batches(len(data), 32, "comparing views"):
            inputs = on_device(collate([data[i] for i in batch]), model)
            found, row = pair_losses(model, inputs, lambda pair: ({"js": pair.compared.js}, {}))
            means.append(row_mean(found.total, row, len(batch)))
    return np.minimum(torch.cat(means).cpu().double().numpy(), EDGES[-1])  # in fp32, ln 2 lies above ln 2
