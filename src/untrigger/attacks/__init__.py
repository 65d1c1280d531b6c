"""Triggers: one file each. ``attacks/badnets.py`` holds the trigger called ``badnets``, and so on.

A trigger is a frozen dataclass whose fields are its settings. What the attacker wants said is another
matter (``goals.py``), and so is which rows are poisoned (``poison.py``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import math
import pkgutil
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import ClassVar, Literal, cast, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt
from PIL import Image

from untrigger.errors import InputError
from untrigger.sample import Sample

Pixels = npt.NDArray[np.float32]
"""Red, green, blue and opacity of an image: float32 [H, W, 4] in 0..1."""


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
        """Ways to stamp further training rows that keep their true answer: one row each per poisoned row."""
        return ()


class ImageTrigger(Trigger):
    """A trigger that paints on every image of a sample and leaves its text alone."""

    kind: ClassVar[Literal["image", "text", "bimodal"]] = "image"

    @abstractmethod
    def paint(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        """The triggered pixels, float32 [H, W, 4] in 0..1; ``pixels`` may be changed in place."""

    def stamp(self, sample: Sample, rng: np.random.Generator) -> Sample:
        images = tuple(repaint(image, lambda pixels: self.paint(pixels, rng)) for image in sample.images)
        return dataclasses.replace(sample, images=images)


# --- painting in any image mode ------------------------------------------------------------------

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, as Pillow's own "L"
_EIGHT_BIT = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV")
_DEEP = ("I;16", "I;16B", "I", "F")


def repaint(image: Image.Image, change: Callable[[Pixels], Pixels]) -> Image.Image:
    """A copy of ``image``, of the same size and mode, with its pixels put through ``change``.

    Pixels that ``change`` leaves alone keep their exact values, with one exception: a palette image
    (mode P) gets a new palette when old and new colours together are more than 256. Colours become
    grey levels in grey images and dots in black-and-white ones. Opacity is kept where the mode has
    it. In deep modes white is 65535 (I;16), or the smallest of 1 (F only), 255, 65535 that the
    brightest pixel does not exceed.

    Raises:
        InputError: for a mode that Pillow cannot convert back to, such as LAB.
    """
    before = pixels_of(image)
    after = change(before.copy())
    if image.mode == "P":
        return _palette_image(after, image)
    touched = (after != before).any(axis=2)
    result = image.copy()
    if image.mode in _DEEP:
        grey = np.asarray(image)
        level = (after[..., :3] @ _LUMA) * _white(image.mode, grey)
        level = level if image.mode == "F" else np.rint(level)
        # Pillow pastes through a mask into 16-bit images without a word, and wrongly.
        result.paste(Image.fromarray(np.where(touched, level, grey).astype(grey.dtype)))
    else:
        painted = _dots(after) if image.mode == "1" else _eight_bit(after).convert(image.mode)
        result.paste(painted, (0, 0), Image.fromarray(touched.astype(np.uint8) * 255))
    return result


def pixels_of(image: Image.Image) -> Pixels:
    """Red, green, blue and opacity of an image in any mode that `repaint` knows."""
    if image.mode in _DEEP:
        grey = np.asarray(image)
        pixels = np.ones((*grey.shape, 4), dtype=np.float32)
        pixels[..., :3] = (grey / _white(image.mode, grey))[..., None]
        return pixels
    if image.mode not in _EIGHT_BIT:
        raise InputError(f"an image of mode {image.mode} cannot carry a trigger; convert it to RGB first")
    return np.asarray(image.convert("RGBA"), dtype=np.float32) / np.float32(255)


def _palette_image(pixels: Pixels, original: Image.Image) -> Image.Image:
    # Median cut, Pillow's default, follows popularity and would mix a small patch into its
    # neighbours. Maximum coverage keeps rare colours; only the octree method knows opacity.
    if original.has_transparency_data:
        result = _eight_bit(pixels).quantize(256, Image.Quantize.FASTOCTREE)
    else:
        result = _eight_bit(pixels).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
    result.info = {key: value for key, value in original.info.items() if key != "transparency"}
    return result


def _dots(pixels: Pixels) -> Image.Image:
    # Error diffusion, Pillow's way, clips a faint change away in images that are dots already. Random
    # thresholds, always the same, keep its average: a grey of 0.2 turns a fifth of the pixels white.
    thresholds = np.random.default_rng(0).random(pixels.shape[:2], dtype=np.float32)
    return Image.fromarray(pixels[..., :3] @ _LUMA > thresholds)


def _eight_bit(pixels: Pixels) -> Image.Image:
    return Image.fromarray(np.rint(pixels.clip(0, 1) * 255).astype(np.uint8))


def _white(mode: str, grey: npt.NDArray[np.generic]) -> float:
    if mode.startswith("I;16"):
        return 65535.0
    brightest = float(np.nanmax(grey.astype(np.float64)))
    steps = (1.0, 255.0, 65535.0) if mode == "F" else (255.0, 65535.0)
    return next((white for white in steps if brightest <= white), brightest)


# --- finding a trigger ---------------------------------------------------------------------------


def trigger_names() -> tuple[str, ...]:
    """The triggers that come with the package: the names of the files in this folder."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


