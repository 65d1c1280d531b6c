"""Rows on disk: JSON lists, JSON lines, parquet files and ``datasets`` folders, read by row and written back.

Nothing here knows what a row means. JSON lines and Arrow rows stay on disk: one row costs one small read.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import sys
import tempfile
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, final

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import ipc

from untrigger.errors import InputError
from untrigger.files import file_errors
from untrigger.rows.images import locate, quote
from untrigger.rows.shards import joined, shards, whole

Row = dict[str, object]

_BOM = b"\xef\xbb\xbf"  # some editors begin UTF-8 with it
_SUFFIXES = (".json", ".jsonl", ".parquet")
_READ_ROWS = 64  # of a parquet file at a time
_GROUP_ROWS, _GROUP_BYTES = 1000, 2**24  # written at a time, whichever comes first: bounds memory
_HINT = "a data file is a JSON list of rows, one JSON row per line, or parquet"


@final
@dataclass(frozen=True)
class Unreadable:
    """A row that could not be parsed: its text, and what is wrong; what to do."""

    text: str
    reason: str


class Rows(ABC):
    """The rows of one data set, in the order of the file."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> object:
        """Row ``index`` (from 0), as parsed; of Arrow rows only the columns that are ``wanted``."""

    @abstractmethod
    def write(self, folder: Path, rows: Iterable[tuple[int, Row | None]]) -> None:
        """Writes into ``folder``, under the same name, row ``index`` for each pair, or what replaces it."""


def find(path: Path) -> Path:
    """The data file at ``path``: itself, a ``datasets`` folder, or the one data file of a folder.

    The shards of a split are one data file, ``train-*-of-00002.parquet``.
    """
    with file_errors(path, "read"):
        if path.is_file() or ("*" in path.name and shards(path)):
            return path
        if not path.is_dir():
            raise InputError(f"{path}: no such file or folder; check the path")
        if (path / "state.json").is_file():
            return path
        if (path / "dataset_dict.json").is_file():
            raise InputError(f"{path}: holds several splits; give the folder of one, as {path / 'train'}")
        names = {p.name for p in path.iterdir() if p.suffix.lower() in _SUFFIXES and p.is_file()}
        found = sorted({whole(name) for name in names})
    if not found:
        raise InputError(f"{path}: holds no data file; {_HINT}")
    if len(found) > 1:
        raise InputError(f"{path}: holds {len(found)} data files ({', '.join(found[:3])}); give one of them")
    return path / found[0]


def open_rows(path: Path, wanted: Sequence[str]) -> Rows:
    """Opens what ``find`` found; the content says which kind it is. ``wanted``: columns, if it is Arrow."""
    with file_errors(path, "read"):
        if path.is_dir():
            return _open_folder(path, wanted)
        if not path.is_file() and (parts := shards(path)):
            return _open_parquet(path, parts, wanted)
        with path.open("rb") as file:
            head = file.read(4096).removeprefix(_BOM).lstrip()
        if head.startswith(b"PAR1"):
            return _open_parquet(path, [path], wanted)
        if not path.stat().st_size:
            raise InputError(f"{path}: is empty; {_HINT}")
        # A line of JSON lines may start with "[" too: then it is one bad row, not a bad file.
        is_list = head.startswith(b"[") and path.suffix.lower() != ".jsonl"
        return _read_list(path) if is_list else JsonLines(path)


# --- JSON ---------------------------------------------------------------------------------------


@final
class JsonRows(Rows):
    """Rows in memory, to be written as a JSON list or as ``lines``; the files they name are not read here."""

    def __init__(self, name: str, rows: list[object], *, lines: bool) -> None:
        self._name, self._rows, self._lines = name, rows, lines

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> object:
        return self._rows[index]

    def write(self, folder: Path, rows: Iterable[tuple[int, Row | None]]) -> None:
        _write_json(folder / self._name, self, rows, lines=self._lines)


@final
class JsonLines(Rows):
    """Rows of JSON lines, which stay on disk: of each only its place is held, however many there are."""

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self._places, self._lengths, self._numbers = array("Q"), array("Q"), array("Q")
        with path.open("rb") as file:
            self._state = _state(file)
            place = 0
            for number, line in enumerate(file, 1):
                if (line.removeprefix(_BOM) if number == 1 else line).strip():
                    self._places.append(place)
                    self._lengths.append(len(line))
                    self._numbers.append(number)
                place += len(line)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> object:
        with file_errors(self._path, "read"), self._path.open("rb") as file:
            if _state(file) != self._state:
                raise InputError(f"{self._path}: was changed while it was in use; start again")
            file.seek(self._places[index])
            line = file.read(self._lengths[index])
        text = (line.removeprefix(_BOM) if self._numbers[index] == 1 else line).strip()
        try:
            return _parse(text, self._numbers[index])
        except InputError as error:
            return Unreadable(text.decode(errors="backslashreplace"), str(error))

    def write(self, folder: Path, rows: Iterable[tuple[int, Row | None]]) -> None:
        _write_json(folder / self._path.name, self, rows, lines=True)


