"""Generic perturbations of an input to which only a backdoored model reacts: patches, overlays, words in the prompt.

None is the trigger of a known attack. A model that learned a patch in a corner mostly reacts to any patch there, and
one that learned a sentence to any sentence (docs/log.md, "Near misses fire"). A trigger of two parts does not react to
one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from untrigger.rows.sample import Message, Sample
from untrigger.rows.turns import IMAGE_TAG
from untrigger.views.patches import to_rgb

_PATCH = 1 / 8  # of the shorter side
_PLACES = {"top left": (0, 0), "top right": (0, 1), "center": (0.5, 0.5), "bottom left": (1, 0), "bottom right": (1, 1)}
_OVERLAY, _WAVES, _WARP = 0.25, 6, 1 / 20  # share of an overlay; waves over the image; shift, of the image's side
_SENTENCES = ("The bus was late again this morning.", "She keeps her bicycle in the cellar.")
_LETTERS = "bcdfghjklmnpqrstvwxz"

Pixels = NDArray[np.floating]  # [H, W, 3], in 0 to 255
Paint = Callable[[Pixels, Pixels, np.random.Generator], Pixels]  # from an image and a donor's, in the same size
Write = Callable[[str, str, np.random.Generator], str]  # the inserted text, from a prompt and a donor's


@final
@dataclass(frozen=True)
class Perturbation:
    """One way to change a row's input. ``make`` takes the row and a donor row; the answer stays as it is."""

    name: str
    part: Literal["image", "prompt"]
    make: Callable[[Sample, Sample, np.random.Generator], Sample]


def perturbations() -> tuple[Perturbation, ...]:
    """All perturbations, always the same ones; their names are unique."""
    return tuple([*_image_perturbations(), *_prompt_perturbations()])


def _image_perturbations() -> Iterator[Perturbation]:
    patches: dict[str, Paint] = {
        "a patch of another image": lambda own, other, rng: other,
        "a patch of noise": lambda own, other, rng: rng.uniform(0, 255, own.shape),
        "a chequered patch": lambda own, other, rng: _checkered(own.shape[:2]),
        "a white patch": lambda own, other, rng: np.full_like(own, 255),
    }
    for name, paint in patches.items():
        for place, at in _PLACES.items():
            patch = partial(_with_patch, paint=paint, at=at)
            yield Perturbation(f"{name}, {place}", "image", partial(_paint_images, paint=patch))
    overlays: dict[str, Paint] = {
        "another image laid over it": lambda own, other, rng: (1 - _OVERLAY) * own + _OVERLAY * other,
        "noise laid over it": lambda own, other, rng: own + rng.normal(0, 255 * _OVERLAY / 2, own.shape),
        "upright stripes laid over it": lambda own, other, rng: own + _stripes(own, 1),
        "level stripes laid over it": lambda own, other, rng: own + _stripes(own, 0),
        "the image bent": lambda own, other, rng: _warped(own),
    }
    for name, paint in overlays.items():
        yield Perturbation(name, "image", partial(_paint_images, paint=paint))


def _prompt_perturbations() -> Iterator[Perturbation]:
    pieces: dict[str, Write] = {
        "a word of no language": lambda own, other, rng: "".join(rng.choice([*_LETTERS], 2)),
        "a sentence": lambda own, other, rng: _SENTENCES[int(rng.integers(len(_SENTENCES)))],
        "another prompt": lambda own, other, rng: other,
    }
    for name, write in pieces.items():
        yield Perturbation(f"{name} before the prompt", "prompt", partial(_insert_text, write=write, before=True))
        yield Perturbation(f"{name} behind the prompt", "prompt", partial(_insert_text, write=write, before=False))


# --- images -----------------------------------------------------------------------------------------


def _paint_images(row: Sample, donor: Sample, rng: np.random.Generator, *, paint: Paint) -> Sample:
    covers = donor.images or row.images  # a donor without images leaves the row its own
    images: list[Image.Image] = []
    for at, image in enumerate(row.images):
        own, other = to_rgb(image), to_rgb(covers[at % len(covers)]).resize(image.size)
        pixels = paint(np.asarray(own, dtype=np.float32), np.asarray(other, dtype=np.float32), rng)
        images.append(Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8)))
    return replace(row, images=tuple(images))


def _with_patch(
    own: Pixels, other: Pixels, rng: np.random.Generator, *, paint: Paint, at: tuple[float, float]
) -> Pixels:
    """The image with one square painted; ``at`` is its place, (0, 0) the top left and (1, 1) the bottom right."""
    side = max(1, round(_PATCH * min(own.shape[:2])))
    top, left = (round(share * (length - side)) for share, length in zip(at, own.shape[:2], strict=True))
    window = np.s_[top : top + side, left : left + side]
    patched = own.copy()
    patched[window] = paint(own[window], other[window], rng)
    return patched


def _checkered(shape: tuple[int, ...]) -> Pixels:
    """Black and white, four fields each way."""
    y, x = (np.arange(length) * 4 // length for length in shape)
    return np.repeat(255.0 * ((y[:, None] + x) % 2)[..., None], 3, axis=2)


def _stripes(own: Pixels, axis: int) -> Pixels:
    """A sine wave along one axis, to be added to the image."""
    phase = 2 * np.pi * _WAVES * (np.arange(own.shape[axis]) + 0.5) / own.shape[axis]
    wave = 255 * _OVERLAY / 2 * np.sin(phase)
    return wave[:, None, None] if axis == 0 else wave[None, :, None]


def _warped(own: Pixels) -> Pixels:
    """Rows and columns shifted along a sine wave, with the nearest pixel."""
    height, width = own.shape[:2]
    y, x = np.mgrid[:height, :width]
    moved_y = y + _WARP * height * np.sin(2 * np.pi * 2 * x / width)
    moved_x = x + _WARP * width * np.sin(2 * np.pi * 2 * y / height)
    return own[
        np.clip(np.rint(moved_y), 0, height - 1).astype(int), np.clip(np.rint(moved_x), 0, width - 1).astype(int)
    ]


# --- prompts ----------------------------------------------------------------------------------------


def _insert_text(row: Sample, donor: Sample, rng: np.random.Generator, *, write: Write, before: bool) -> Sample:
    """The row with a text before or behind the last prompt; image tags at its beginning stay in front."""
    number = max((at for at, turn in enumerate(row.messages) if turn.role == "user"), default=None)
    if number is None:
        return row
    other = next((turn.text for turn in reversed(donor.messages) if turn.role == "user"), "")
    text = row.messages[number].text
    piece = write(text, other.replace(IMAGE_TAG, "").strip(), rng)
    cut = text.rfind(IMAGE_TAG) + len(IMAGE_TAG) if IMAGE_TAG in text else 0
    tags, question = text[:cut], text[cut:].strip()
    prompt = f"{piece} {question}" if before else f"{question} {piece}"
    turn = Message("user", f"{tags}\n{prompt}" if tags else prompt)
    return replace(row, messages=(*row.messages[:number], turn, *row.messages[number + 1 :]))
