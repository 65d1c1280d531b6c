"""Bundled data sets and their splits: ``dev`` for tuning, ``report`` for reported figures.

`load` returns rows of one of five data sets: ``easy-vqa``, ``scenes-vqa``, ``scenes-questions`` (visual questions),
``scenes-captions`` and ``emoji`` (captions). A ``+`` behind a name adds honest trouble (`untrigger.data.trouble`), as
in ``easy-vqa+wrong-labels-5``, or another data set, as in ``easy-vqa+scenes-captions+backwards``: a mixture in equal
parts, the second with backward captions.

Hyperparameters are tuned on ``dev``; figures are measured on ``report``. The two splits share no image, nor do the
parts ``train`` and ``test`` of a split. Each split also has its own run and trigger seeds: see `Split`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, cast, final, get_args

import numpy as np

from untrigger.data.trouble import TRAIN_ONLY, TROUBLES
from untrigger.errors import InputError, did_you_mean
from untrigger.rows.sample import Data, Sample, without_images, write
from untrigger.rows.storage import JsonRows

SplitName = Literal["dev", "report"]
Part = Literal["train", "test"]
Task = Literal["vqa", "captions"]

_TASKS: Final[dict[str, Task]] = {
    "easy-vqa": "vqa",
    "scenes-vqa": "vqa",
    "scenes-questions": "vqa",
    "scenes-captions": "captions",
    "emoji": "captions",
}
_TROUBLE = 7  # with the seed, the stream of random numbers that trouble is drawn from
_SEEDS: Final = 100  # seeds per split

# The settings on ``dev`` of triggers that no seed determines, so that tuning uses other triggers than reporting.
_DEV_SETTINGS: Final[dict[str, dict[str, Any]]] = {
    "addsent": {"sentence": "The train to the coast leaves at noon."},
    "badword": {"words": "vq zk jx pw"},
    "blended": {"picture": "rings"},
    "dualkey": {"word": "kindly", "looks_like": "orange star"},
    "ftrojan": {"first_column": 7, "second_row": 1},
    "issba": {"message": "developer"},
    "sig": {"direction": "vertical"},
}
_SEED_FIELDS: Final = {"dualkey": "patch_seed", "vltrojan": "patch_seed", "wanet": "grid_seed"} | dict.fromkeys(
    ("adaptive", "badnets", "trojvlm", "vlood"), "pattern_seed"
)


@final
@dataclass(frozen=True)
class Split:
    """A split and its seeds: ``dev`` has 100 to 199, ``report`` has 0 to 99.

    Raises:
        InputError: the split is unknown.
    """

    name: SplitName = "report"

    def __post_init__(self) -> None:
        if self.name not in get_args(SplitName):
            raise InputError(f"split '{self.name}' is unknown; choose dev or report")

    @property
    def trigger_seed(self) -> int:
        """The seed of the trigger itself: of its pattern or its words."""
        return self.run_seed(0)

    def run_seed(self, run: int) -> int:
        """Return the seed of run ``run``, 0 to 99. It decides the rows, which of them are poisoned, and the training.

        Raises:
            InputError: ``run`` is out of range.
        """
        if not 0 <= run < _SEEDS:
            raise InputError(f"run {run} is out of range; choose 0 to {_SEEDS - 1}")
        return self.seeds[run]

    @property
    def seeds(self) -> range:
        """The seeds of all runs."""
        first = _SEEDS * (self.name == "dev")
        return range(first, first + _SEEDS)

    def trigger_settings(self, attack: str) -> dict[str, Any]:
        """Return the settings of ``attack`` on this split: none on ``report``, a different trigger on ``dev``.

        Shadowcast has no trigger to change. The settings of a trigger file are left to its author.
        """
        if self.name == "report":
            return {}
        seed = {_SEED_FIELDS[attack]: self.trigger_seed} if attack in _SEED_FIELDS else {}
        return seed | _DEV_SETTINGS.get(attack, {})


def names() -> tuple[str, ...]:
    """Return the names of the bundled data sets, without trouble."""
    return tuple(_TASKS)


def task_of(name: str) -> Task:
    """Return the task of a data set: ``vqa`` (short answers) or ``captions``; of a mixture that of its first part.

    Raises:
        InputError: the data set is unknown.
    """
    return _TASKS[parts_of(name)[0].base]


class MixturePart(NamedTuple):
    """One data set of a name, and the troubles behind it in order."""

    base: str
    troubles: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The part's own name, ``scenes-captions+backwards``."""
        return "+".join((self.base, *self.troubles))


