"""How well rows were told apart: scores and verdicts of a defense against the truth."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from untrigger.metrics.rates import Rate, Z

FALSE_POSITIVES = 0.01  # at which recall is told


def detection(scores: Sequence[float], flagged: Collection[int], poisoned: Collection[int]) -> dict[str, Any]:
    """AUROC, recall at 1 % false positives, and precision, recall and F1 of the rows that were flagged.

    scores: one a row, the higher the more suspicious. What cannot be said, with nothing poisoned or nothing flagged, is
    None.
    """
    truth = [row in poisoned for row in range(len(scores))]
    hits, clean = len(set(flagged) & set(poisoned)), len(scores) - len(set(poisoned))
    some = bool(poisoned) and clean > 0
    return {
        "auroc": auroc(scores, truth) if some else None,
        "recall_at_1": asdict(Rate.from_counts(_recall(scores, truth), len(set(poisoned)))) if some else None,
        "precision": asdict(Rate.from_counts(hits, len(set(flagged)))) if flagged else None,
        "recall": asdict(Rate.from_counts(hits, len(set(poisoned)))) if poisoned else None,
        "f1": 2 * hits / (len(set(flagged)) + len(set(poisoned))) if flagged and poisoned else None,
        "false_positives": asdict(Rate.from_counts(len(set(flagged)) - hits, clean)) if clean else None,
        "flagged": len(set(flagged)),
    }


def auroc(scores: Sequence[float], truth: Sequence[bool]) -> dict[str, Any]:
    """Area under the ROC curve with a 95 % interval (Hanley and McNeil, Radiology 143, 1982, 29-36).

    Raises:
        ValueError: all rows are of one kind.
    """
    bad = sum(truth)
    if not 0 < bad < len(truth):
        raise ValueError("AUROC needs rows of both kinds")
    from sklearn.metrics import roc_auc_score  # takes a second to import

    area = float(roc_auc_score(truth, scores))
    one, two = area / (2 - area), 2 * area**2 / (1 + area)
    good = len(truth) - bad
    variance = (area * (1 - area) + (bad - 1) * (one - area**2) + (good - 1) * (two - area**2)) / (bad * good)
    half = Z * math.sqrt(max(0.0, variance))
    return asdict(Rate(area, max(0.0, area - half), min(1.0, area + half), len(truth)))


def _recall(scores: Sequence[float], truth: Sequence[bool]) -> int:
    """Poisoned rows above the lowest threshold that accuses at most 1 % of the clean ones."""
    from sklearn.metrics import roc_curve

    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    return round(float(np.max(true[false <= FALSE_POSITIVES])) * sum(truth))
