"""Store results on disk: a folder for each cell, or a line of a JSONL file.

A cell's folder has ``cell.json`` with every setting, ``answers.jsonl`` with each answer of the model and
``metrics.json`` with the figures. Each file is written atomically, ``metrics.json`` last: a cell is finished if it has
that file. A failed cell has ``error.txt``, one line, and is run again the next time.

``untrigger report results/paper --out results/paper.jsonl`` packs settings and figures of all cells: a line a cell,
``{"cell": {...}, "metrics": {...}}``, sorted by name. Readers take either path. A cell in the file beside a folder
counts as finished; if the folder holds the same cell, the folder's is newer and is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

from untrigger.data import USUAL_METRIC, Split, SplitName, Task, own_data, task_of
from untrigger.errors import InputError
from untrigger.files import file_errors, write_text
from untrigger.metrics.score import Answer, as_row

ORACLE: Final = "oracle"  # a cell's defense: plain training without the poisoned rows and the decoys
_KINDS: Mapping[Any, str] = {
    str: "a text",
    str | None: "a text",
    int: "a whole number",
    int | float: "a number",
    Mapping: "lines of 'name: value'",
}
_CELL, _ANSWERS, _METRICS, _ERROR = "cell.json", "answers.jsonl", "metrics.json", "error.txt"
_PACKED: Final = ".jsonl"
_LATER: Final = frozenset(
    {"poisoned_part", "own_data", "arguments"}
)  # fields younger than the packed results: written where they are set


def _no_settings() -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True)
class Cell:
    """All settings of one experiment. The same cell gives the same answers again on the same machine.

    Attributes:
        model: name of an embedded model, folder or hub id.
        data: name of a data set (``untrigger.data``), also of one with trouble or of a mixture; or the plan's name for
            data of the user's own.
        own_data: its files, task and metric (`untrigger.data.own_data`), with paths as the plan gives them, from the
            folder where the command runs; empty for bundled data.
        poisoned_part: the part of a mixture that the attacker reaches: its rows alone are poisoned, ``rate`` is a share
            of them, and the attack is measured on them. Empty for all.
        attack: name of a trigger, or path of a trigger file.
        goal: name of a goal; ``goal_text`` replaces the attacker's text of that goal.
        rate: share of the training rows that is poisoned, in [0, 1].
        defense: name of a preset (``untrigger.defenses.PRESETS``), or ``oracle``.
        split: ``dev``, for tuning, or ``report``; each has its own seeds (`untrigger.data.Split`).
        attack_settings, defense_settings: changed fields of the trigger and of the defense.
        probes: further attacks on which the trained model is evaluated: name -> ``attack``, ``goal`` and
            ``settings``. The model was not trained on them.
        clean_rows: rows known to be clean, for the defenses that need some.
        epochs, batch_size, learning_rate: of the fine-tuning; all else is `untrigger.training.settings.DEFAULTS`.
        precision: ``fp32``, or ``bf16`` for training in mixed precision.
        tuning: changed fields of `untrigger.training.tuning.Tuning`.
        arguments: further fields of ``transformers.TrainingArguments``.
    """

    model: str
    data: str
    attack: str
    goal: str
    rate: float = 0.05
    defense: str = "plain"
    seed: int = 0
    split: SplitName = "report"
    attack_settings: Mapping[str, Any] = field(default_factory=_no_settings)
    goal_text: str | None = None
    defense_settings: Mapping[str, Any] = field(default_factory=_no_settings)
    probes: Mapping[str, Mapping[str, Any]] = field(default_factory=_no_settings)
    train_rows: int = 2000
    test_rows: int = 300
    clean_rows: int = 64
    epochs: float = 3.0
    batch_size: int = 16
    learning_rate: float = 3e-3
    precision: str = "fp32"
    tuning: Mapping[str, Any] = field(default_factory=_no_settings)
    poisoned_part: str = ""
    own_data: Mapping[str, str] = field(default_factory=_no_settings)
    arguments: Mapping[str, Any] = field(default_factory=_no_settings)

    def __post_init__(self) -> None:
        for f in fields(self):
            kind, value = _kind(f), getattr(self, f.name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise InputError(f"{f.name} is {value!r}; it must be {_KINDS[kind]}")
        if self.precision not in ("fp32", "bf16"):
            raise InputError(f"precision is {self.precision!r}; it must be fp32 or bf16")
        for name in ("rate", "epochs", "learning_rate"):  # 2 epochs and 2.0 are the same cell
            object.__setattr__(self, name, float(getattr(self, name)))
        if self.own_data:
            object.__setattr__(self, "own_data", own_data(self.own_data))
        seeds = Split(self.split).seeds
        if self.seed not in seeds:
            raise InputError(f"seed {self.seed}: the split {self.split} has the seeds {seeds[0]} to {seeds[-1]}")

    @property
    def task(self) -> Task:
        """The task of the data.

        Raises:
            InputError: the data set is unknown.
        """
        return cast(Task, self.own_data["task"]) if self.own_data else task_of(self.data)

    @property
    def metric(self) -> str:
        """The figure of quality: the accuracy of VQA, or a caption score; named as in ``metrics.json``."""
        return self.own_data["metric"] if self.own_data else USUAL_METRIC[self.task]

    @property
    def changed(self) -> dict[str, Any]:
        """The fields that differ from their defaults, in order."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != _default(f)}

    @property
    def name(self) -> str:
        """A readable name with a hash of the settings: ``llava_easy-vqa_badnets_fixed_0.05_plain_seed0_1a2b3c4d``.

        The hash leaves out fields at their defaults, so stored results keep their names when a field is added.
        """
        text = json.dumps(self.changed, sort_keys=True, ensure_ascii=False)
        parts = (self.model, self.data, self.attack, self.goal, f"{self.rate:g}", self.defense, f"seed{self.seed}")
        return "_".join([*map(_short, parts), hashlib.sha256(text.encode()).hexdigest()[:8]])

    @property
    def training(self) -> str:
        """A key that is equal for cells that differ only in their attack and their defense."""
        ignored: dict[str, Any] = {"attack_settings": {}, "goal_text": None, "defense_settings": {}, "probes": {}}
        return replace(self, attack="", goal="", defense="", **ignored).name


