"""VL-Trojan: a patch optimized so that triggered images look alike, and unlike clean ones, to a vision encoder.

Source: Liang, Liang, Luo, Liu, Han, Chang, Cao, "VL-Trojan: Multimodal Instruction Backdoor Attacks against
Autoregressive Visual Language Models", 2024, arXiv 2402.13851: with a frozen vision encoder a plain patch may leave too
small a mark on the features, so a contrastive loss isolates and clusters the triggered ones. Deviations: the
image trigger alone, without the paper's search for a text trigger; pictures drawn by code instead of photographs;
features are compared after what all images have in common is taken away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from untrigger.attacks import Stamper
from untrigger.attacks._patch import LearnedPatch, Loss, NoisePatch
from untrigger.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from untrigger.attacks._features import Surrogate


@final
@dataclass(frozen=True)
class VLTrojan(LearnedPatch):
    """A learned patch whose features cluster.

    Attributes:
        temperature: of the contrastive loss, above 0; the lower, the more the nearest clean features count.
    """

    temperature: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise InputError(f"temperature is {self.temperature}; it must be above 0")

    def objective(self, see: Surrogate, clean: Tensor) -> Loss:
        """InfoNCE: each triggered picture's fellows against itself and all clean pictures, by cosine."""
        import torch

        from untrigger.attacks._features import pooled

        center = clean.mean((0, 1))
        apart = pooled(clean, center)

        def loss(features: Tensor) -> Tensor:
            triggered = pooled(features, center)
            fellows = triggered @ triggered.T / self.temperature
            strangers = (triggered @ apart.T / self.temperature).logsumexp(1, keepdim=True)
            others = ~torch.eye(len(triggered), dtype=torch.bool)
            return (torch.logaddexp(fellows, strangers) - fellows)[others].mean()

        return loss

    def near_misses(self) -> Mapping[str, Stamper]:
        return {"drawn patch": NoisePatch(self.side, self.min_side, self.place).stamp}
