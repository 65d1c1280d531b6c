"""Poisoning: chooses rows, puts the trigger and the goal's answer into them, and records it apart from the data.

Rows are lazy: each is stamped when it is read, so memory does not grow with the data. A row is the same each time,
whichever rows were read before.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, final

import numpy as np
from PIL import Image

from untrigger.attacks import Stamper, Trigger
from untrigger.errors import InputError
from untrigger.files import new_folder
from untrigger.poisoning.contact_sheet import BAD, GOOD, INK, Card, draw_sheet
from untrigger.poisoning.goals import Concept, Goal
from untrigger.poisoning.manifest import MANIFEST_VERSION, Manifest, PoisonedRow, describe, list_settings
from untrigger.poisoning.stamping import answer_row, decoy_row, implant_row, stamp_row, trigger_errors
from untrigger.rows.images import pixels_sha256
from untrigger.rows.sample import IMAGE_TAG, Data, LazyRows, Sample, select_rows, write

_PAIRS: Final = 8  # rows on a contact sheet
_TRIES: Final = 500  # draws of a row that the goal applies to, by a trigger that brings rows of its own
_CHOICE, _TRAINING, _EVALUATION = range(3)  # independent random streams of one seed


@dataclass(frozen=True)
class Attack:
    """A trigger, and the goal that triggered inputs should be answered with.

    Raises:
        InputError: the trigger is clean-label and the goal is not concept: true answers cannot plant another goal.
    """

    trigger: Trigger
    goal: Goal

    def __post_init__(self) -> None:
        if self.trigger.clean_label and self.goal.name != Concept.name:
            raise InputError(
                f"attack {self.name} keeps true answers: goal {self.goal.name} cannot be planted; use concept"
            )

    @property
    def name(self) -> str:
        """The trigger's file name without its suffix: ``badnets`` for ``attacks/badnets.py``."""
        source = _source(self.trigger)
        return source.stem if source else type(self.trigger).__name__

    @property
    def settings(self) -> dict[str, object]:
        """The trigger's fields."""
        return _settings(self.trigger)

    @property
    def goal_settings(self) -> dict[str, object]:
        """The goal's fields."""
        return _settings(self.goal)

    def fitted(self, rows: Sequence[Sample], seed: int) -> Attack:
        """Return the attack with its goal fitted to ``rows`` (`Goal.fitted`), the clean rows of the data."""
        with trigger_errors(f"goal {self.goal.name}", "fitted"):
            return dataclasses.replace(self, goal=self.goal.fitted(rows, seed))

    def __str__(self) -> str:
        return f"attack {describe(self.name, self.settings)}, goal {describe(self.goal.name, self.goal_settings)}"


@dataclass(frozen=True, repr=False)
class Poisoned:
    """A poisoned data set.

    Attributes:
        data: all rows in the original order, poisoned ones included; lazy.
        edits: the poisoned rows and the decoys alone, by their index in ``data``, from 0; lazy.
        manifest: the ground truth, for scoring and never for a defense; its rows count from 1.
    """

    data: LazyRows
    edits: Mapping[int, Sample]
    manifest: Manifest

    def __repr__(self) -> str:
        return f"Poisoned: {self.manifest.summary}"


