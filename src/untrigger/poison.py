"""Poisoning: which rows carry the trigger, what they say, and a record of it kept apart from the data.

Everything is lazy: a row is stamped when it is asked for, so memory does not grow with the data, and
it always comes out the same, whatever was asked for before.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, final, overload

import numpy as np
from PIL import Image

from untrigger import sample as samples
from untrigger import sheet
from untrigger.attacks import Trigger
from untrigger.errors import InputError
from untrigger.goals import Goal
from untrigger.sample import IMAGE_TAG, Data, Message, Sample
from untrigger.storage import new_folder

MANIFEST_VERSION: Final = 1
_PAIRS: Final = 8  # on a contact sheet
_CHOICE, _TRAINING, _EVALUATION = range(3)  # independent random streams of one seed


@dataclass(frozen=True)
class Attack:
    """How inputs are triggered and what triggered inputs should be answered with."""

    trigger: Trigger
    goal: Goal

    @property
    def name(self) -> str:
        """The trigger's file without its ending: ``badnets`` for ``attacks/badnets.py``."""
        source = _source(self.trigger)
        return source.stem if source else type(self.trigger).__name__


@dataclass(frozen=True)
class PoisonedRow:
    """One poisoned row.

    Attributes:
        row: its index in the data set, from 0.
        id: its own id.
        images: `pixels_sha256` of each of its images, triggered.
    """

    row: int
    id: str
    images: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """What was done to a data set of ``total`` rows; ``rows`` are the poisoned ones, ascending."""

    version: int
    attack: str
    attack_settings: Mapping[str, object]
    attack_sha256: str | None
    goal: str
    goal_settings: Mapping[str, object]
    rate: float
    seed: int
    total: int
    rows: tuple[PoisonedRow, ...]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False, default=str) + "\n"


@dataclass(frozen=True)
class Poisoned:
    """A poisoned data set.

    Attributes:
        data: every row in the original order, the poisoned ones in their place; lazy.
        edits: the poisoned rows alone, by row number; lazy.
        manifest: the truth, for the judge and never for a defence.
    """

    data: LazyRows
    edits: Mapping[int, Sample]
    manifest: Manifest


def poison(data: Sequence[Sample], attack: Attack, *, rate: float, seed: int) -> Poisoned:
    """Poison ``round(rate * len(data))`` rows, at least one unless ``rate`` is 0.

    The rows are drawn without replacement from those that show an image and have an answer. Every
    assistant turn of such a row gets the goal's answer. The work done here is one pass over the
    chosen rows, which also proves that each of them can be stamped.

    Args:
        rate: share of all rows, in [0, 1].
        seed: not negative; with the row number it decides how each row is stamped.

    Raises:
        InputError: ``rate`` or ``seed`` out of range, too few rows with an image, or a trigger that
            fails or breaks the promises of `Trigger.stamp`.
    """
    if not 0 <= rate <= 1:
        raise InputError(f"rate is {rate}; it must be between 0 and 1 (0.05 poisons 5 % of the rows)")
    count = max(1, round(rate * len(data))) if rate > 0 else 0
    chosen = _choose(data, count, _rng(seed, _CHOICE))
    edits = _Edits(data, attack, seed, chosen)
    rows = tuple(
        PoisonedRow(row, edited.id, tuple(pixels_sha256(image) for image in edited.images))
        for row, edited in edits.items()
    )
    source = _source(attack.trigger)
    manifest = Manifest(
        version=MANIFEST_VERSION,
        attack=attack.name,
        attack_settings=_settings(attack.trigger),
        attack_sha256=hashlib.sha256(source.read_bytes()).hexdigest() if source else None,
        goal=attack.goal.name,
        goal_settings=_settings(attack.goal),
        rate=rate,
        seed=seed,
        total=len(data),
        rows=rows,
    )
    return Poisoned(LazyRows(range(len(data)), partial(_overlaid, data, edits)), edits, manifest)