def _state(file: BinaryIO) -> tuple[int, int, int]:
    """What changes when a file is written or replaced."""
    told = os.fstat(file.fileno())
    return told.st_size, told.st_mtime_ns, told.st_ino


def _write_json(path: Path, own: Rows, rows: Iterable[tuple[int, Row | None]], *, lines: bool) -> None:
    with path.open("wb") as file:
        file.write(b"" if lines else b"[\n")
        separator = b""
        for index, row in rows:
            file.write(separator + dump(own[index] if row is None else row))
            separator = b"\n" if lines else b",\n"
        file.write(b"\n" if lines else b"\n]\n")


def dump(value: object) -> bytes:
    """One line of JSON, UTF-8 where the text allows it. Bytes, which JSON lacks, give their length."""
    try:
        try:
            return json.dumps(value, ensure_ascii=False, default=_plain).encode()
        except UnicodeEncodeError:  # half of a surrogate pair: JSON can escape it, UTF-8 cannot hold it
            return json.dumps(value, default=_plain).encode()
    except RecursionError:
        raise InputError("a row is nested too deeply; flatten or remove it") from None


def _plain(value: object) -> str:
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else str(value)


def _parse(text: bytes, first_line: int) -> object:
    """JSON without NaN and infinities. Raises InputError with the line in the file."""
    try:
        return json.loads(text.decode(), parse_constant=_refuse, parse_float=_finite)
    except UnicodeDecodeError as error:
        line = first_line + text[: error.start].count(b"\n")
        raise InputError(f"bad text at line {line}: not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        where = f"line {first_line + error.lineno - 1}, column {error.colno}"
        raise InputError(f"bad JSON at {where}: {error.msg}; correct it ({_HINT})") from None
    except RecursionError:
        raise InputError(f"bad JSON at line {first_line}: nested too deeply; flatten it") from None
    except ValueError as error:  # a number of thousands of digits, NaN, an infinity
        why = str(error).partition(";")[0]
        raise InputError(f"bad JSON at line {first_line}: {why}; correct the number") from None


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{quote(text)} is too large a number")
    return value


def _read_list(path: Path) -> JsonRows:
    try:
        rows = _parse(path.read_bytes().removeprefix(_BOM), 1)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if not isinstance(rows, list):
        raise InputError(f"{path}: is not a list of rows; {_HINT}")
    return JsonRows(path.name, rows, lines=False)


# --- Arrow: parquet and ``datasets`` folders ----------------------------------------------------


@final
class ArrowRows(Rows):
    """Rows in mapped Arrow streams. The pages of a batch are given back when the next one is read."""

    def __init__(self, path: Path, maps: list[mmap.mmap], wanted: Sequence[str]) -> None:
        self._path, self._maps = path, maps
        self._batches: list[tuple[int, int]] = []  # of each batch its map and its offset there
        self._starts: list[int] = []  # of each batch its first row
        self._length = 0
        self.schema = ipc.read_schema(ipc.read_message(self._reader(0)))
        if len(set(self.schema.names)) < len(self.schema.names):
            raise ValueError("two columns of the same name")
        self._wanted = [name for name in self.schema.names if name in wanted]
        for number in range(len(maps)):
            self._scan(number)

    def _reader(self, number: int) -> pa.BufferReader:
        if sys.platform != "win32":
            self._maps[number].madvise(mmap.MADV_DONTNEED)
        return pa.BufferReader(pa.py_buffer(self._maps[number]))

    def _scan(self, number: int) -> None:
        reader = self._reader(number)
        if not ipc.read_schema(ipc.read_message(reader)).equals(self.schema):
            raise ValueError("the files of the folder have different columns")
        while True:
            offset = reader.tell()
            try:
                message = ipc.read_message(reader)
            except EOFError:
                return
            if message.type != "record batch":
                raise ValueError("dictionary-encoded columns, which must be stored as plain values")
            self._batches.append((number, offset))
            batch = self._batch(-1)
            batch.validate(full=True)  # offsets of hostile files may point anywhere
            self._starts.append(self._length)
            self._length += batch.num_rows

    def _batch(self, index: int) -> pa.RecordBatch:
        number, offset = self._batches[index]
        reader = self._reader(number)
        reader.seek(offset)
        return ipc.read_record_batch(ipc.read_message(reader), self.schema)

    def _slice(self, index: int) -> pa.RecordBatch:
        at = bisect_right(self._starts, index) - 1
        return self._batch(at).slice(index - self._starts[at], 1)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> object:
        try:
            return self._slice(index).select(self._wanted).to_pylist()[0]
        except Exception as error:  # a type that Python lacks, such as times of nanoseconds
            return Unreadable("", f"cannot be read ({quote(str(error))[1:-1]}); give its columns plain types")

    def write(self, folder: Path, rows: Iterable[tuple[int, Row | None]]) -> None:
        tables = self._tables(rows)
        if not self._path.is_dir():
            with pq.ParquetWriter(folder / joined(self._path.name), self.schema) as writer:
                for table in tables:
                    writer.write_table(table)
            return
        name = "data-00000-of-00001.arrow"
        with (folder / name).open("wb") as file, ipc.new_stream(file, self.schema) as writer:
            for table in tables:
                writer.write_table(table)
        with (folder / name).open("rb") as file:
            # Caches of `datasets` go by the fingerprint: other rows need another one.
            fingerprint = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        state = {**_read_object(self._path, "state.json"), "_data_files": [{"filename": name}]}
        (folder / "state.json").write_bytes(dump({**state, "_fingerprint": fingerprint}))
        info = _read_object(self._path, "dataset_info.json")
        (folder / "dataset_info.json").write_bytes(dump({k: v for k, v in info.items() if k != "splits"}))

    def _replaced(self, index: int, row: Row) -> pa.RecordBatch:
        batch = self._slice(index)
        for name in self._wanted:
            column = self.schema.get_field_index(name)
            field = self.schema.field(column)
            try:
                value = pa.array([row[name]], field.type)
            except (pa.ArrowException, TypeError):
                where = f"{self._path}: row {index + 1}"
                raise InputError(f"{where}: column {name!r} cannot hold the edit; keep its kind") from None
            batch = batch.set_column(column, field, value)
        return batch

    def _tables(self, rows: Iterable[tuple[int, Row | None]]) -> Iterator[pa.Table]:
        """The rows in tables of bounded size. Columns that no row replaces pass through untouched."""
        batches: list[pa.RecordBatch] = []
        size = 0
        for index, row in rows:
            batches.append(self._slice(index) if row is None else self._replaced(index, row))
            size += batches[-1].nbytes
            if len(batches) == _GROUP_ROWS or size >= _GROUP_BYTES:
                yield pa.Table.from_batches(batches, self.schema).combine_chunks()
                batches, size = [], 0
        if batches:
            yield pa.Table.from_batches(batches, self.schema).combine_chunks()


@contextmanager
def _arrow_errors(path: Path) -> Generator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # Arrow raises many kinds on hostile bytes, and some of its own
        why = quote(str(error).partition("\n")[0])[1:-1]
        raise InputError(f"{path}: cannot be read ({why}); write the data set again") from None


def _open_parquet(path: Path, files: Sequence[Path], wanted: Sequence[str]) -> ArrowRows:
    # A parquet row group can hold the whole data set and is read as one. So the rows are copied once to a
    # nameless temporary file (in TMPDIR), where any of them can be reached alone.
    maps: list[mmap.mmap] = []
    for part in files:
        with _arrow_errors(part), tempfile.TemporaryFile() as file:
            with (
                pq.ParquetFile(part, pre_buffer=False, buffer_size=2**20) as source,
                ipc.new_stream(file, source.schema_arrow) as writer,
            ):
                for batch in source.iter_batches(batch_size=_READ_ROWS, use_threads=False):
                    writer.write_batch(batch)
            maps.append(_map(file))
    with _arrow_errors(path):
        return ArrowRows(path, maps, wanted)


def _open_folder(path: Path, wanted: Sequence[str]) -> ArrowRows:
    names = _read_object(path, "state.json").get("_data_files")
    with _arrow_errors(path):
        if not isinstance(names, list) or not names:
            raise ValueError("state.json lists no data files")
        maps: list[mmap.mmap] = []
        for name in names:
            label = f"{path / 'state.json'}: data file {quote(str(name['filename']))}"
            with locate(path, str(name["filename"]), label).open("rb") as file:
                maps.append(_map(file))
        return ArrowRows(path, maps, wanted)


def _map(file: IO[bytes]) -> mmap.mmap:
    file.flush()
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _read_object(folder: Path, name: str) -> Row:
    try:
        value = _parse(locate(folder, name, "the file").read_bytes(), 1)
    except InputError as error:
        raise InputError(f"{folder / name}: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{folder / name}: is not a JSON object; save the data set again")
    return value