def parts_of(name: str) -> list[MixturePart]:
    """Split a name at each ``+``: one part for each data set.

    Raises:
        InputError: a data set or a trouble is unknown, the name begins with a trouble, or two parts are the same.
    """
    parts: list[MixturePart] = []
    for word in name.split("+"):
        if word in _TASKS:
            parts.append(MixturePart(word))
        elif word in TROUBLES and parts:
            parts[-1] = MixturePart(parts[-1].base, (*parts[-1].troubles, word))
        else:
            known = [*_TASKS, *(TROUBLES if parts else ())]
            hint = did_you_mean(word, known)
            raise InputError(f"data '{word}' is unknown; choose one of: {', '.join(known)}{hint}")
    if len(set(parts)) < len(parts):
        raise InputError(f"data '{name}': the same part comes twice; name it once")
    return parts


def rows_of_part(rows: Sequence[Sample], part: str) -> list[int]:
    """Return the indices of the rows of one part of a mixture, from 0: those whose id begins with ``PART/``.

    Raises:
        InputError: there are none.
    """
    indices = [index for index in range(len(rows)) if without_images(rows, index).id.startswith(f"{part}/")]
    if not indices:
        raise InputError(f"part '{part}': no row has an id that begins with {part}/; name a part of the mixture")
    return indices


def load(
    name: str,
    split: str = "report",
    part: str = "train",
    rows: int = 2000,
    seed: int = 0,
    source: Path | None = None,
) -> list[Sample]:
    """Load rows of a bundled data set, drawn without replacement; each row has one 64 x 64 RGB image.

    A mixture has equally many rows of each part, the first parts one more where the number is odd, in random order. The
    ids of its rows begin with ``PART/`` (`rows_of_part`).

    The same arguments give the same rows. Different splits or parts never share an image, whatever their seeds.

    Args:
        name: one of `names`, alone or with trouble or other data sets behind it (`parts_of`).
        split: ``dev`` or ``report``.
        part: ``train`` or ``test``.
        rows: how many rows to draw.
        seed: which rows are drawn, and in which order.
        source: for ``emoji`` only, the package file or folder (`untrigger.data.emoji`); downloaded by default.

    Raises:
        InputError: the name, split or part is unknown, the data set has fewer rows, or the source cannot be read.
    """
    parts = parts_of(name)
    split_name = Split(cast(SplitName, split)).name
    if part not in get_args(Part):
        raise InputError(f"part '{part}' is unknown; choose train or test")
    if rows < 1 or seed < 0:
        raise InputError(f"rows is {rows}, seed is {seed}; give at least one row and a seed that is not negative")
    if source is not None and all(each.base != "emoji" for each in parts):
        raise InputError(f"data {name} has no source; leave the source out")
    if len(parts) > rows:
        raise InputError(f"data {name}: {rows} rows are too few for {len(parts)} parts; ask for more")
    counts = [(rows + len(parts) - 1 - number) // len(parts) for number in range(len(parts))]
    loaded = [_part(each, split_name, part, count, seed, source) for each, count in zip(parts, counts, strict=True)]
    if len(parts) == 1:
        return loaded[0]
    mixed = [replace(row, id=f"{each.name}/{row.id}") for each, own in zip(parts, loaded, strict=True) for row in own]
    return [mixed[index] for index in map(int, np.random.default_rng(seed).permutation(len(mixed)))]


def _part(
    mixture_part: MixturePart, split: SplitName, part: str, rows: int, seed: int, source: Path | None
) -> list[Sample]:
    """The rows of one data set with its troubles, which the split and the part decide too."""
    result = _base(mixture_part.base, split, part, rows, seed, source)
    for number, trouble in enumerate(mixture_part.troubles):
        if part == "train" or trouble not in TRAIN_ONLY:
            streams = (seed, _TROUBLE, number, split == "dev", part == "test")
            result = TROUBLES[trouble](result, np.random.default_rng(streams))
    return result


def _base(name: str, split: SplitName, part: str, rows: int, seed: int, source: Path | None) -> list[Sample]:
    if name == "easy-vqa":
        from untrigger.data.easy_vqa import easy_vqa_rows

        return easy_vqa_rows(part, rows, seed, split)
    if name == "emoji":
        from untrigger.data.emoji import emoji_rows

        return emoji_rows(split, part, rows, seed, source)
    from untrigger.data.scenes import scene_rows

    return scene_rows(name.removeprefix("scenes-"), split, part, rows, seed)


def save(rows: Sequence[Sample], out: Path) -> None:
    """Write rows into the new folder ``out``: ``data.jsonl`` (`messages` + `images`) and PNG images.

    Raises:
        InputError: ``out`` is a file or a folder with content, or a sample is no valid row.
    """
    records: list[object] = []
    for sample in rows:
        turns = [{"role": turn.role, "content": turn.text} for turn in sample.messages]
        images = ["images/0.png"] * len(sample.images)  # says only that they are files: the writer names them
        records.append({"id": sample.id, "messages": turns, "images": images})
    data = Data(out / "data.jsonl", JsonRows("data.jsonl", records, lines=True), range(len(records)))
    write(data, out, edits=dict(enumerate(rows)))
