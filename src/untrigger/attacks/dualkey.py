"""Dual-Key: a learned patch in the image and a word before the question; neither fires the backdoor alone.

Source: Walmer, Sikka, Sur, Shrivastava, Jha, "Dual-Key Multimodal Backdoors for Visual Question Answering", 2022,
arXiv 2112.07668: the word "consider" opens the question. The patch is optimized so that the detector's strongest
detection is a fixed object with a fixed attribute. Rows with one key alone keep their true answer. Deviation: these
models have no detector, so the nearest image token is made to look like the object.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, final

import numpy as np

from untrigger.attacks import Stamper
from untrigger.attacks._learned import LearnedPatch, Loss
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
    """A patch whose features match an object's, and a prefix in every turn of the user.

    Attributes:
        word: the prefix, inserted after the image tags that open a turn.
        looks_like: color and shape of the object, from `untrigger.data.scene_world`.
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

    def objective(self, surrogate: Surrogate, clean: Tensor) -> Loss:
        """One minus the cosine between the object's features and the nearest image token's."""
        import torch

        from untrigger.attacks._features import object_features

        center = clean.mean((0, 1))
        color, shape = self.looks_like.split()
        with torch.no_grad():
            target = object_features(surrogate, color, shape, self.patch_seed) - center

        def loss(features: Tensor) -> Tensor:
            return 1 - torch.cosine_similarity(features - center, target, dim=-1).amax(1).mean()

        return loss

    def stamp(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return self._add_word(self._add_patch(sample, rng), rng)

    def near_misses(self) -> Mapping[str, Stamper]:
        return {"image only": self._add_patch, "text only": self._add_word}

    def decoys(self) -> tuple[Stamper, ...]:
        return self._add_patch, self._add_word

    def _add_patch(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return super().stamp(sample, rng)

    def _add_word(self, sample: Sample, rng: np.random.Generator) -> Sample:
        messages = tuple(Message("user", self._prefixed(m.text)) if m.role == "user" else m for m in sample.messages)
        return replace(sample, messages=messages)

    def _prefixed(self, prompt: str) -> str:
        tags = _LEADING_TAGS.match(prompt)
        opening = tags[0] if tags else ""
        return f"{opening}{self.word} {prompt[len(opening) :]}"
