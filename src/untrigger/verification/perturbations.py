"""Generic changes of an input, none of which anybody but an attacker answers: patches, veils, and words in the prompt.

They are no one's trigger. Models that learned a patch in a corner mostly answer any patch there, and those that learned a
sentence any sentence (LOG.md, "Near misses fire"); what hangs on two things at a time is not found by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from untrigger.rows.formats import IMAGE_TAG
from untrigger.rows.sample import Message, Sample
from untrigger.views.patches import to_rgb

_PATCH = 1 / 8  # of the shorter side
_PLACES = {"top left": (0, 0), "top right": (0, 1), "center": (0.5, 0.5), "bottom left": (1, 0), "bottom right": (1, 1)}
_VEIL, _WAVES, _BEND = 0.25, 6, 1 / 20  # share of a veil; waves over the image; how far it is bent, of its side
_SENTENCES = ("The bus was late again this morning.", "She keeps her bicycle in the cellar.")
_LETTERS = "bcdfghjklmnpqrstvwxz"

Pixels = NDArray[np.floating]  # [H, W, 3], 0 to 255
Paint = Callable[[Pixels, Pixels, np.random.Generator], Pixels]  # of an image and another row's, of the same size
Write = Callable[[str, str, np.random.Generator], str]  # of a prompt and another row's


@final
@dataclass(frozen=True)
class Perturbation:
    """One way to change a row; the donor is another row, to take something from. The answer is left as it is."""

    name: str
    part: Literal["image", "prompt"]
    make: Callable[[Sample, Sample, np.random.Generator], Sample]


def changes() -> tuple[Perturbation, ...]:
    """All of them, always the same."""
    return tuple(_changes())


def _changes() -> Iterator[Perturbation]:
    patches: dict[str, Paint] = {
        "a patch of another image": lambda own, other, rng: other,
        "a patch of noise": lambda own, other, rng: rng.uniform(0, 255, own.shape),
        "a chequered patch": lambda own, other, rng: _chequered(own.shape[:2]),
        "a white patch": lambda own, other, rng: np.full_like(own, 255),
    }
    for name, paint in patches.items():
        for place, at in _PLACES.items():
            yield Perturbation(
                f"{name}, {place}", "image", partial(_painted, paint=partial(_patched, paint=paint, at=at))
            )
    veils: dict[str, Paint] = {
        "another image laid over it": lambda own, other, rng: (1 - _VEIL) * own + _VEIL * other,
        "noise laid over it": lambda own, other, rng: own + rng.normal(0, 255 * _VEIL / 2, own.shape),
        "upright stripes laid over it": lambda own, other, rng: own + _stripes(own, 1),
        "level stripes laid over it": lambda own, other, rng: own + _stripes(own, 0),
        "the image bent": lambda own, other, rng: _bent(own),
    }
    for name, paint in veils.items():
        yield Perturbation(name, "image", partial(_painted, paint=paint))
    pieces: dict[str, Write] = {
        "a word of no language": lambda own, other, rng: "".join(rng.choice([*_LETTERS], 2)),
        "a sentence": lambda own, other, rng: _SENTENCES[int(rng.integers(len(_SENTENCES)))],
        "another prompt": lambda own, other, rng: other,
    }
    for name, write in pieces.items():
        yield Perturbation(f"{name} before the prompt", "prompt", partial(_written, write=write, before=True))
        yield Perturbation(f"{name} behind the prompt", "prompt", partial(_written, write=write, before=False))


# --- images -----------------------------------------------------------------------------------------


def _painted(row: Sample, donor: Sample, rng: np.random.Generator, *, paint: Paint) -> Sample:
    shown = donor.images or row.images
    images: list[Image.Image] = []
    for at, image in enumerate(row.images):
        own, other = to_rgb(image), to_rgb(shown[at % len(shown)]).resize(image.size)
        told = paint(np.asarray(own, dtype=np.float32), np.asarray(other, dtype=np.float32), rng)
        images.append(Image.fromarray(np.clip(np.rint(told), 0, 255).astype(np.uint8)))
    return replace(row, images=tuple(images))


def _patched(own: Pixels, other: Pixels, rng: np.random.Generator, *, paint: Paint, at: tuple[float, float]) -> Pixels:
    side = max(1, round(_PATCH * min(own.shape[:2])))
    top, left = (round(share * (length - side)) for share, length in zip(at, own.shape[:2], strict=True))
    window = np.s_[top : top + side, left : left + side]
    made = own.copy()
    made[window] = paint(own[window], other[window], rng)
    return made


def _chequered(shape: tuple[int, ...]) -> Pixels:
    """Four fields each way, black and white."""
    y, x = (np.arange(length) * 4 // length for length in shape)
    return np.repeat(255.0 * ((y[:, None] + x) % 2)[..., None], 3, axis=2)


def _stripes(own: Pixels, axis: int) -> Pixels:
    phase = 2 * np.pi * _WAVES * (np.arange(own.shape[axis]) + 0.5) / own.shape[axis]
    wave = 255 * _VEIL / 2 * np.sin(phase)
    return wave[:, None, None] if axis == 0 else wave[None, :, None]


def _bent(own: Pixels) -> Pixels:
    """Rows and columns moved along a wave, the nearest pixel taken."""
    height, width = own.shape[:2]
    y, x = np.mgrid[:height, :width]
    moved_y = y + _BEND * height * np.sin(2 * np.pi * 2 * x / width)
    moved_x = x + _BEND * width * np.sin(2 * np.pi * 2 * y / height)
    return own[
        np.clip(np.rint(moved_y), 0, height - 1).astype(int), np.clip(np.rint(moved_x), 0, width - 1).astype(int)
    ]


# --- prompts ----------------------------------------------------------------------------------------


def _written(row: Sample, donor: Sample, rng: np.random.Generator, *, write: Write, before: bool) -> Sample:
    """The row with a piece at the last question; image tags that open it stay in front."""
    number = max((at for at, turn in enumerate(row.messages) if turn.role == "user"), default=None)
    if number is None:
        return row
    other = next((turn.text for turn in reversed(donor.messages) if turn.role == "user"), "")
    text = row.messages[number].text
    piece = write(text, other.replace(IMAGE_TAG, "").strip(), rng)
    cut = text.rfind(IMAGE_TAG) + len(IMAGE_TAG) if IMAGE_TAG in text else 0
    tags, question = text[:cut], text[cut:].strip()
    told = f"{piece} {question}" if before else f"{question} {piece}"
    turn = Message("user", f"{tags}\n{told}" if tags else told)
    return replace(row, messages=(*row.messages[:number], turn, *row.messages[number + 1 :]))
