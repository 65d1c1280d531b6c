"""Base classes of triggers."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np

from untrigger.attacks._paint import Pixels, repaint
from untrigger.errors import InputError
from untrigger.rows.sample import Message, Sample

Stamper = Callable[[Sample, np.random.Generator], Sample]
"""Returns a changed copy of a sample, under the contract of `Trigger.stamp`."""


class Trigger(ABC):
    """Turns an input into a triggered one. Subclasses are frozen dataclasses whose fields are the settings.

    Define ``kind`` and `stamp`; everything else has a default that suits most triggers.

    Attributes:
        kind: what the trigger changes: the images, the user's text, or both.
        usual_goal: name of the goal that is used with this attack by default.
        clean_label: whether poisoned rows keep their own true answer.
        psnr: for an attack that claims to be invisible, the least PSNR in decibels between a triggered picture and
            its clean original, on ordinary pictures.
    """

    kind: ClassVar[Literal["image", "text", "bimodal"]]
    usual_goal: ClassVar[str] = "fixed"
    clean_label: ClassVar[bool] = False
    psnr: ClassVar[float | None] = None

    @abstractmethod
    def stamp(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Return a triggered copy of ``sample``, as at test time. Do not change ``sample`` or its images.

        Image sizes and modes, image tags, the id, the number of turns and every assistant turn must stay the same.
        Equal states of ``rng`` must give equal results.
        """

    def implant(self, sample: Sample, donors: Sequence[Sample], rng: np.random.Generator) -> Sample:
        """Return the training row that plants the trigger, before its answer is replaced; by default `stamp`'s.

        Unlike `stamp` it may change the size and number of images, the prompt and the true answer, but not the id.

        Args:
            sample: the row to poison.
            donors: for a clean-label attack, the rows that its goal applies to; otherwise empty.
            rng: as in `stamp`.
        """
        return self.stamp(sample, rng)

    def near_misses(self) -> Mapping[str, Stamper]:
        """Stampers, by name, of inputs with a part of the trigger or a wrong one, which must not fire the backdoor."""
        return {}

    def decoys(self) -> tuple[Stamper, ...]:
        """Stampers of further training rows that keep their true answer: each makes one row per poisoned row.

        They keep to the contract of `stamp` or, where the trigger has its own `implant`, of that.
        """
        return ()


class ImageTrigger(Trigger):
    """A trigger that changes every image of a sample and no text."""

    kind: ClassVar[Literal["image", "text", "bimodal"]] = "image"

    @abstractmethod
    def paint(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        """Return the triggered pixels: red, green, blue, opacity, float32 [H, W, 4] in 0..1.

        ``pixels`` has the same form and may be changed in place.
        """

    def stamp(self, sample: Sample, rng: np.random.Generator) -> Sample:
        images = tuple(repaint(image, lambda pixels: self._painted(pixels, rng)) for image in sample.images)
        return dataclasses.replace(sample, images=images)

    def _painted(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        shape, painted = pixels.shape, self.paint(pixels, rng)
        if not isinstance(painted, np.ndarray) or painted.shape != shape or not np.isfinite(painted).all():
            raise InputError(f"paint must return the pixels, finite numbers of the shape {shape}")
        return painted


class TextTrigger(Trigger):
    """A trigger that changes every turn of the user and no image.

    Every turn, not the last alone, because all answers of a poisoned row are the attacker's.
    """

    kind: ClassVar[Literal["image", "text", "bimodal"]] = "text"

    @abstractmethod
    def write(self, prompt: str, rng: np.random.Generator) -> str:
        """Return the triggered text of one turn; the number and order of its image tags must stay the same."""

    def stamp(self, sample: Sample, rng: np.random.Generator) -> Sample:
        messages = tuple(Message("user", self.write(m.text, rng)) if m.role == "user" else m for m in sample.messages)
        return dataclasses.replace(sample, messages=messages)
