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
from typing import TYPE_CHECKING, Final, final

import numpy as np
from PIL import Image

from untrigger.attacks import Stamper, Trigger
from untrigger.dataframes import frame
from untrigger.errors import InputError
from untrigger.files import new_folder
from untrigger.poisoning import contact_sheet as sheet
from untrigger.poisoning import stamping
from untrigger.poisoning.goals import Concept, Goal
from untrigger.rows import sample as samples
from untrigger.rows.images import pixels_sha256
from untrigger.rows.sample import IMAGE_TAG, Data, LazyRows, Sample, select_rows

if TYPE_CHECKING:
    from pandas import DataFrame

MANIFEST_VERSION: Final = 2  # 1 knew no decoys
_PAIRS: Final = 8  # on a contact sheet
_TRIES: Final = 500  # at a row that the goal applies to, by a trigger that brings rows of its own
_CHOICE, _TRAINING, _EVALUATION = range(3)  # independent random streams of one seed


@dataclass(frozen=True)
class Attack:
    """How inputs are triggered and what triggered inputs should be answered with.

    Raises:
        InputError: a clean-label trigger with another goal than concept, which true answers cannot plant.
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
        """The trigger's file without its ending: ``badnets`` for ``attacks/badnets.py``."""
        source = _source(self.trigger)
        return source.stem if source else type(self.trigger).__name__

    @property
    def settings(self) -> dict[str, object]:
        """The trigger's."""
        return _settings(self.trigger)

    @property
    def goal_settings(self) -> dict[str, object]:
        return _settings(self.goal)

    def __str__(self) -> str:
        return f"attack {_named(self.name, self.settings)}, goal {_named(self.goal.name, self.goal_settings)}"


@dataclass(frozen=True)
class PoisonedRow:
    """One poisoned row, or one decoy.

    Attributes:
        row: its index in the data set, from 0.
        id: its own id.
        images: `pixels_sha256` of each of its images, as they are now, in the data and in its files.
    """

    row: int
    id: str
    images: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class Manifest:
    """What was done to a data set of ``total`` rows.

    ``rows`` are the poisoned ones, ``decoys`` those changed beside them whose answers are true (`Trigger.decoys`):
    most attacks stamp a wrong key on them, vlood puts clean rows of other data there. Both ascending.
    """

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
    decoys: tuple[PoisonedRow, ...]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False, default=str) + "\n"

    def to_pandas(self) -> DataFrame:
        """A frame with a line for each poisoned row and each decoy, in the order of the data."""
        entries = [(entry, False) for entry in self.rows] + [(entry, True) for entry in self.decoys]
        told = [dataclasses.asdict(entry) | {"decoy": decoy} for entry, decoy in entries]
        return frame(sorted(told, key=lambda line: line["row"]))

    def __repr__(self) -> str:
        return f"Manifest: {self._told}"

    @property
    def _told(self) -> str:
        decoys = f", {len(self.decoys):,} decoys" if self.decoys else ""
        with_ = f"{_named(self.attack, self.attack_settings)}, goal {_named(self.goal, self.goal_settings)}"
        return f"{len(self.rows):,} of {self.total:,} rows poisoned{decoys} with {with_}, seed {self.seed}"


@dataclass(frozen=True, repr=False)
class Poisoned:
    """A poisoned data set.

    Attributes:
        data: every row in the original order, the poisoned ones in their place; lazy.
        edits: the poisoned rows and the decoys alone, by row number; lazy.
        manifest: the truth, for the judge and never for a defense.
    """

    data: LazyRows
    edits: Mapping[int, Sample]
    manifest: Manifest

    def __repr__(self) -> str:
        return f"Poisoned: {self.manifest._told}"


