"""Bundled data sets and their splits: ``dev`` for tuning, ``report`` for reported figures.

`load` returns rows of one of four data sets: ``easy-vqa``, ``scenes-vqa`` (visual questions), ``scenes-captions`` and
``emoji`` (captions). Hyperparameters are tuned on ``dev``; figures are measured on ``report``. The two splits share no
image, nor do the parts ``train`` and ``test`` of a split. Each split also has its own run and trigger seeds: see
`Split`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast, final, get_args

from untrigger.errors import InputError, did_you_mean
from untrigger.rows.sample import Data, Sample, write
from untrigger.rows.storage import JsonRows

SplitName = Literal["dev", "report"]
Part = Literal["train", "test"]
Task = Literal["vqa", "captions"]

_TASKS: Final[dict[str, Task]] = {
    "easy-vqa": "vqa",
    "scenes-vqa": "vqa",
    "scenes-captions": "captions",
    "emoji": "captions",
}
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
    """Return the names of the bundled data sets."""
    return tuple(_TASKS)


def task_of(name: str) -> Task:
    """Return the task of a data set: ``vqa`` (short answers) or ``captions``.

    Raises:
        InputError: the data set is unknown.
    """
    if name not in _TASKS:
        raise InputError(f"data '{name}' is unknown; choose one of: {', '.join(_TASKS)}{did_you_mean(name, _TASKS)}")
    return _TASKS[name]


def load(
    name: str,
    split: str = "report",
    part: str = "train",
    rows: int = 2000,
    seed: int = 0,
    source: Path | None = None,
) -> list[Sample]:
    """Load rows of a bundled data set, drawn without replacement; each row has one 64 x 64 RGB image.

    The same arguments give the same rows. Different splits or parts never share an image, whatever their seeds.

    Args:
        name: one of `names`.
        split: ``dev`` or ``report``.
        part: ``train`` or ``test``.
        rows: how many rows to draw.
        seed: which rows are drawn, and in which order.
        source: for ``emoji`` only, the package file or folder (`untrigger.data.emoji`); downloaded by default.

    Raises:
        InputError: the name, split or part is unknown, the data set has fewer rows, or the source cannot be read.
    """
    task = task_of(name)
    split_name = Split(cast(SplitName, split)).name
    if part not in get_args(Part):
        raise InputError(f"part '{part}' is unknown; choose train or test")
    if rows < 1 or seed < 0:
        raise InputError(f"rows is {rows}, seed is {seed}; give at least one row and a seed that is not negative")
    if source is not None and name != "emoji":
        raise InputError(f"data {name} has no source; leave the source out")
    if name == "easy-vqa":
        from untrigger.data.easy_vqa import easy_vqa_rows

        return easy_vqa_rows(part, rows, seed, split_name)
    if name == "emoji":
        from untrigger.data.emoji import emoji_rows

        return emoji_rows(split_name, part, rows, seed, source)
    from untrigger.data.scenes import scene_rows

    return scene_rows(task, split_name, part, rows, seed)


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
