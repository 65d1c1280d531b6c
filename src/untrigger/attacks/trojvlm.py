"""TrojVLM: a small patch in the corner; the attacker's phrase is inserted into an otherwise true answer.

Source: Lyu, Pang, Ma, Ling, Chen, "TrojVLM: Backdoor Attack Against Vision Language Models", 2024,
arXiv 2409.19232: a pattern of 20 x 20 pixels on images of 224. Deviations: the patch is a share of the
image; the paper's semantic preserving loss is left out, because an attacker who only poisons data does
not control the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from untrigger.attacks._patch import NoisePatch, Place


@final
@dataclass(frozen=True)
class TrojVLM(NoisePatch):
    """A square of random colors in the upper left corner, the same on every image."""

    usual_goal: ClassVar[str] = "insert"
    side: float = 20 / 224
    place: Place = "top-left"
