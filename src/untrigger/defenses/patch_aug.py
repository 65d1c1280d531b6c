"""Patch augmentation alone: a share of the images is replaced by patch-perturbed views."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from untrigger.defenses.base import StepDefense, patch_view
from untrigger.views.patches import View


@final
@dataclass(frozen=True)
class PatchAug(StepDefense):
    """Cross-entropy on views instead of originals for a ``share`` of the rows; the loss is the host's own."""

    share: float = 0.5
    view: str = "mix"
    patch: float = 0.125
    ratio: float = 0.5

    def __post_init__(self) -> None:
        self._check(0, 1, "share")

    @property
    def replaced(self) -> tuple[View, float]:
        return patch_view(self.view, self.patch, self.ratio), self.share