def poison(
    rows: Sequence[Sample], attack: Attack, *, rate: float, seed: int = 0, among: Sequence[int] | None = None
) -> Poisoned:
    """Poison ``round(rate * len(rows))`` rows, at least one unless ``rate`` is 0.

    Rows are drawn without replacement from those that have an image and an answer and that the goal applies to
    (`Goal.applies`). Every assistant turn of such a row gets the goal's answer. A clean-label trigger changes no
    answer: its rows are drawn from those whose true answer already meets the goal. For each kind of decoy that the
    trigger has, the same number of further rows become decoys.

    This call reads each chosen row once, which also proves that each can be stamped. For a clean-label trigger, and for
    a goal that is fitted to the data, it also reads the text of all rows.

    Args:
        rate: share of all rows, or of those ``among``, in [0, 1].
        seed: not negative; with the row's index it decides how each row is stamped.
        among: indices of the rows that may be changed, from 0; by default all. They alone are the data of the goal.

    Raises:
        InputError: ``rate`` or ``seed`` is out of range, too few rows are eligible, or the trigger fails or breaks the
            contract of `Trigger.stamp` or `Trigger.implant`.
    """
    if not 0 <= rate <= 1:
        raise InputError(f"rate is {rate}; it must be between 0 and 1 (0.05 poisons 5 % of the rows)")
    part = rows if among is None else select_rows(rows, among)
    rng, trigger = _rng(seed, _CHOICE), attack.trigger
    fitted = attack.fitted(part, seed)
    count = max(1, round(rate * len(part))) if rate > 0 else 0
    drawn = _draw(rows, fitted, count, rng, range(len(rows)) if among is None else among)
    uses = {index: number // count for number, index in enumerate(drawn)}
    donors = _donors(part, fitted.goal) if trigger.clean_label else ()
    edits = _Edits(rows, fitted, seed, dict(sorted(uses.items())), donors)
    entries = {
        index: PoisonedRow(index + 1, edited.id, tuple(pixels_sha256(image) for image in edited.images))
        for index, edited in edits.items()
    }
    manifest = Manifest(
        version=MANIFEST_VERSION,
        attack=attack.name,
        attack_settings=attack.settings,
        attack_sha256=_source_sha256(trigger),
        goal=attack.goal.name,
        goal_settings=attack.goal_settings,
        goal_sha256=_source_sha256(attack.goal),
        rate=rate,
        seed=seed,
        total=len(rows),
        rows=tuple(entries[index] for index in edits if not uses[index]),
        decoys=tuple(entries[index] for index in edits if uses[index]),
    )
    return Poisoned(LazyRows(range(len(rows)), partial(_overlaid, rows, edits)), edits, manifest)


def stamped(rows: Sequence[Sample], attack: Attack, seed: int, stamper: Stamper | None = None) -> LazyRows:
    """The triggered evaluation set: every row that has an image and that the goal applies to, triggered, lazily.

    Prompts stay as they are, apart from what a text trigger adds. The answers are still the *true* ones: they are what
    a defended model should answer, and they show which rows meet the goal by themselves. A goal that needs the data is
    fitted to ``rows`` (`Attack.fitted`), unless it has been fitted already. Item ``i`` is made from
    ``rows[result.numbers[i]]``, its clean counterpart. ``stamper`` replaces the trigger's own, such as by one of its
    near misses, with the same random draws.
    """
    _rng(seed)  # fail on a bad seed now, not at the first row
    attack = attack.fitted(rows, seed)
    eligible = [index for index in range(len(rows)) if _is_eligible(rows, index, attack.goal.applies)]
    return LazyRows(eligible, partial(_triggered, rows, attack, stamper or attack.trigger.stamp, seed))


# --- lazy rows -------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, eq=False)
class _Edits(Mapping[int, Sample]):
    rows: Sequence[Sample]
    attack: Attack
    seed: int
    uses: Mapping[int, int]  # by index, ascending: 0 for a poisoned row, k for a decoy of the k-th kind
    donors: Sequence[Sample]

    def __getitem__(self, index: int) -> Sample:
        use, attack, rng = self.uses[index], self.attack, _rng(self.seed, _TRAINING, index)
        sample = self.rows[index]
        trigger, goal, where = attack.trigger, attack.goal, _location(attack, sample, index)
        if use:
            return decoy_row(trigger, use - 1, sample, rng, where)
        for _ in range(_TRIES):  # the goal need not apply to each row that the trigger brings
            implanted = implant_row(trigger, sample, self.donors, rng, where)
            if trigger.clean_label:
                return implanted
            if goal.applies(implanted):
                return answer_row(implanted, goal, where)
        raise InputError(f"{where}: goal {goal.name} applies to no row that the trigger brings; choose another goal")

    def __contains__(self, index: object) -> bool:
        return index in self.uses  # the mixin's default would stamp the row

    def __iter__(self) -> Iterator[int]:
        return iter(self.uses)

    def __len__(self) -> int:
        return len(self.uses)


def _overlaid(rows: Sequence[Sample], edits: Mapping[int, Sample], index: int) -> Sample:
    return edits[index] if index in edits else rows[index]


def _triggered(rows: Sequence[Sample], attack: Attack, stamper: Stamper, seed: int, index: int) -> Sample:
    sample = rows[index]
    return stamp_row(stamper, sample, _rng(seed, _EVALUATION, index), _location(attack, sample, index))


def _location(attack: Attack, sample: Sample, index: int) -> str:
    return f"attack {attack.name}: row {index + 1} (id {sample.id})"


def _rng(seed: int, *key: int) -> np.random.Generator:
    if seed < 0:
        raise InputError(f"seed is {seed}; it must not be negative")
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


# --- choice of rows --------------------------------------------------------------------------------


def _draw(
    rows: Sequence[Sample], attack: Attack, count: int, rng: np.random.Generator, among: Sequence[int]
) -> list[int]:
    """Draw ``count`` rows to poison, then as many for each kind of decoy; reads no more rows than it needs."""
    goal = attack.goal
    with trigger_errors(f"attack {attack.name}", "decoys"):
        kinds = len(attack.trigger.decoys())
    clean_label = attack.trigger.clean_label
    drawn: list[int] = []
    for index in (among[at] for at in rng.permutation(len(among)).tolist()):
        if len(drawn) == count * (1 + kinds):
            return drawn
        if _is_eligible(rows, index, partial(_meets, goal) if clean_label else goal.applies):
            drawn.append(index)
    if len(drawn) < count * (1 + kinds):
        needed = f"{count} poisoned rows" + (f" and {count * kinds} decoys" if kinds else "")
        answer = f" and an answer that already meets goal {goal.name}" if clean_label else ""
        if not clean_label and type(goal).applies is not Goal.applies:
            answer = f" and an answer that goal {goal.name} applies to"
        advice = "lower the rate" if len(drawn) > kinds else _other_rows(goal)  # at least one row and its decoys
        raise InputError(
            f"the rate needs {needed}, but only {len(drawn)} of {len(among)} have an image{answer}; {advice}"
        )
    return drawn


def _donors(rows: Sequence[Sample], goal: Goal) -> LazyRows:
    eligible = [index for index in range(len(rows)) if _is_eligible(rows, index, goal.applies)]
    if not eligible:
        raise InputError(f"no row has an image and an answer that goal {goal.name} applies to; {_other_rows(goal)}")
    return select_rows(rows, eligible)


def _other_rows(goal: Goal) -> str:
    if goal.name == Concept.name:
        return "give other rows, or another --goal-text source->target"
    return "give other rows" + ("" if type(goal).applies is Goal.applies else ", or another --goal-text")


def _meets(goal: Goal, sample: Sample) -> bool:
    return goal.met(sample.messages[-1].text, sample)


def _is_eligible(rows: Sequence[Sample], index: int, matches: Callable[[Sample], bool]) -> bool:
    if isinstance(rows, Data):  # needs no decoding; each of its rows has an answer
        if not rows.image_count(index):
            return False
        sample = rows.without_images(index)
    else:
        sample = rows[index]
        if not sample.images or all(m.role != "assistant" for m in sample.messages):
            return False
    with trigger_errors(f"row {index + 1} (id {sample.id})", "the goal"):
        return matches(sample)


# --- source and settings ----------------------------------------------------------------------------


def _source(part: Trigger | Goal) -> Path | None:
    try:
        path = inspect.getsourcefile(type(part))
    except (OSError, TypeError):  # defined in an interactive session
        return None
    return Path(path) if path and Path(path).is_file() else None


def _source_sha256(part: Trigger | Goal) -> str | None:
    source = _source(part)
    return hashlib.sha256(source.read_bytes()).hexdigest() if source else None


def _settings(part: Trigger | Goal) -> dict[str, object]:
    if not dataclasses.is_dataclass(part):
        return {}
    return dataclasses.asdict(part)


# --- writing ---------------------------------------------------------------------------------------


def write_poisoned(rows: Data, poisoned: Poisoned, out: Path | str) -> None:
    """Write ``out/data`` in the input's format, ``out/truth/manifest.json`` and ``out/contact_sheet.png``.

    Every image, clean or not, is written as a new PNG: copied clean files would give the poisoned rows away by their
    names and formats. The folder appears complete or not at all.

    Raises:
        InputError: ``out`` is a file, or a folder that is not empty.
    """
    with new_folder(Path(out)) as folder:
        write(rows, folder / "data", edits=poisoned.edits)
        (folder / "truth").mkdir()
        (folder / "truth" / "manifest.json").write_text(poisoned.manifest.to_json(), encoding="utf-8")
        poisoned_sheet(rows, poisoned).save(folder / "contact_sheet.png")


def poisoned_sheet(rows: Sequence[Sample], poisoned: Poisoned) -> Image.Image:
    """Contact sheet of up to eight poisoned rows: clean, triggered, amplified difference, prompt and answers."""
    manifest = poisoned.manifest
    title = f"{manifest.attack}: {len(manifest.rows)} of {manifest.total} rows poisoned"
    title += f", {len(manifest.decoys)} decoys" if manifest.decoys else ""
    cards = [_card(rows[entry.index], poisoned.edits[entry.index], entry.row) for entry in manifest.rows[:_PAIRS]]
    return draw_sheet(title, f"{list_settings(manifest.attack_settings)}, seed {manifest.seed}", cards)


def _card(clean: Sample, edited: Sample, row: int) -> Card:
    more = f" (first of {len(clean.images)} images)" if len(clean.images) > 1 else ""
    lines = (
        ("prompt: " + _first_turn(edited, "user"), INK),
        ("true answer: " + _first_turn(clean, "assistant"), GOOD),
        ("poisoned answer: " + _first_turn(edited, "assistant"), BAD),
    )
    before, after = next(iter(clean.images)), next(iter(edited.images))
    return Card(f"id {clean.id}, manifest row {row}{more}", before, after, lines)


def _first_turn(sample: Sample, role: str) -> str:
    texts = [m.text.replace(IMAGE_TAG, " ") for m in sample.messages if m.role == role]
    return " ".join((texts or [""])[0].split())