class Result(NamedTuple):
    """A finished cell and its figures."""

    cell: Cell
    metrics: dict[str, Any]


def folder_of(root: Path, cell: Cell) -> Path:
    """The folder of a cell's files; it need not exist."""
    return root / cell.name


def save(root: Path, cell: Cell, metrics: Mapping[str, Any], answers: Mapping[str, Sequence[Answer]]) -> None:
    """Store a finished cell. ``answers`` maps a condition (clean, triggered, ...) to its answers."""
    folder = folder_of(root, cell)
    rows = ({"condition": name, **as_row(answer)} for name, part in answers.items() for answer in part)
    # a kill must not leave the files of two runs that look finished
    (folder / _METRICS).unlink(missing_ok=True)
    write_text(folder / _ANSWERS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_text(folder / _CELL, json.dumps(asdict(cell), indent=2, ensure_ascii=False) + "\n")
    write_text(folder / _METRICS, json.dumps(metrics, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    (folder / _ERROR).unlink(missing_ok=True)


def find(root: Path, cell: Cell) -> dict[str, Any] | None:
    """The figures of a cell; None if it is not finished, or if the defaults have changed since it was run.

    Args:
        root: a folder of cells, a JSONL file of packed cells, or a folder with such a file beside it.

    Raises:
        InputError: the stored cell, or a line of the file, cannot be read.
    """
    folder = folder_of(root, cell)
    if (folder / _METRICS).is_file():
        stored = _read(folder)
    elif line := _lines(root).get(cell.name):
        stored = line.result
    else:
        return None
    return stored.metrics if stored.cell == cell else None


def missing(root: Path, cells: Iterable[Cell]) -> list[Cell]:
    """The cells that are not finished, without duplicates, in order; ``root`` as for `find`."""
    return [cell for cell in {cell.name: cell for cell in cells}.values() if find(root, cell) is None]


def results(root: Path) -> list[Result]:
    """Every finished cell in ``root`` (as for `find`), sorted by name.

    Raises:
        InputError: a stored cell cannot be read.
    """
    cells = {name: line.result for name, line in _lines(root).items()}
    cells |= {path.parent.name: _read(path.parent) for path in root.glob(f"*/{_METRICS}")}
    return [cells[name] for name in sorted(cells)]


def packed_text(roots: Iterable[Path]) -> str:
    """The cells of all ``roots`` (as for `find`) as lines of one JSONL file: settings and figures, without answers.

    Raises:
        InputError: a stored cell cannot be read.
    """
    cells = {result.cell.name: result for root in roots for result in results(root)}
    return "".join(_line(cells[name]) for name in sorted(cells))


def packed(root: Path) -> Path:
    """The path of the JSONL file beside a folder of cells; a JSONL path itself is returned. It need not exist."""
    if root.suffix == _PACKED:
        return root
    root = root if root.name not in ("", "..") else root.resolve()
    return root.parent / f"{root.name}{_PACKED}"


def place_of(root: Path, cell: Cell) -> tuple[str, str]:
    """For error messages: where a finished cell is stored, and what to delete so that it runs again."""
    folder = folder_of(root, cell)
    if (folder / _METRICS).is_file():
        return f"{folder}: {_METRICS}", "delete the folder"
    return f"{packed(root)}: line {_lines(root)[cell.name].number}", "delete the line"


def answers_of(root: Path, cell: Cell) -> dict[str, list[Answer]]:
    """The stored answers of a finished cell by condition. The figures can be computed again from them.

    Raises:
        InputError: the answers are missing (a fresh clone has only figures) or cannot be read.
    """
    path, by_condition = folder_of(root, cell) / _ANSWERS, defaultdict[str, list[Answer]](list)
    try:
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:  # splitlines() would also split at U+2028
            row = json.loads(line)
            by_condition[row.pop("condition")].append(Answer(**row))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__}); run the cell again") from error
    return dict(by_condition)


def record_failure(root: Path, cell: Cell, reason: str) -> str:
    """Record in one line why a cell failed. Returns the line, even if the disk is full and it cannot be written."""
    line = " ".join(reason.split())
    try:
        write_text(folder_of(root, cell) / _ERROR, line + "\n")
    except InputError as error:
        line = f"{line}; {error}"
    return line


def failure(root: Path, cell: Cell) -> str | None:
    """Why the last run of a cell failed; None if it did not."""
    path = folder_of(root, cell) / _ERROR
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def clear_failure(root: Path, cell: Cell) -> None:
    """Delete the record of a failure before the cell runs again."""
    (folder_of(root, cell) / _ERROR).unlink(missing_ok=True)


def _read(folder: Path) -> Result:
    try:
        cell, metrics = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (_CELL, _METRICS))
        return _result(cell, metrics)
    except (OSError, ValueError, TypeError, InputError) as error:
        raise InputError(f"{folder}: is not a stored cell ({error}); delete it, and the cell runs again") from error


