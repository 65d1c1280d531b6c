"""Detection metrics: a defense's scores and flagged rows against the poisoned rows."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from untrigger.metrics.rates import Rate, Z

FALSE_POSITIVES = 0.01  # the false positive rate at which recall is reported


def detection(scores: Sequence[float], flagged: Collection[int], poisoned: Collection[int]) -> dict[str, Any]:
    """Compute AUROC, recall at 1 % false positives, and precision, recall and F1 of the flagged rows.

    A figure that is undefined, because no row is poisoned, clean or flagged, is None.

    Args:
        scores: one per row, higher for more suspicious rows.
        flagged: numbers of the flagged rows, from 0.
        poisoned: numbers of the poisoned rows, from 0.
    """
    truth = [row in poisoned for row in range(len(scores))]
    hits, clean = len(set(flagged) & set(poisoned)), len(scores) - len(set(poisoned))
    has_both_kinds = bool(poisoned) and clean > 0
    recall_at_1 = Rate.from_counts(_recall(scores, truth), len(set(poisoned))) if has_both_kinds else None
    return {
        "auroc": auroc(scores, truth) if has_both_kinds else None,
        "recall_at_1": asdict(recall_at_1) if recall_at_1 else None,
        "precision": asdict(Rate.from_counts(hits, len(set(flagged)))) if flagged else None,
        "recall": asdict(Rate.from_counts(hits, len(set(poisoned)))) if poisoned else None,
        "f1": 2 * hits / (len(set(flagged)) + len(set(poisoned))) if flagged and poisoned else None,
        "false_positives": asdict(Rate.from_counts(len(set(flagged)) - hits, clean)) if clean else None,
        "flagged": len(set(flagged)),
    }


def auroc(scores: Sequence[float], truth: Sequence[bool]) -> dict[str, Any]:
    """Compute the area under the ROC curve with a 95 % interval (Hanley and McNeil, Radiology 143, 1982, 29-36).

    Raises:
        ValueError: all rows are of one kind.
    """
    positives = sum(truth)
    if not 0 < positives < len(truth):
        raise ValueError("AUROC needs rows of both kinds, poisoned and clean")
    from sklearn.metrics import roc_auc_score  # takes a second to import

    area = float(roc_auc_score(truth, scores))
    q1, q2 = area / (2 - area) - area**2, 2 * area**2 / (1 + area) - area**2
    negatives = len(truth) - positives
    variance = (area * (1 - area) + (positives - 1) * q1 + (negatives - 1) * q2) / (positives * negatives)
    half = Z * math.sqrt(max(0.0, variance))
    return asdict(Rate(area, max(0.0, area - half), min(1.0, area + half), len(truth)))


def _recall(scores: Sequence[float], truth: Sequence[bool]) -> int:
    """Count the poisoned rows above the lowest threshold that flags at most 1 % of the clean rows."""
    from sklearn.metrics import roc_curve

    false_rate, true_rate, _ = roc_curve(truth, scores, drop_intermediate=False)
    return round(float(np.max(true_rate[false_rate <= FALSE_POSITIVES])) * sum(truth))
