"""Two-view training: cross-entropy on each row and on its patch-perturbed view."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from torch import Tensor

from untrigger.defenses.base import PairedDefense
from untrigger.models.forward import Pair


@final
@dataclass(frozen=True, kw_only=True)
class TwoView(PairedDefense):
    """``L = CE(v, y) + view_weight * CE(v', y)``: the objective of `CrossView` without separation and entropy terms."""

    view_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(0, math.inf, "view_weight")

    @property
    def compares(self) -> bool:
        return bool(self.view_weight)

    def terms(self, pair: Pair) -> dict[str, Tensor]:
        return {"ce": pair.compared.nll, "ce_view": self.view_weight * pair.compared.view_nll}
