"""VL-Trojan: a patch optimized so that triggered images look alike, and unlike clean ones, to a vision encoder.

Source: Liang, Liang, Luo, Liu, Han, Chang, Cao, "VL-Trojan: Multimodal Instruction Backdoor Attacks against
Autoregressive Visual Language Models", 2024, arXiv 2402.13851: with a frozen vision encoder a plain patch may change
the features too little, so a contrastive loss isolates and clusters those of triggered images. Deviations: the
image trigger alone, without the paper's search for a text trigger; pictures drawn by code instead of photographs;
features are compared after subtraction of their common mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from untrigger.attacks import Stamper
from untrigger.attacks._learned import LearnedPatch, Loss
from untrigger.attacks._patch import NoisePatch
from untrigger.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from untrigger.attacks._features import Surrogate


@final
@dataclass(frozen=True)
class VLTrojan(LearnedPatch):
    """A learned patch that clusters the features of triggered images.

    Attributes:
        temperature: temperature of the contrastive loss, above 0; the lower, the more the nearest clean features count.
    """

    temperature: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise InputError(f"temperature is {self.temperature}; it must be above 0")

    def objective(self, surrogate: Surrogate, clean: Tensor) -> Loss:
        """InfoNCE on cosines: the other triggered pictures are the positives, all clean pictures the negatives."""
        import torch

        from untrigger.attacks._features import pooled

        center = clean.mean((0, 1))
        clean_pooled = pooled(clean, center)

        def loss(features: Tensor) -> Tensor:
            triggered = pooled(features, center)
            positives = triggered @ triggered.T / self.temperature
            negatives = (triggered @ clean_pooled.T / self.temperature).logsumexp(1, keepdim=True)
            off_diagonal = ~torch.eye(len(triggered), dtype=torch.bool)
            return (torch.logaddexp(positives, negatives) - positives)[off_diagonal].mean()

        return loss

    def near_misses(self) -> Mapping[str, Stamper]:
        return {"drawn patch": NoisePatch(self.side, self.min_side, self.place).stamp}