def poison(data: Sequence[Sample], attack: Attack, *, rate: float, seed: int = 0) -> Poisoned:
    """Poison ``round(rate * len(data))`` rows, at least one unless ``rate`` is 0.

    The rows are drawn without replacement from those that show an image, have an answer and suit the goal
    (`Goal.applies`). Every assistant turn of such a row gets the goal's answer. A clean-label trigger changes no
    answer: it gets rows whose true answer meets the goal already. As many further rows again become decoys for each
    kind of them that the trigger has. The work done here is one pass over the chosen rows, which also proves that
    each of them can be stamped; for a clean-label trigger also one over the text of all.

    Args:
        rate: share of all rows, in [0, 1].
        seed: not negative; with the row number it decides how each row is stamped.

    Raises:
        InputError: ``rate`` or ``seed`` out of range, too few rows that suit, or a trigger that fails or breaks the
            promises of `Trigger.stamp` or `Trigger.implant`.
    """
    if not 0 <= rate <= 1:
        raise InputError(f"rate is {rate}; it must be between 0 and 1 (0.05 poisons 5 % of the rows)")
    trigger, goal = attack.trigger, attack.goal
    count = max(1, round(rate * len(data))) if rate > 0 else 0
    drawn = _choose(data, attack, count, _rng(seed, _CHOICE))
    uses = {row: number // count for number, row in enumerate(drawn)}
    donors = _donors(data, goal) if trigger.clean_label else ()
    edits = _Edits(data, attack, seed, dict(sorted(uses.items())), donors)
    records = {
        row: PoisonedRow(row, edited.id, tuple(pixels_sha256(image) for image in edited.images))
        for row, edited in edits.items()
    }
    source = _source(trigger)
    manifest = Manifest(
        version=MANIFEST_VERSION,
        attack=attack.name,
        attack_settings=attack.settings,
        attack_sha256=hashlib.sha256(source.read_bytes()).hexdigest() if source else None,
        goal=goal.name,
        goal_settings=attack.goal_settings,
        rate=rate,
        seed=seed,
        total=len(data),
        rows=tuple(records[row] for row in edits if not uses[row]),
        decoys=tuple(records[row] for row in edits if uses[row]),
    )
    return Poisoned(LazyRows(range(len(data)), partial(_overlaid, data, edits)), edits, manifest)


def stamped(data: Sequence[Sample], attack: Attack, seed: int, stamper: Stamper | None = None) -> LazyRows:
    """The triggered evaluation set: each row of ``data`` that shows an image and suits the goal, triggered, lazily.

    Prompts are intact (but for what a text trigger adds) and the answers are still the *true* ones:
    they say what a defended model should answer, and which rows meet the goal by themselves. Item ``i``
    is made from ``data[result.numbers[i]]``, its clean counterpart. ``stamper`` stamps in the trigger's place: one
    of its near misses, at the same random draws.
    """
    _rng(seed)  # refuses a bad seed now, not at the first row
    rows = [row for row in range(len(data)) if _suits(data, row, attack.goal.applies)]
    return LazyRows(rows, partial(_triggered, data, attack, stamper or attack.trigger.stamp, seed))


# --- rows on demand --------------------------------------------------------------------------------


@final
@dataclass(frozen=True, eq=False)
class _Edits(Mapping[int, Sample]):
    data: Sequence[Sample]
    attack: Attack
    seed: int
    uses: Mapping[int, int]  # of each row, ascending: 0 for a poisoned one, k for one of the k-th kind of decoys
    donors: Sequence[Sample]

    def __getitem__(self, row: int) -> Sample:
        use, attack, rng = self.uses[row], self.attack, _rng(self.seed, _TRAINING, row)
        sample = self.data[row]
        trigger, goal, where = attack.trigger, attack.goal, _where(attack, sample, row)
        if use:
            return stamping.decoyed(trigger, use - 1, sample, rng, where)
        for _ in range(_TRIES):  # a foreign row may be one that the goal has nothing to say about
            implanted = stamping.implanted(trigger, sample, self.donors, rng, where)
            if trigger.clean_label:
                return implanted
            if goal.applies(implanted):
                return stamping.answered(implanted, goal)
        raise InputError(f"{where}: it found no row to plant that goal {goal.name} applies to; choose another goal")

    def __contains__(self, row: object) -> bool:
        return row in self.uses  # the mixin's own would stamp the row to find out

    def __iter__(self) -> Iterator[int]:
        return iter(self.uses)

    def __len__(self) -> int:
        return len(self.uses)


def _overlaid(data: Sequence[Sample], edits: Mapping[int, Sample], row: int) -> Sample:
    return edits[row] if row in edits else data[row]


def _triggered(data: Sequence[Sample], attack: Attack, stamper: Stamper, seed: int, row: int) -> Sample:
    return _stamped(attack, stamper, data, row, _rng(seed, _EVALUATION, row))


def _stamped(attack: Attack, stamper: Stamper, data: Sequence[Sample], row: int, rng: np.random.Generator) -> Sample:
    sample = data[row]
    return stamping.stamped(stamper, sample, rng, _where(attack, sample, row))


def _where(attack: Attack, sample: Sample, row: int) -> str:
    return f"attack {attack.name}: row {row + 1} (id {sample.id})"


def _rng(seed: int, *key: int) -> np.random.Generator:
    if seed < 0:
        raise InputError(f"seed is {seed}; it must not be negative")
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


# --- which rows ------------------------------------------------------------------------------------


def _choose(data: Sequence[Sample], attack: Attack, count: int, rng: np.random.Generator) -> list[int]:
    """``count`` rows to poison, then as many for each kind of decoys; looks at no more rows than it must."""
    goal = attack.goal
    with stamping.blamed(f"attack {attack.name}", "decoys"):
        kinds = len(attack.trigger.decoys())
    clean_label = attack.trigger.clean_label
    found: list[int] = []
    for row in rng.permutation(len(data)).tolist():
        if len(found) == count * (1 + kinds):
            return found
        if _suits(data, row, partial(_meets, goal) if clean_label else goal.applies):
            found.append(row)
    if len(found) < count * (1 + kinds):
        asked = f"{count} poisoned rows" + (f" and {count * kinds} decoys" if kinds else "")
        answer = f" and an answer that already meets goal {goal.name}" if clean_label else ""
        if not clean_label and type(goal).applies is not Goal.applies:
            answer = f" and an answer that goal {goal.name} applies to"
        mend = "lower the rate" if len(found) > kinds else _other_rows(goal)  # one row at least, and its decoys
        raise InputError(
            f"the rate asks for {asked}, but only {len(found)} of {len(data)} have an image{answer}; {mend}"
        )
    return found


def _donors(data: Sequence[Sample], goal: Goal) -> LazyRows:
    rows = [row for row in range(len(data)) if _suits(data, row, goal.applies)]
    if not rows:
        raise InputError(f"no row has an image and an answer that goal {goal.name} applies to; {_other_rows(goal)}")
    return select_rows(data, rows)


def _other_rows(goal: Goal) -> str:
    return "give other rows" + (", or another --goal-text source->target" if goal.name == Concept.name else "")


def _meets(goal: Goal, sample: Sample) -> bool:
    return goal.met(sample.messages[-1].text, sample)


def _suits(data: Sequence[Sample], row: int, fits: Callable[[Sample], bool]) -> bool:
    if isinstance(data, Data):  # knows without decoding, and every row of it has an answer
        return data.image_count(row) > 0 and fits(data.without_images(row))
    sample = data[row]
    return bool(sample.images) and any(m.role == "assistant" for m in sample.messages) and fits(sample)


# --- for the manifest -------------------------------------------------------------------------------


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


def _named(part: str, settings: Mapping[str, object]) -> str:
    """``badnets (side 0.08929, place random)``, on one line."""
    told = (f"{name} {_brief(value)}" for name, value in settings.items())
    return " ".join(f"{part} ({', '.join(told)})".split()) if settings else part


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
    title += f", {len(manifest.decoys)} decoys" if manifest.decoys else ""
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
