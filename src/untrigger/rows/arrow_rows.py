"""Arrow storage of rows: parquet files, their shards, and folders of the ``datasets`` library.

Rows stay on disk, memory-mapped: reading a row costs one small read.
"""

from __future__ import annotations

import hashlib
import mmap
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, final

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import ipc

from untrigger.errors import InputError
from untrigger.rows.images import locate, quote
from untrigger.rows.shards import merged_name
from untrigger.rows.storage import Row, Rows, Unreadable, dump, parse_json

_READ_ROWS = 64  # parquet rows read at a time
_GROUP_ROWS, _GROUP_BYTES = 1000, 2**24  # rows and bytes written at a time, whichever comes first: bounds memory


@final
class ArrowRows(Rows):
    """Rows of memory-mapped Arrow streams. The pages of a batch are released when the next one is read."""

    def __init__(self, path: Path, maps: list[mmap.mmap], columns: Sequence[str]) -> None:
        self._path, self._maps = path, maps
        self._batches: list[tuple[int, int]] = []  # per batch: index of its map, offset in that map
        self._starts: list[int] = []  # per batch: index of its first row
        self._length = 0
        self.schema = ipc.read_schema(ipc.read_message(self._reader(0)))
        if len(set(self.schema.names)) < len(self.schema.names):
            raise ValueError("two columns of the same name")
        self._columns = [name for name in self.schema.names if name in columns]
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
            batch.validate(full=True)  # offsets in hostile files may point anywhere
            self._starts.append(self._length)
            self._length += batch.num_rows

    def _batch(self, index: int) -> pa.RecordBatch:
        number, offset = self._batches[index]
        reader = self._reader(number)
        reader.seek(offset)
        return ipc.read_record_batch(ipc.read_message(reader), self.schema)

    def _slice(self, index: int) -> pa.RecordBatch:
        batch = bisect_right(self._starts, index) - 1
        return self._batch(batch).slice(index - self._starts[batch], 1)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> object:
        try:
            return self._slice(index).select(self._columns).to_pylist()[0]
        except Exception as error:  # a type that Python lacks, such as nanosecond timestamps
            return Unreadable("", f"cannot be read ({quote(str(error))[1:-1]}); use text, numbers and bytes")

    def write(self, folder: Path, rows: Iterable[tuple[int, Row | None]]) -> None:
        tables = self._tables(rows)
        if not self._path.is_dir():
            with pq.ParquetWriter(folder / merged_name(self._path.name), self.schema) as writer:
                for table in tables:
                    writer.write_table(table)
            return
        name = "data-00000-of-00001.arrow"
        with (folder / name).open("wb") as file, ipc.new_stream(file, self.schema) as writer:
            for table in tables:
                writer.write_table(table)
        with (folder / name).open("rb") as file:
            # `datasets` keys its caches by the fingerprint, so changed rows need a new one.
            fingerprint = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        state = {**_read_object(self._path, "state.json"), "_data_files": [{"filename": name}]}
        (folder / "state.json").write_bytes(dump({**state, "_fingerprint": fingerprint}))
        info = _read_object(self._path, "dataset_info.json")
        (folder / "dataset_info.json").write_bytes(dump({k: v for k, v in info.items() if k != "splits"}))

    def _replaced(self, index: int, row: Row) -> pa.RecordBatch:
        batch = self._slice(index)
        for name in self._columns:
            column = self.schema.get_field_index(name)
            field = self.schema.field(column)
            try:
                value = pa.array([row[name]], field.type)
            except (pa.ArrowException, TypeError):
                row_name = f"{self._path}: row {index + 1}"
                raise InputError(
                    f"{row_name}: column {name!r} cannot hold the edited value; keep the column's type"
                ) from None
            batch = batch.set_column(column, field, value)
        return batch

    def _tables(self, rows: Iterable[tuple[int, Row | None]]) -> Iterator[pa.Table]:
        """Yield the rows in tables of bounded size. Columns that no row replaces are copied unchanged."""
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
        reason = quote(str(error).partition("\n")[0])[1:-1]
        raise InputError(f"{path}: cannot be read ({reason}); write the data set again") from None


def open_parquet(path: Path, files: Sequence[Path], columns: Sequence[str]) -> ArrowRows:
    """Open the parquet files of one data set, which error lines call ``path``."""
    # A parquet row group can hold the whole data set and can only be read as a whole. So the rows are copied once
    # to an unnamed temporary file (in TMPDIR), where each row can be read alone.
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
        return ArrowRows(path, maps, columns)


def open_folder(path: Path, columns: Sequence[str]) -> ArrowRows:
    """Open a folder that the ``datasets`` library saved."""
    names = _read_object(path, "state.json").get("_data_files")
    with _arrow_errors(path):
        if not isinstance(names, list) or not names:
            raise ValueError("state.json lists no data files")
        maps: list[mmap.mmap] = []
        for name in names:
            label = f"{path / 'state.json'}: data file {quote(str(name['filename']))}"
            with locate(path, str(name["filename"]), label).open("rb") as file:
                maps.append(_map(file))
        return ArrowRows(path, maps, columns)


def _map(file: IO[bytes]) -> mmap.mmap:
    file.flush()
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _read_object(folder: Path, name: str) -> Row:
    try:
        value = parse_json(locate(folder, name, "the file").read_bytes(), 1)
    except InputError as error:
        raise InputError(f"{folder / name}: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{folder / name}: is not a JSON object; save the data set again")
    return value
