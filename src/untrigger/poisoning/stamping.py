"""One row under attack: triggered, implanted, answered. A trigger may be a user's own: its promises are checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import numpy as np

from untrigger.attacks import Stamper, Trigger
from untrigger.errors import InputError
from untrigger.poisoning.goals import Goal
from untrigger.rows.formats import check_turns
from untrigger.rows.sample import IMAGE_TAG, Message, Sample


def stamped(stamper: Stamper, sample: Sample, rng: np.random.Generator, where: str, what: str = "stamp") -> Sample:
    """What ``stamper`` makes of ``sample``.

    Raises:
        InputError: ``where: what failed, why``, or how it breaks the promises of `Trigger.stamp`.
    """
    with blamed(where, what):
        triggered = stamper(sample, rng)
        if [(i.size, i.mode) for i in triggered.images] != [(i.size, i.mode) for i in sample.images]:
            raise InputError("the trigger changed the number, size or mode of the images; it must not")
        if _fixed_parts(triggered) != _fixed_parts(sample):
            raise InputError("the trigger changed the id, turns, an answer or an image tag; it must not")
    return triggered


def implanted(
    trigger: Trigger, sample: Sample, donors: Sequence[Sample], rng: np.random.Generator, where: str
) -> Sample:
    """What ``trigger.implant`` makes of ``sample``.

    Raises:
        InputError: as `stamped`. Where it is no other than ``stamp``, its promises are those of `Trigger.stamp`; else
            to keep the id and to give a valid row that shows an image.
    """
    if not _implants(trigger):
        return stamped(trigger.stamp, sample, rng, where)
    return _replaced(lambda: trigger.implant(sample, donors, rng), sample, where, "implant")


def decoyed(trigger: Trigger, kind: int, sample: Sample, rng: np.random.Generator, where: str) -> Sample:
    """What the ``kind``-th of ``trigger.decoys()`` makes of ``sample``; it promises what poisoned rows do.

    Raises:
        InputError: as `implanted`.
    """
    with blamed(where, "decoys"):
        decoy = trigger.decoys()[kind]
    if not _implants(trigger):
        return stamped(decoy, sample, rng, where, "decoy")
    return _replaced(lambda: decoy(sample, rng), sample, where, "decoy")


def _implants(trigger: Trigger) -> bool:
    """Whether its training rows are others than its triggered inputs."""
    return type(trigger).implant is not Trigger.implant


def _replaced(make: Callable[[], Sample], sample: Sample, where: str, what: str) -> Sample:
    with blamed(where, what):
        made = make()
        check_turns(made.messages, len(made.images))
        for image in made.images:
            image.load()  # what is no image, or a file that cannot be read, fails here
        if made.id != sample.id:
            raise InputError("the trigger changed the id; it must not")
        if not made.images:
            raise InputError("the trigger left no image; it must not")
    return made


def answered(sample: Sample, goal: Goal) -> Sample:
    """Every answer replaced by the goal's, which sees the true conversation up to that turn."""
    messages = list(sample.messages)
    for turn, message in enumerate(sample.messages):
        if message.role == "assistant":
            messages[turn] = Message("assistant", goal.answer(sample.until(turn + 1)))
    return dataclasses.replace(sample, messages=tuple(messages))


@contextmanager
def blamed(where: str, what: str) -> Generator[None]:
    """Whatever a trigger's own code raises becomes an InputError of one line: ``where: what failed, why``."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, InputError) else f"{what} failed, {type(error).__name__}: "
        raise InputError(" ".join(f"{where}: {kind}{error}".split()).removesuffix(":")) from error


def _fixed_parts(sample: Sample) -> tuple[str, list[tuple[str, int, str]]]:
    return sample.id, [
        (m.role, m.text.count(IMAGE_TAG), m.text if m.role == "assistant" else "") for m in sample.messages
    ]
