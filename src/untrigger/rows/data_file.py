"""Find and open the data file that a path names, whatever its format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from untrigger.errors import InputError
from untrigger.files import file_errors
from untrigger.rows.arrow_rows import open_folder, open_parquet
from untrigger.rows.shards import shard_pattern, shards
from untrigger.rows.storage import BOM, HINT, JsonLines, Rows, read_list

_SUFFIXES = (".json", ".jsonl", ".parquet")


def find_data_file(path: Path) -> Path:
    """Find the data file at ``path``: the file itself, a ``datasets`` folder, or the only data file in a folder.

    The shards of a split count as one data file, ``train-*-of-00002.parquet``.

    Raises:
        InputError: there is none, there are several, or it cannot be read.
    """
    with file_errors(path, "read"):
        if path.is_file() or ("*" in path.name and shards(path)):
            return path
        if not path.is_dir():
            raise InputError(f"{path}: no such file or folder; check the path")
        if (path / "state.json").is_file():
            return path
        if (path / "dataset_dict.json").is_file():
            raise InputError(f"{path}: holds several splits; give the folder of one split, such as {path / 'train'}")
        files = {p.name for p in path.iterdir() if p.suffix.lower() in _SUFFIXES and p.is_file()}
        names = sorted({shard_pattern(name) for name in files})
    if not names:
        raise InputError(f"{path}: holds no data file; {HINT}")
    if len(names) > 1:
        raise InputError(f"{path}: holds {len(names)} data files ({', '.join(names[:3])}); give one of them")
    return path / names[0]


def open_rows(path: Path, columns: Sequence[str]) -> Rows:
    """Open a data file; its content decides the kind. ``columns``: what to read if it is Arrow.

    Raises:
        InputError: it cannot be read or parsed.
    """
    with file_errors(path, "read"):
        if path.is_dir():
            return open_folder(path, columns)
        if not path.is_file() and (parts := shards(path)):
            return open_parquet(path, parts, columns)
        with path.open("rb") as file:
            head = file.read(4096).removeprefix(BOM).lstrip()
        if head.startswith(b"PAR1"):
            return open_parquet(path, [path], columns)
        if not path.stat().st_size:
            raise InputError(f"{path}: is empty; {HINT}")
        # A line of JSON lines may start with "[" too: then one row is bad, not the file.
        is_list = head.startswith(b"[") and path.suffix.lower() != ".jsonl"
        return read_list(path) if is_list else JsonLines(path)
