"""Two-view training: cross-entropy on the original and on its patch-perturbed view."""

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
    """``L = CE(v, y) + view_weight * CE(v', y)``: the reference objective without its separations."""

    view_weight: float = 1.0

    def __post_init__(self) -> None:
        self._check(0, math.inf, "view_weight")

    @property
    def compares(self) -> bool:
        return bool(self.view_weight)

    def terms(self, pair: Pair) -> dict[str, Tensor]:
        return {"ce": pair.compared.nll, "ce_view": self.view_weight * pair.compared.view_nll}
