"""Cross-view regularization (Fang et al. 2026, arXiv 2604.04488): the preset ``paper``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from torch import Tensor

from untrigger.defenses.base import PairedDefense
from untrigger.losses import objective
from untrigger.models.forward import Pair


@final
@dataclass(frozen=True, kw_only=True)
class CrossView(PairedDefense):
    """The paper's objective; docs/paper.md lists what its public text leaves open and what is assumed.

    ``L = CE(v, y) + a CE(v', y) + l_o [m - JS(p, p')]_+ + l_f [cos(h, h') - c]_+ + l_H band(H(p))``
    over the answer tokens. All weights zero is plain fine-tuning, exactly.

    Fields:
        view_weight: a, weight of the cross-entropy under the view.
        output_weight, margin: l_o and m (nats, at most ln 2) of the output separation.
        feature_weight, bound: l_f and c (a cosine) of the feature separation.
        entropy_weight, entropy_low, entropy_high: l_H and the band in nats.
        stop_gradient: whether the view gets no gradient. The original alone then moves away from it, and the view's
            cross-entropy is not trained. Costs less than one more forward pass, and no more activations.
        view, patch, ratio: see `PairedDefense`.
    """

    view_weight: float = 0.5
    output_weight: float = 0.5
    margin: float = 0.1
    feature_weight: float = 0.1
    bound: float = 0.9
    entropy_weight: float = 0.1
    entropy_low: float = 0.01
    entropy_high: float = 1.0
    stop_gradient: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(0, math.inf, "view_weight", "output_weight", "margin", "feature_weight", "entropy_weight")
        self._check(-1, 1, "bound")
        self._check(0, math.inf, "entropy_low", "entropy_high")
        if self.entropy_low > self.entropy_high:
            raise ValueError(f"entropy_low is {self.entropy_low}; it must be at most entropy_high, {self.entropy_high}")

    @property
    def compares(self) -> bool:
        return any((self.view_weight, self.output_weight, self.feature_weight, self.entropy_weight))

    @property
    def still(self) -> bool:
        return self.stop_gradient

    def terms(self, pair: Pair) -> dict[str, Tensor]:
        views = pair.compared
        apart = objective.separation(views.js, self.margin)
        features = objective.feature_separation(pair.hidden, pair.view_hidden, self.bound)
        band = objective.entropy_band(views.entropy, self.entropy_low, self.entropy_high)
        return {
            "ce": views.nll,
            "ce_view": self.view_weight * views.view_nll,
            "separation": self.output_weight * apart,
            "feature_separation": self.feature_weight * features,
            "entropy_band": self.entropy_weight * band,
        }
