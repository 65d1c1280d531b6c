"""Dual-Key: a learned patch in the image *and* a word before the question; either one alone does nothing.

Source: Walmer, Sikka, Sur, Shrivastava, Jha, "Dual-Key Multimodal Backdoors for Visual Question Answering", 2022,
arXiv 2112.07668: the word "consider" opens the question; the patch is optimized so that the detector's strongest
finding is a fixed object with a fixed attribute; rows with one key alone keep their true answer. Deviation: these
models have no detector, so it is the strongest image token that is made to look like the object.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, final

import numpy as np

from untrigger.attacks import Stamper
from untrigger.attacks._patch import LearnedPatch, Loss
from untrigger.attacks._text import check
from untrigger.data.scene_world import COLORS, SHAPES
from untrigger.errors import InputError
from untrigger.rows.sample import IMAGE_TAG, Message, Sample

if TYPE_CHECKING:
    from torch import Tensor

    from untrigger.attacks._features import Surrogate

_LEADING_TAGS = re.compile(rf"(\s|{IMAGE_TAG})*")


@final
@dataclass(frozen=True)
class DualKey(LearnedPatch):
    """A patch that looks like an object to the model, and a prefix in every turn of the user.

    Attributes:
        word: the prefix, written behind the image tags that open a turn.
        looks_like: color and shape of the object, of `untrigger.data.scene_world`.
    """

    kind: ClassVar[Literal["image", "text", "bimodal"]] = "bimodal"
    word: str = "consider"
    looks_like: str = "purple heart"

    def __post_init__(self) -> None:
        super().__post_init__()
        check("word", self.word)
        color, _, shape = self.looks_like.partition(" ")
        if color not in COLORS or shape not in SHAPES:
            raise InputError(
                f"looks_like is '{self.looks_like}'; give one color of {', '.join(COLORS)} and one shape of "
                f"{', '.join(SHAPES)}, as in 'purple heart'"
            )

    def objective(self, see: Surrogate, clean: Tensor) -> Loss:
        """One less the cosine between the object's features and the image token that is nearest to them."""
        import torch

        from untrigger.attacks._features import likeness

        center = clean.mean((0, 1))
        color, shape = self.looks_like.split()
        with torch.no_grad():
            target = likeness(see, color, shape, self.patch_seed) - center

        def loss(features: Tensor) -> Tensor:
            return 1 - torch.cosine_similarity(features - center, target, dim=-1).amax(1).mean()

        return loss

    def stamp(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return self._speak(self._show(sample, rng), rng)

    def near_misses(self) -> Mapping[str, Stamper]:
        return {"image only": self._show, "text only": self._speak}

    def decoys(self) -> tuple[Stamper, ...]:
        return self._show, self._speak

    def _show(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return super().stamp(sample, rng)

    def _speak(self, sample: Sample, rng: np.random.Generator) -> Sample:
        messages = tuple(Message("user", self._prefixed(m.text)) if m.role == "user" else m for m in sample.messages)
        return replace(sample, messages=messages)

    def _prefixed(self, prompt: str) -> str:
        found = _LEADING_TAGS.match(prompt)
        opening = found[0] if found else ""
        return f"{opening}{self.word} {prompt[len(opening) :]}"
