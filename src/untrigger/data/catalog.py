"""Data for both tasks, in a developer's split and a split that figures are reported on.

`load` gives rows of one of four sets: ``easy-vqa`` and ``scenes-vqa`` (visual questions), ``scenes-captions``
and ``emoji`` (captions). Whatever is tuned is tuned on the split ``dev``; what is reported is measured on
``report``. The two share no image, and neither do ``train`` and ``test`` within each. Seeds of runs and of
triggers are kept apart too: `Split` names them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast, final, get_args

from untrigger.errors import InputError
from untrigger.rows.formats import LAYOUTS
from untrigger.rows.sample import Data, Sample, write
from untrigger.rows.storage import JsonRows, Row

SplitName = Literal["dev", "report"]
Part = Literal["train", "test"]
Task = Literal["vqa", "captions"]

_TASKS: Final[dict[str, Task]] = {
    "easy-vqa": "vqa",
    "scenes-vqa": "vqa",
    "scenes-captions": "captions",
    "emoji": "captions",
}
_SEEDS: Final = 100  # of each split

# What a trigger that is not drawn from a seed is while one tunes: another trigger than the one that is reported.
_DEVELOPERS: Final[dict[str, dict[str, Any]]] = {
    "addsent": {"sentence": "The train to the coast leaves at noon."},
    "badword": {"words": "vq zk jx pw"},
    "blended": {"picture": "rings"},
    "dualkey": {"word": "kindly", "looks_like": "orange star"},
    "ftrojan": {"first_column": 7, "second_row": 1},
    "issba": {"message": "developer"},
    "sig": {"direction": "vertical"},
}
_SEED_OF: Final = {"dualkey": "patch_seed", "vltrojan": "patch_seed", "wanet": "grid_seed"} | dict.fromkeys(
    ("adaptive", "badnets", "trojvlm", "vlood"), "pattern_seed"
)


@final
@dataclass(frozen=True)
class Split:
    """One of the two splits with its own seeds: 100 to 199 are the developer's, 0 to 99 are reported.

    Raises:
        InputError: no such split.
    """

    name: SplitName = "report"

    def __post_init__(self) -> None:
        if self.name not in get_args(SplitName):
            raise InputError(f"split '{self.name}' is unknown; choose dev or report")

    @property
    def trigger_seed(self) -> int:
        """What a trigger's own randomness (its pattern, its words) is drawn from."""
        return self.run_seed(0)

    def run_seed(self, run: int) -> int:
        """The seed of run number ``run``, 0 to 99: which rows are drawn and poisoned, how a model is trained."""
        if not 0 <= run < _SEEDS:
            raise InputError(f"run {run}: a split has the runs 0 to {_SEEDS - 1}; choose one of them")
        return self.seeds[run]

    @property
    def seeds(self) -> range:
        """The seeds of all runs."""
        first = _SEEDS * (self.name == "dev")
        return range(first, first + _SEEDS)

    def trigger_settings(self, attack: str) -> dict[str, Any]:
        """Settings that make the trigger ``attack`` this split's own: none on ``report``, others on ``dev``.

        Shadowcast has no trigger to change, and a trigger file's settings are its author's.
        """
        if self.name == "report":
            return {}
        seed = {_SEED_OF[attack]: self.trigger_seed} if attack in _SEED_OF else {}
        return seed | _DEVELOPERS.get(attack, {})


def names() -> tuple[str, ...]:
    """The data sets that `load` knows."""
    return tuple(_TASKS)


def task_of(name: str) -> Task:
    """What rows of the data set ``name`` ask for: short answers (``vqa``) or ``captions``.

    Raises:
        InputError: no such data set.
    """
    if name not in _TASKS:
        raise InputError(f"data '{name}' is unknown; choose one of: {', '.join(_TASKS)}")
    return _TASKS[name]


def load(
    name: str,
    split: str = "report",
    part: str = "train",
    rows: int = 2000,
    seed: int = 0,
    source: Path | None = None,
) -> list[Sample]:
    """``rows`` rows of the data set ``name``, drawn without replacement; each shows one 64 x 64 RGB image.

    The same arguments give the same rows. Rows of another split or part never show the same image, whatever
    their seeds. Only ``emoji`` reads a ``source`` (`untrigger.data.emoji`); the others need nothing but the
    package and its dependencies.

    Raises:
        InputError: an unknown name, split or part, more rows than there are, or a source that cannot be had.
    """
    task = task_of(name)
    chosen = Split(cast(SplitName, split)).name
    if part not in get_args(Part):
        raise InputError(f"part '{part}' is unknown; choose train or test")
    if rows < 1 or seed < 0:
        raise InputError(f"{rows} rows, seed {seed}: ask for at least one row and a seed that is not negative")
    if source is not None and name != "emoji":
        raise InputError(f"data {name} has no source; leave it out")
    if name == "easy-vqa":
        from untrigger.data.easy_vqa import easy_vqa_rows

        return easy_vqa_rows(part, rows, seed, chosen)
    if name == "emoji":
        from untrigger.data.emoji import emoji_rows

        return emoji_rows(chosen, part, rows, seed, source)
    from untrigger.data.scenes import scene_rows

    return scene_rows(task, chosen, part, rows, seed)


def save(samples: Sequence[Sample], out: Path) -> None:
    """Writes ``samples`` into the new folder ``out``: ``data.jsonl`` (`messages` + `images`) and PNG images.

    Raises:
        InputError: ``out`` is a file or a folder that is not empty, or a sample is no valid row.
    """
    told = LAYOUTS["messages"]
    rows: list[object] = []
    for sample in samples:
        turns = [{told.role: turn.role, told.text: turn.text} for turn in sample.messages]
        images = ["images/row.png"] * len(sample.images)  # a stem: the writer numbers them
        rows.append(cast(Row, {"id": sample.id, told.turns: turns, told.images: images}))
    file = JsonRows("data.jsonl", rows, lines=True)
    data = Data(out / "data.jsonl", "messages", file, range(len(rows)))
    write(data, out, edits=dict(enumerate(samples)), uniform=True)