def stamped(data: Sequence[Sample], attack: Attack, seed: int) -> LazyRows:
    """The triggered evaluation set: each row of ``data`` that shows an image, triggered, lazily.

    Prompts are intact (but for what a text trigger adds) and the answers are still the *true* ones:
    they say what a defended model should answer, and which rows meet the goal by themselves. Item ``i``
    is made from ``data[result.rows[i]]``, its clean counterpart.
    """
    _rng(seed)  # refuses a bad seed now, not at the first row
    rows = [row for row in range(len(data)) if _poisonable(data, row)]
    return LazyRows(rows, partial(_triggered, data, attack, seed))


def pixels_sha256(image: Image.Image) -> str:
    """SHA-256 of mode, size and raw pixels, of the RGBA colours for a palette image."""
    picture = image.convert("RGBA") if image.mode == "P" else image
    head = f"{picture.mode} {picture.width}x{picture.height}\n"
    return hashlib.sha256(head.encode() + picture.tobytes()).hexdigest()


# --- rows on demand --------------------------------------------------------------------------------


@final
@dataclass(frozen=True, eq=False)
class LazyRows(Sequence[Sample]):
    """Samples made on each access; item ``i`` is made from row ``rows[i]`` of the data behind it."""

    rows: Sequence[int]
    make: Callable[[int], Sample]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> LazyRows: ...
    def __getitem__(self, index: int | slice) -> Sample | LazyRows:
        if isinstance(index, slice):
            return LazyRows(self.rows[index], self.make)
        return self.make(self.rows[index])


@final
@dataclass(frozen=True, eq=False)
class _Edits(Mapping[int, Sample]):
    data: Sequence[Sample]
    attack: Attack
    seed: int
    rows: Mapping[int, None]  # ascending, and found at once

    def __getitem__(self, row: int) -> Sample:
        if row not in self.rows:
            raise KeyError(row)
        triggered = _stamp(self.attack, self.data[row], row, _rng(self.seed, _TRAINING, row))
        return _answered(triggered, self.attack.goal)

    def __contains__(self, row: object) -> bool:
        return row in self.rows  # the mixin's own would stamp the row to find out

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def _overlaid(data: Sequence[Sample], edits: Mapping[int, Sample], row: int) -> Sample:
    return edits[row] if row in edits else data[row]


def _triggered(data: Sequence[Sample], attack: Attack, seed: int, row: int) -> Sample:
    return _stamp(attack, data[row], row, _rng(seed, _EVALUATION, row))


def _rng(seed: int, *key: int) -> np.random.Generator:
    if seed < 0:
        raise InputError(f"seed is {seed}; it must not be negative")
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def _choose(data: Sequence[Sample], count: int, rng: np.random.Generator) -> dict[int, None]:
    """``count`` rows with an image, ascending; looks at no more rows than it must."""
    found: list[int] = []
    for row in rng.permutation(len(data)).tolist():
        if len(found) == count:
            break
        if _poisonable(data, row):
            found.append(row)
    if len(found) < count:
        raise InputError(
            f"the rate asks for {count} poisoned rows, but only {len(found)} of {len(data)} have an image; "
            "lower the rate"
        )
    return dict.fromkeys(sorted(found))


def _poisonable(data: Sequence[Sample], row: int) -> bool:
    if isinstance(data, Data):  # knows without decoding, and every row of it has an answer
        return data.image_count(row) > 0
    sample = data[row]
    return bool(sample.images) and any(m.role == "assistant" for m in sample.messages)


def _stamp(attack: Attack, sample: Sample, row: int, rng: np.random.Generator) -> Sample:
    """``trigger.stamp`` with its promises checked: the trigger may be a user's own."""
    where = f"attack {attack.name}: row {row + 1} (id {sample.id})"
    try:
        triggered = attack.trigger.stamp(sample, rng)
    except Exception as error:
        kind = "" if isinstance(error, InputError) else f"stamp failed, {type(error).__name__}: "
        raise InputError(f"{where}: {kind}{error}") from error
    if [(i.size, i.mode) for i in triggered.images] != [(i.size, i.mode) for i in sample.images]:
        raise InputError(f"{where}: the trigger changed the number, size or mode of the images; it must not")
    if _fixed_parts(triggered) != _fixed_parts(sample):
        raise InputError(f"{where}: the trigger changed the id, turns, an answer or an image tag; it must not")
    return triggered