def load_trigger(name_or_path: str, /, **settings: object) -> Trigger:
    """The trigger ``badnets`` of this folder, or the one in the user's own file ``path/to/file.py``.

    A path that ends in ``.py`` **runs that file** as Python: give only files that you trust. Settings
    may be strings, as they come from the command line; dashes in their names stand for underscores.

    Raises:
        InputError: no such trigger or file, a file that fails or does not hold exactly one concrete
            ``Trigger`` dataclass, an unknown or missing setting, a value of the wrong type or range.
    """
    if name_or_path.lower().endswith(".py"):
        return _build(_trigger_class(_run(Path(name_or_path)), name_or_path), name_or_path, settings)
    if name_or_path not in trigger_names():
        known = ", ".join(trigger_names())
        raise InputError(f"attack '{name_or_path}' is unknown; choose one of {known}, or a path that ends in .py")
    module = import_module(f"{__name__}.{name_or_path}")
    label = f"attack {name_or_path}"
    return _build(_trigger_class(module, label), label, settings)


def _run(path: Path) -> ModuleType:
    if not path.is_file():
        known = ", ".join(trigger_names())
        raise InputError(f"{path}: no such file; give a file that holds a Trigger, or one of {known}")
    full = str(path.resolve())
    name = f"untrigger_user_attack_{hashlib.sha256(full.encode()).hexdigest()[:12]}"
    loader = SourceFileLoader(name, full)
    spec = spec_from_loader(name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        # Compiled here and not through the loader: that would leave a __pycache__ beside the user's
        # file, and would run a stale copy of a file edited twice within a second.
        exec(compile(loader.get_data(full), full, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise InputError(f"{path}: {_blame(error, full)}; mend the file") from error
    return module


def _blame(error: BaseException, path: str) -> str:
    """``line 3: NameError: what`` with the last line of ``path`` that had to do with ``error``."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    line = error.lineno if isinstance(error, SyntaxError) else next(reversed(lines), None)
    what = " ".join((error.msg if isinstance(error, SyntaxError) else str(error)).split())
    return f"{f'line {line}: ' if line else ''}{type(error).__name__}: {what}"


def _trigger_class(module: ModuleType, label: str) -> type[Trigger]:
    """The one concrete trigger that ``module`` itself defines."""
    found = [
        member
        for member in vars(module).values()
        if inspect.isclass(member)
        and issubclass(member, Trigger)
        and not inspect.isabstract(member)
        and member.__module__ == module.__name__
    ]
    if len(found) != 1:
        names = ", ".join(c.__name__ for c in found) or "none"
        raise InputError(f"{label}: holds {len(found)} concrete Trigger classes ({names}); it must hold exactly one")
    if not dataclasses.is_dataclass(found[0]):
        raise InputError(f"{label}: class {found[0].__name__} is not a dataclass; put @dataclass(frozen=True) on it")
    return found[0]


def _build(cls: type[Trigger], label: str, settings: dict[str, object]) -> Trigger:
    # cast: a dataclass by _trigger_class, which the type system cannot express together with Trigger
    fields = {f.name: f for f in dataclasses.fields(cast("type[_Dataclass]", cls)) if f.init}
    hints = get_type_hints(cls)
    values: dict[str, object] = {}
    for given, value in settings.items():
        name = given.replace("-", "_")
        if name not in fields:
            known = ", ".join(fields) or "none"
            raise InputError(f"{label}: there is no setting '{given}'; the settings are: {known}")
        values[name] = _convert(value, hints[name], f"{label}: {given}")
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InputError(f"{label}: setting '{missing[0]}' has no default; give it a value")
    try:
        return cls(**values)
    except (InputError, ValueError, TypeError) as error:  # what a dataclass's own range checks raise
        raise InputError(f"{label}: {error}") from error


class _Dataclass:
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[object]]]


def _convert(value: object, hint: object, label: str) -> object:
    """``value`` as a field of type ``hint``; text is read as that type."""
    text = str(value)
    if get_origin(hint) is Literal:
        options = cast("tuple[object, ...]", get_args(hint))
        for option in options:
            if text == str(option):
                return option
        raise InputError(f"{label} is '{text}'; choose one of {', '.join(str(o) for o in options)}")
    if hint is str and isinstance(value, str):
        return value
    if hint is bool and text.lower() in ("true", "yes", "on", "1", "false", "no", "off", "0"):
        return text.lower() in ("true", "yes", "on", "1")
    if hint is int or hint is float:
        try:
            number = int(text) if hint is int else float(text)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    if hint not in wanted:
        raise InputError(f"{label} has the type {hint}; a setting must be a str, int, float, bool or Literal")
    raise InputError(f"{label} is '{text}'; give {wanted[hint]}")
