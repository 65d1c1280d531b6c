"""Stamps, implants and answers one row, and checks what a trigger returns, which may be a user's own code."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import numpy as np

from untrigger.attacks import Stamper, Trigger
from untrigger.errors import InputError
from untrigger.poisoning.goals import Goal
from untrigger.rows.sample import IMAGE_TAG, Message, Sample
from untrigger.rows.turns import check_turns


def stamp_row(stamper: Stamper, sample: Sample, rng: np.random.Generator, where: str, step: str = "stamp") -> Sample:
    """Apply ``stamper`` to ``sample`` and check the contract of `Trigger.stamp`.

    Raises:
        InputError: ``where: step failed, error``, or which part of the contract is broken.
    """
    with trigger_errors(where, step):
        triggered = stamper(sample, rng)
        if [(i.size, i.mode) for i in triggered.images] != [(i.size, i.mode) for i in sample.images]:
            raise InputError("the trigger changed the number, size or mode of the images; it must not")
        if _fixed_parts(triggered) != _fixed_parts(sample):
            raise InputError("the trigger changed the id, turns, an answer or an image tag; it must not")
    return triggered


def implant_row(
    trigger: Trigger, sample: Sample, donors: Sequence[Sample], rng: np.random.Generator, where: str
) -> Sample:
    """Apply ``trigger.implant`` to ``sample`` and check the result.

    A trigger without its own ``implant`` must keep to the contract of `Trigger.stamp`. Otherwise the result must have
    the same id and be a valid row with an image.

    Raises:
        InputError: as `stamp_row`.
    """
    if not _has_own_implant(trigger):
        return stamp_row(trigger.stamp, sample, rng, where)
    return _replacement(lambda: trigger.implant(sample, donors, rng), sample, where, "implant")


def decoy_row(trigger: Trigger, kind: int, sample: Sample, rng: np.random.Generator, where: str) -> Sample:
    """Apply ``trigger.decoys()[kind]`` to ``sample`` and check the result as `implant_row` does.

    Raises:
        InputError: as `stamp_row`.
    """
    with trigger_errors(where, "decoys"):
        decoy = trigger.decoys()[kind]
    if not _has_own_implant(trigger):
        return stamp_row(decoy, sample, rng, where, "decoy")
    return _replacement(lambda: decoy(sample, rng), sample, where, "decoy")


def _has_own_implant(trigger: Trigger) -> bool:
    return type(trigger).implant is not Trigger.implant


def _replacement(make: Callable[[], Sample], sample: Sample, where: str, step: str) -> Sample:
    with trigger_errors(where, step):
        result = make()
        check_turns(result.messages, len(result.images))
        for image in result.images:
            image.load()  # fails here if it is no image, or a file that cannot be read
        if result.id != sample.id:
            raise InputError("the trigger changed the id; it must not")
        if not result.images:
            raise InputError("the trigger returned a row without an image; return at least one")
    return result


def answer_row(sample: Sample, goal: Goal, where: str) -> Sample:
    """Replace every answer by the goal's, computed from the true conversation up to that turn.

    Raises:
        InputError: ``where: goal NAME failed, error``, or the goal returns no text.
    """
    messages = list(sample.messages)
    with trigger_errors(where, f"goal {goal.name}"):
        for turn, message in enumerate(sample.messages):
            if message.role == "assistant":
                text = goal.answer(sample.until(turn + 1))
                if not isinstance(text, str):
                    raise InputError(f"goal {goal.name} answers with {type(text).__name__}; return text")
                messages[turn] = Message("assistant", text)
    return dataclasses.replace(sample, messages=tuple(messages))


@contextmanager
def trigger_errors(where: str, step: str) -> Generator[None]:
    """Turn whatever a trigger's own code raises into an InputError of one line: ``where: step failed, error``."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, InputError) else f"{step} failed, {type(error).__name__}: "
        raise InputError(" ".join(f"{where}: {kind}{error}".split()).removesuffix(":")) from error


def _fixed_parts(sample: Sample) -> tuple[str, list[tuple[str, int, str]]]:
    return sample.id, [
        (m.role, m.text.count(IMAGE_TAG), m.text if m.role == "assistant" else "") for m in sample.messages
    ]
