"""Arrow storage of rows: parquet files, their shards, and folders and streams of the ``datasets`` library.

Rows stay on disk (`untrigger.rows.arrow_batches`). `datasets` would decode images on access, and write them again; a
row that stays must stay to the byte.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from bisect import bisect_right
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, BinaryIO, final

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import ipc

from untrigger.errors import InputError
from untrigger.rows.arrow_batches import BATCH_ROWS, Batches, MappedBatches, Part, PassedBatches, check_same, mapped
from untrigger.rows.images import locate, quote
from untrigger.rows.keys import is_about_numbers
from untrigger.rows.shards import merged_name
from untrigger.rows.storage import Row, Rows, Unreadable, check_unchanged, dump, fingerprint, parse_json

_GROUP_ROWS, _GROUP_BYTES = 1000, 2**24  # rows and bytes written at a time, whichever comes first: bounds memory


@final
class ArrowRows(Rows):
    """Rows of Arrow batches.

    Raises:
        ValueError: two columns have the same name.
    """

    inline = True

    def __init__(self, path: Path, batches: Batches) -> None:
        self._path, self._batches, self.schema = path, batches, batches.schema
        if len(set(self.schema.names)) < len(self.schema.names):
            raise ValueError("two columns of the same name")
        self._starts = [0, *accumulate(batches.counts)]  # per batch: index of its first row
        self._columns = [
            field.name
            for field in self.schema
            if field.name == "id" or not (_is_number(field.type) and is_about_numbers(field.name))
        ]

    def _slice(self, index: int) -> pa.RecordBatch:
        batch = bisect_right(self._starts, index) - 1
        with _arrow_errors(self._path):
            return self._batches[batch].slice(index - self._starts[batch], 1)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> object:
        row = self._slice(index).select(self._columns)
        try:
            return row.to_pylist()[0]
        except Exception as error:  # a type that Python lacks, such as nanosecond timestamps
            return Unreadable("", f"cannot be read ({quote(str(error))[1:-1]}); use text, numbers and bytes")

    def write(self, folder: Path, rows: Iterable[tuple[int, Row | None]], keys: Collection[str] | None = None) -> None:
        pairs = iter(rows)
        first = next(pairs, None)
        schema = self.schema if keys is None else _narrowed(self.schema, keys, (first[1] or {}) if first else {})
        tables = self._tables(chain([first] if first else [], pairs), schema)
        if not self._path.is_dir():
            with pq.ParquetWriter(folder / merged_name(self._path.name), schema) as writer:
                for table in tables:
                    writer.write_table(table)
            return
        name = "data-00000-of-00001.arrow"
        with (folder / name).open("wb") as file, ipc.new_stream(file, schema) as writer:
            for table in tables:
                writer.write_table(table)
        with (folder / name).open("rb") as file:
            # `datasets` keys its caches by the fingerprint, so changed rows need a new one.
            fingerprint = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        state = {**_read_object(self._path, "state.json"), "_data_files": [{"filename": name}]}
        state |= {} if keys is None else {"_format_columns": None}
        (folder / "state.json").write_bytes(dump({**state, "_fingerprint": fingerprint}))
        left_out = ("splits",) if keys is None else ("splits", "features")
        info = _read_object(self._path, "dataset_info.json")
        (folder / "dataset_info.json").write_bytes(dump({k: v for k, v in info.items() if k not in left_out}))

    def _replaced(self, index: int, row: Row, schema: pa.Schema) -> pa.RecordBatch:
        batch = self._slice(index)
        columns: list[pa.Array] = []
        for field in schema:
            if field.name in self.schema.names and field.name not in self._columns:
                columns.append(batch[field.name])
                continue
            try:
                columns.append(pa.array([row.get(field.name)], field.type))
            except (pa.ArrowException, TypeError, ValueError):
                raise InputError(
                    f"{self._path}: row {index + 1}: column {field.name!r} cannot hold the edited value; keep its type"
                ) from None
        if lost := next((name for name, value in row.items() if name not in schema.names and value), None):
            raise InputError(f"{self._path}: row {index + 1}: an edit needs the column {lost!r}; add it to the file")
        return pa.RecordBatch.from_arrays(columns, schema=schema)

    def _tables(self, rows: Iterable[tuple[int, Row | None]], schema: pa.Schema) -> Iterator[pa.Table]:
        """Yield the rows in tables of bounded size. Columns that no row replaces are copied unchanged."""
        batches: list[pa.RecordBatch] = []
        size = 0
        for index, row in rows:
            batches.append(self._slice(index) if row is None else self._replaced(index, row, schema))
            size += batches[-1].nbytes
            if len(batches) == _GROUP_ROWS or size >= _GROUP_BYTES:
                yield pa.Table.from_batches(batches, schema).combine_chunks()
                batches, size = [], 0
        if batches:
            yield pa.Table.from_batches(batches, schema).combine_chunks()


def _is_number(kind: pa.DataType) -> bool:
    """Whether values of a type are numbers, booleans or times alone, which need not be read (`rows.keys`)."""
    if isinstance(kind, pa.StructType):
        return all(_is_number(field.type) for field in kind)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _is_number(kind.value_type)
    return pa.types.is_primitive(kind) or pa.types.is_null(kind) or pa.types.is_decimal(kind)


def _narrowed(schema: pa.Schema, keys: Collection[str], row: Row) -> pa.Schema:
    """The columns of ``schema`` that are among ``keys``, and one of texts for each further text of ``row``."""
    fields = [field for field in schema if field.name in keys]
    fields += [
        pa.field(key, pa.string()) for key, value in row.items() if key not in schema.names and isinstance(value, str)
    ]
    return pa.schema(fields, _metadata(schema, {field.name for field in fields}))


def _metadata(schema: pa.Schema, names: set[str]) -> dict[bytes, bytes]:
    """What `datasets` stores about the columns, without those that are not written."""
    metadata = dict(schema.metadata or {})
    metadata.pop(b"pandas", None)
    try:
        stored = json.loads(metadata.get(b"huggingface", b"{}"))
        features = stored["info"]["features"]
        written = {name: feature for name, feature in features.items() if name in names}
    except (ValueError, LookupError, TypeError, AttributeError):
        metadata.pop(b"huggingface", None)
        return metadata
    written |= {name: {"dtype": "string", "_type": "Value"} for name in names - set(features)}
    return {
        **metadata,
        b"huggingface": json.dumps({**stored, "info": {**stored["info"], "features": written}}).encode(),
    }


@contextmanager
def _arrow_errors(path: Path) -> Generator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # Arrow raises many kinds on hostile bytes, and some of its own
        reason = quote(str(error).partition("\n")[0])[1:-1]
        raise InputError(f"{path}: cannot be read ({reason}); write the data set again") from None


def open_parquet(path: Path, files: Sequence[Path]) -> ArrowRows:
    """Open the parquet files of one data set, which error lines call ``path``. No row is read or copied yet."""
    schema: pa.Schema | None = None
    parts: list[Part] = []
    for name in files:
        file = name.absolute()
        with _arrow_errors(file), file.open("rb") as content:
            stamp, source = fingerprint(content), _parquet(content)
            schema = schema or _plain(source.schema_arrow)
            check_same(_plain(source.schema_arrow), schema)
            groups = [source.metadata.row_group(number) for number in range(source.num_row_groups)]
        parts += [Part(group.num_rows, partial(_read_group, file, stamp, n, schema)) for n, group in enumerate(groups)]
    with _arrow_errors(path):
        assert schema is not None
        return ArrowRows(path, PassedBatches(schema, parts))


def _parquet(content: BinaryIO) -> pq.ParquetFile:
    return pq.ParquetFile(content, pre_buffer=False, buffer_size=2**20)


def _read_group(file: Path, stamp: tuple[int, int, int], number: int, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    with _arrow_errors(file), file.open("rb") as content:
        check_unchanged(file, content, stamp)
        for batch in _parquet(content).iter_batches(BATCH_ROWS, row_groups=[number], use_threads=False):
            yield batch.cast(schema)


def open_stream(path: Path, dataset: Any) -> ArrowRows:
    """Rows of an IterableDataset of `datasets`, which is counted now and read again in each pass.

    ``path``: how error lines call it, and where its rows are written.

    Raises:
        InputError: it holds no rows, its columns are unknown, or it cannot be read.
    """
    if not (hasattr(dataset, "with_format") and hasattr(dataset, "iter")):
        raise InputError(f"read: got a {type(dataset).__name__}; give a path, or an IterableDataset of `datasets`")
    tables = dataset.with_format("arrow")
    with _arrow_errors(path):
        first, count = None, 0
        for table in tables.iter(batch_size=BATCH_ROWS):
            first, count = table if first is None else first, count + table.num_rows
        if first is None:
            raise InputError(f"{path}: holds no rows; add at least one")
        schema = _plain(first.schema)

    def read() -> Iterator[pa.RecordBatch]:
        with _arrow_errors(path):
            for table in tables.iter(batch_size=BATCH_ROWS):
                yield from table.cast(schema).to_batches()

    with _arrow_errors(path):
        return ArrowRows(path, PassedBatches(schema, [Part(count, read)]))


def _plain(schema: pa.Schema) -> pa.Schema:
    """A schema with plain values in the place of dictionaries, as pandas writes categories."""
    return pa.schema(
        [f.with_type(f.type.value_type) if pa.types.is_dictionary(f.type) else f for f in schema], schema.metadata
    )


def open_folder(path: Path) -> ArrowRows:
    """Open a folder that the ``datasets`` library saved."""
    state = _read_object(path, "state.json")
    names = state.get("_data_files")
    if state.get("_indices_files") or state.get("_indices_data_files"):  # versions before 2 stored a selection so
        raise InputError(f"{path}: selects rows by an index file, which is not read; save it with a newer datasets")
    with _arrow_errors(path):
        if not isinstance(names, list) or not names:
            raise ValueError("state.json lists no data files")
        maps: list[mmap.mmap] = []
        for name in names:
            label = f"{path / 'state.json'}: data file {quote(str(name['filename']))}"
            with locate(path, str(name["filename"]), label).open("rb") as file:
                maps.append(mapped(file))
        return ArrowRows(path, MappedBatches(maps))


def _read_object(folder: Path, name: str) -> Row:
    try:
        value = parse_json(locate(folder, name, "the file").read_bytes(), 1)
    except InputError as error:
        raise InputError(f"{folder / name}: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{folder / name}: is not a JSON object; save the data set again")
    return value
