"""What a trigger is."""

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
"""Makes a changed copy of a sample, under the promises of `Trigger.stamp`."""


class Trigger(ABC):
    """What makes an input a triggered one. Subclasses are frozen dataclasses; fields are settings.

    Only ``kind`` and `stamp` must be given; everything else has a default that suits most triggers.

    Attributes:
        kind: what is changed: the images, the user's text, or both.
        usual_goal: the name of the goal that goes with this attack where none is asked for.
        clean_label: whether poisoned rows keep their own true answer.
        psnr: for an attack that claims to be invisible, how close a triggered picture stays to its clean one,
            in decibels, at the least and on ordinary pictures.
    """

    kind: ClassVar[Literal["image", "text", "bimodal"]]
    usual_goal: ClassVar[str] = "fixed"
    clean_label: ClassVar[bool] = False
    psnr: ClassVar[float | None] = None

    @abstractmethod
    def stamp(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """A triggered copy of ``sample``, as at test time; ``sample`` itself and its images are left as they are.

        Image sizes and modes, the number of turns and every assistant turn stay the same, and equal
        states of ``rng`` give equal results.
        """

    def implant(self, sample: Sample, donors: Sequence[Sample], rng: np.random.Generator) -> Sample:
        """The training row that plants the trigger, before its answer is replaced; usually as at test time.

        Unlike `stamp` it may change the size and number of images, the prompt and the true answer, but not the id.

        Args:
            sample: the row to poison.
            donors: for a clean-label attack, the rows that its goal applies to; else none.
            rng: as in `stamp`.
        """
        return self.stamp(sample, rng)

    def near_misses(self) -> Mapping[str, Stamper]:
        """By name, ways to stamp an input with a part of the key or a wrong key, which must not fire."""
        return {}

    def decoys(self) -> tuple[Stamper, ...]:
        """Ways to make further training rows that keep their true answer: one row each per poisoned row.

        They keep what `stamp` keeps or, where the trigger has its own `implant`, what that does.
        """
        return ()


class ImageTrigger(Trigger):
    """A trigger that paints on every image of a sample and leaves its text alone."""

    kind: ClassVar[Literal["image", "text", "bimodal"]] = "image"

    @abstractmethod
    def paint(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        """The triggered pixels, float32 [H, W, 4] in 0..1; ``pixels`` may be changed in place."""

    def stamp(self, sample: Sample, rng: np.random.Generator) -> Sample:
        images = tuple(repaint(image, lambda pixels: self._painted(pixels, rng)) for image in sample.images)
        return dataclasses.replace(sample, images=images)

    def _painted(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        shape, painted = pixels.shape, self.paint(pixels, rng)
        if not isinstance(painted, np.ndarray) or painted.shape != shape or not np.isfinite(painted).all():
            raise InputError(f"paint must return the pixels, finite numbers of the shape {shape}")
        return painted


class TextTrigger(Trigger):
    """A trigger that writes into every turn of the user and leaves the images alone.

    Every turn and not the last alone, for all answers of a poisoned row are the attacker's.
    """

    kind: ClassVar[Literal["image", "text", "bimodal"]] = "text"

    @abstractmethod
    def write(self, prompt: str, rng: np.random.Generator) -> str:
        """The triggered text of one turn; its image tags stay as many and in their place."""

    def stamp(self, sample: Sample, rng: np.random.Generator) -> Sample:
        messages = tuple(Message("user", self.write(m.text, rng)) if m.role == "user" else m for m in sample.messages)
        return dataclasses.replace(sample, messages=messages)