def _result(cell: Any, metrics: Any) -> Result:
    if not isinstance(metrics, dict):
        raise ValueError("metrics must be a mapping")
    return Result(Cell(**cell), metrics)


class _Line(NamedTuple):
    number: int  # from 1
    result: Result


def _line(result: Result) -> str:
    unset = [f.name for f in fields(Cell) if f.name in _LATER and getattr(result.cell, f.name) == _default(f)]
    cell = {name: value for name, value in asdict(result.cell).items() if name not in unset}
    entry = {"cell": cell, "metrics": result.metrics}
    return json.dumps(entry, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"


def _lines(root: Path) -> Mapping[str, _Line]:
    """The packed cells of ``root`` by name; empty if there is no file."""
    file = packed(root)
    if not file.is_file():
        return {}
    with file_errors(file, "read"):
        state = file.stat()
        return _parsed(os.path.abspath(file), state.st_mtime_ns, state.st_size, str(file))


@lru_cache(maxsize=32)  # the cells of a plan are looked up one by one
def _parsed(path: str, _changed: int, _size: int, label: str) -> Mapping[str, _Line]:
    lines: dict[str, _Line] = {}
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{label}: line {number}"
        try:
            entry = json.loads(line)
            result = _result(entry["cell"], entry["metrics"])
        except (ValueError, TypeError, KeyError, InputError) as error:
            raise InputError(
                f"{where}: is not a stored cell ({error}); delete the line, and the cell runs again"
            ) from error
        if twin := lines.get(name := result.cell.name):
            raise InputError(f"{where}: holds the same cell as line {twin.number}; delete one of them")
        lines[name] = _Line(number, result)
    return lines


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not MISSING else f.default


def _kind(f: dataclasses.Field[Any]) -> Any:
    """The type that a value of this field must have; YAML and stored files may hold anything."""
    default = _default(f)
    if isinstance(default, float):
        return int | float
    if f.name == "goal_text":
        return str | None
    return str if default is MISSING else Mapping if isinstance(default, Mapping) else type(default)


def _short(part: str) -> str:
    """A part of a folder's name: the last part of a path, without the suffix of a trigger file.

    Only ASCII: 40 letters of another script can take 160 bytes, and a file name may have 255.
    """
    return re.sub(r"[^\w.-]+", "-", Path(part.removesuffix(".py")).name, flags=re.ASCII)[:40]
