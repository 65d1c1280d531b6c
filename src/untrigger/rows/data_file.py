"""Find and open the data file that a path names, whatever its format."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from untrigger.errors import InputError
from untrigger.files import file_errors
from untrigger.rows.arrow_rows import open_folder, open_parquet
from untrigger.rows.csv_rows import CsvRows
from untrigger.rows.hub import hub_folder, hub_id
from untrigger.rows.shards import shard_pattern, shards
from untrigger.rows.storage import HINT, JsonLines, Rows, first_bytes, is_document, read_list
from untrigger.rows.tar_rows import TarRows

_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet", ".tar")
_NO_DATA = ("dataset_infos.json", "dataset_info.json")  # what the hub writes beside the data
_TAR_MARK = slice(257, 262)  # where a tar file says "ustar"


def find_data_file(path: Path) -> Path:
    """Find the data file at ``path``: the file itself, a ``datasets`` folder, or the only data file in a folder.

    The shards of a split count as one data file, ``train-*-of-00002.parquet``. In a folder as the hub has it the
    parquet files are in ``data``. ``OWNER/NAME[:SPLIT]`` is fetched from the hub unless the folder ``OWNER`` exists.

    Raises:
        InputError: there is none, there are several, or it cannot be read.
    """
    with file_errors(path, "read"):
        if path.is_file() or ("*" in path.name and shards(path)):
            return path
        if not path.is_dir():
            if on_hub := hub_id(path):
                return hub_folder(*on_hub)
            raise InputError(f"{path}: no such file or folder; check the path")
        if (path / "state.json").is_file():
            return path
        if (path / "dataset_dict.json").is_file():
            raise InputError(f"{path}: holds several splits; give the folder of one split, such as {path / 'train'}")
        names = _data_files(path)
        if not names:
            return _below(path)
    if len(names) > 1:
        listed = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
        raise InputError(f"{path}: holds {len(names)} data files ({listed}); give one of them, as {path / names[0]}")
    return path / names[0]


def _data_files(folder: Path) -> list[str]:
    """The data files of a folder by name; shards are one, and lists of skipped rows are none."""
    names = (entry.name for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith("."))
    return sorted(
        {
            shard_pattern(name)
            for name in names
            if (name.lower().endswith(_SUFFIXES) or name.lower() == "metadata.csv")
            and name not in _NO_DATA
            and not name.endswith(".skipped.jsonl")
        }
    )


def _below(folder: Path) -> Path:
    """The data file of a folder that holds none itself: the parquet files in ``data``, or an error that says where."""
    below = [entry for entry in sorted(folder.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
    filled = [entry for entry in below if (entry / "state.json").is_file() or _data_files(entry)]
    if [entry.name for entry in filled] == ["data"] and all(n.endswith(".parquet") for n in _data_files(filled[0])):
        return find_data_file(filled[0])
    if filled:
        listed = " or ".join(str(entry) for entry in filled[:3]) + ", ..." * (len(filled) > 3)
        raise InputError(f"{folder}: holds no data file; give {listed}")
    raise InputError(f"{folder}: holds no data file; {HINT}")


def open_rows(path: Path, ignored: Collection[str] = ()) -> Rows:
    """Open a data file; its content decides the kind.

    Args:
        ignored: keys that are not checked in an object around the rows.

    Raises:
        InputError: it cannot be read or parsed.
    """
    with file_errors(path, "read"):
        if path.is_dir():
            return open_folder(path)
        if not path.is_file() and (parts := shards(path)):
            return TarRows(path, parts) if path.suffix == ".tar" else open_parquet(path, parts)
        with path.open("rb") as file:
            start = file.read(512)
        if start.startswith(b"PAR1"):
            return open_parquet(path, [path])
        if start[_TAR_MARK] == b"ustar" or path.suffix.lower() == ".tar":
            return TarRows(path, [path])
        if path.suffix.lower() == ".csv":
            return CsvRows(path)
        if not start:
            raise InputError(f"{path}: is empty; {HINT}")
        head = first_bytes(path, 4096)
        if start.startswith(b"PK\3\4") or head[_TAR_MARK] == b"ustar":
            raise InputError(f"{path}: is a packed archive; unpack it, and give the tar file or the folder in it")
        return read_list(path, ignored) if is_document(path, head) else JsonLines(path)
