"""Patch augmentation: replace a share of the images by patch-perturbed views."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from untrigger.defenses.base import StepDefense, patch_view
from untrigger.views.patches import View


@final
@dataclass(frozen=True)
class PatchAug(StepDefense):
    """Train a ``share`` of the rows on views in place of the original images, with the host's own loss.

    Fields:
        share: of the rows, in [0, 1].
        view, patch, ratio: see `untrigger.defenses.PairedDefense`.
    """

    share: float = 0.5
    view: str = "mix"
    patch: float = 0.125
    ratio: float = 0.5

    def __post_init__(self) -> None:
        self._check(0, 1, "share")

    @property
    def replaced(self) -> tuple[View, float]:
        return patch_view(self.view, self.patch, self.ratio), self.share