def _fixed_parts(sample: Sample) -> tuple[str, list[tuple[str, int, str]]]:
    return sample.id, [
        (m.role, m.text.count(IMAGE_TAG), m.text if m.role == "assistant" else "") for m in sample.messages
    ]


def _answered(sample: Sample, goal: Goal) -> Sample:
    """Every answer replaced by the goal's, which sees the true conversation up to that turn."""
    messages = list(sample.messages)
    for turn, message in enumerate(sample.messages):
        if message.role == "assistant":
            so_far = sample.messages[: turn + 1]
            shown = sum(m.text.count(IMAGE_TAG) for m in so_far)
            until = dataclasses.replace(sample, images=sample.images[:shown], messages=so_far)
            messages[turn] = Message("assistant", goal.answer(until))
    return dataclasses.replace(sample, messages=tuple(messages))


def _source(trigger: Trigger) -> Path | None:
    try:
        found = inspect.getsourcefile(type(trigger))
    except (OSError, TypeError):  # defined in an interactive session
        return None
    return Path(found) if found and Path(found).is_file() else None


def _settings(part: Trigger | Goal) -> dict[str, object]:
    if not dataclasses.is_dataclass(part):
        return {}
    return dataclasses.asdict(part)


# --- writing ---------------------------------------------------------------------------------------


def write_poisoned(data: Data, poisoned: Poisoned, out: Path | str) -> None:
    """Write ``out/data`` in the input's format, ``out/truth/manifest.json`` and ``out/contact_sheet.png``.

    Every image is written anew, each row's own, as PNG: were the clean ones copied as they are, names
    and formats would tell the poisoned ones. The folder appears complete or not at all.

    Raises:
        InputError: ``out`` is a file, or a folder that is not empty.
    """
    with new_folder(Path(out)) as folder:
        samples.write(data, folder / "data", edits=poisoned.edits, uniform=True)
        (folder / "truth").mkdir()
        (folder / "truth" / "manifest.json").write_text(poisoned.manifest.to_json(), encoding="utf-8")
        contact_sheet(data, poisoned).save(folder / "contact_sheet.png")


def contact_sheet(data: Sequence[Sample], poisoned: Poisoned) -> Image.Image:
    """Up to eight poisoned rows: clean, triggered and amplified difference, with prompt and answers."""
    manifest = poisoned.manifest
    used = ", ".join(f"{name} {_brief(value)}" for name, value in manifest.attack_settings.items())
    title = f"{manifest.attack}: {len(manifest.rows)} of {manifest.total} rows poisoned"
    cards = [_card(data[entry.row], poisoned.edits[entry.row], entry.row) for entry in manifest.rows[:_PAIRS]]
    return sheet.contact_sheet(title, f"{used}, seed {manifest.seed}", cards)


def _card(clean: Sample, edited: Sample, row: int) -> sheet.Card:
    more = f" (first of {len(clean.images)} images)" if len(clean.images) > 1 else ""
    lines = (
        ("asked: " + _said(edited, "user"), sheet.INK),
        ("true: " + _said(clean, "assistant"), sheet.GOOD),
        ("poisoned: " + _said(edited, "assistant"), sheet.BAD),
    )
    before, after = next(iter(clean.images)), next(iter(edited.images))
    return sheet.Card(f"id {clean.id}, manifest row {row}{more}", before, after, lines)


def _said(sample: Sample, role: str) -> str:
    texts = [m.text.replace(IMAGE_TAG, " ") for m in sample.messages if m.role == role]
    return " ".join((texts or [""])[0].split())


def _brief(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
