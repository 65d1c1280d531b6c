"""The manifest: which rows were poisoned, and how."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from untrigger.dataframes import frame

if TYPE_CHECKING:
    from pandas import DataFrame

MANIFEST_VERSION: Final = 4  # 1 had no decoys; 1 and 2 counted rows from 0; 1 to 3 had no goal_sha256


@dataclass(frozen=True)
class PoisonedRow:
    """One poisoned row, or one decoy.

    Attributes:
        row: its number in the data set, from 1.
        id: its own id.
        images: `pixels_sha256` of each of its images as poisoned, in the data and in its files.
    """

    row: int
    id: str
    images: tuple[str, ...]

    @property
    def index(self) -> int:
        """Its position in a sequence of the rows, from 0."""
        return self.row - 1


@dataclass(frozen=True, repr=False)
class Manifest:
    """What was done to a data set of ``total`` rows.

    ``rows`` are the poisoned rows, ``decoys`` the rows that were changed beside them and keep true answers
    (`Trigger.decoys`). Most attacks stamp a wrong key on decoys; vlood puts clean rows of other data there. Both are in
    ascending order. ``attack_sha256`` and ``goal_sha256`` are those of the files that define the trigger and the goal.
    """

    version: int
    attack: str
    attack_settings: Mapping[str, object]
    attack_sha256: str | None
    goal: str
    goal_settings: Mapping[str, object]
    goal_sha256: str | None
    rate: float
    seed: int
    total: int
    rows: tuple[PoisonedRow, ...]
    decoys: tuple[PoisonedRow, ...]

    def to_json(self) -> str:
        """The text of ``manifest.json``."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False, default=str) + "\n"

    def to_pandas(self) -> DataFrame:
        """A frame with a line for each poisoned row and each decoy, in the order of the data."""
        entries = [(entry, False) for entry in self.rows] + [(entry, True) for entry in self.decoys]
        lines = [dataclasses.asdict(entry) | {"decoy": decoy} for entry, decoy in entries]
        return frame(sorted(lines, key=lambda line: line["row"]))

    @property
    def summary(self) -> str:
        """One line: counts, attack, goal and seed."""
        decoys = f", {len(self.decoys):,} decoys" if self.decoys else ""
        attack, goal = describe(self.attack, self.attack_settings), describe(self.goal, self.goal_settings)
        return (
            f"{len(self.rows):,} of {self.total:,} rows poisoned{decoys} with {attack}, goal {goal}, seed {self.seed}"
        )

    def __repr__(self) -> str:
        return f"Manifest: {self.summary}"


def describe(name: str, settings: Mapping[str, object]) -> str:
    """``badnets (side 0.08929, place random)``, on one line."""
    return " ".join(f"{name} ({list_settings(settings)})".split()) if settings else name


def list_settings(settings: Mapping[str, object]) -> str:
    """``side 0.08929, place random``."""
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in settings.items()
    )
