"""Two-view training: cross-entropy on the original and on its patch-perturbed view."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from torch import Tensor

from untrigger.defenses.base import PairedDefense, patch_view
from untrigger.forward import Pair
from untrigger.views import View


@final
@dataclass(frozen=True)
class TwoView(PairedDefense):
    """``L = CE(v, y) + view_weight * CE(v', y)``: the reference objective without its separations."""

    view_weight: float = 1.0
    view: str = "mix"
    patch: float = 0.125
    ratio: float = 0.5

    def __post_init__(self) -> None:
        self._check(0, math.inf, "view_weight")

    @property
    def paired(self) -> View | None:
        return patch_view(self.view, self.patch, self.ratio) if self.view_weight else None

    def terms(self, pair: Pair) -> dict[str, Tensor]:
        return {"ce": pair.compared.nll, "ce_view": self.view_weight * pair.compared.view_nll}
