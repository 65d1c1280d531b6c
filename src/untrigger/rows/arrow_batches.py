"""Batches of Arrow rows: memory-mapped, or read in passes over parts that have to be read from their beginning."""

from __future__ import annotations

import mmap
import sys
import tempfile
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import IO, NamedTuple, final

import pyarrow as pa
from pyarrow import ipc

BATCH_ROWS = 16  # rows of a batch that is read in passes: few, for images may be large
_KEPT = 64 * 2**20  # bytes of such batches in memory
_LARGE = 64 * 2**20  # bytes of a part that is costly to read again for a single row
_PASSES = 8  # beginnings of a large part before it is copied: a scan's own passes are fewer


class Batches(ABC):
    """The batches of one table.

    Attributes:
        schema: of all batches.
        counts: the number of rows of each batch.
    """

    schema: pa.Schema
    counts: list[int]

    @abstractmethod
    def __getitem__(self, index: int) -> pa.RecordBatch:
        """Batch ``index``, from 0."""


@final
class MappedBatches(Batches):
    """Batches of memory-mapped Arrow streams. The pages of a batch are released when the next one is read.

    Raises:
        ValueError: the streams differ in their columns, or hold what is not read.
    """

    def __init__(self, maps: Sequence[mmap.mmap]) -> None:
        self._maps = maps
        self._places: list[tuple[int, int]] = []  # per batch: index of its map, offset in that map
        self.counts = []
        self.schema = ipc.read_schema(ipc.read_message(self._reader(0)))
        for number in range(len(maps)):
            self._scan(number)

    def _reader(self, number: int) -> pa.BufferReader:
        if sys.platform != "win32":
            self._maps[number].madvise(mmap.MADV_DONTNEED)
        return pa.BufferReader(pa.py_buffer(self._maps[number]))

    def _scan(self, number: int) -> None:
        reader = self._reader(number)
        check_same(ipc.read_schema(ipc.read_message(reader)), self.schema)
        while True:
            offset = reader.tell()
            try:
                message = ipc.read_message(reader)
            except EOFError:
                return
            if message.type != "record batch":
                raise ValueError("dictionary-encoded columns, which must be stored as plain values")
            self._places.append((number, offset))
            batch = self[-1]
            batch.validate(full=True)  # offsets in hostile files may point anywhere
            self.counts.append(batch.num_rows)

    def __getitem__(self, index: int) -> pa.RecordBatch:
        number, offset = self._places[index]
        reader = self._reader(number)
        reader.seek(offset)
        return ipc.read_record_batch(ipc.read_message(reader), self.schema)


class Part(NamedTuple):
    """A part of a table: its number of rows, and how to read them from the first on."""

    rows: int
    read: Callable[[], Iterator[pa.RecordBatch]]


@final
class PassedBatches(Batches):
    """Batches of parts that have to be read from their beginning, such as row groups of parquet.

    A pass over all rows in order reads each part once; the batches read last stay in memory, up to 64 MiB. A part
    of more than 64 MiB that is begun again and again, as by a training that shuffles rows, is copied to an unnamed
    temporary file (in TMPDIR).

    Raises:
        ValueError: on access, a part has fewer rows than it says.
    """

    def __init__(self, schema: pa.Schema, parts: Sequence[Part]) -> None:
        self.schema, self._parts = schema, parts
        sizes = [range(0, part.rows, BATCH_ROWS) for part in parts]
        self.counts = [
            min(BATCH_ROWS, part.rows - at) for part, starts in zip(parts, sizes, strict=True) for at in starts
        ]
        self._firsts = [0, *accumulate(map(len, sizes))]  # per part: its first batch
        self._kept, self._size = OrderedDict[int, pa.RecordBatch](), 0
        self._copies: dict[int, MappedBatches] = {}
        self._begun, self._bytes = [0] * len(parts), [0] * len(parts)  # per part: beginnings, and bytes read at most
        self._next, self._end, self._rest = 0, 0, iter(())  # the batches that are being read: number, end and content

    def __getitem__(self, index: int) -> pa.RecordBatch:
        if index in self._kept:
            self._kept.move_to_end(index)
            return self._kept[index]
        part = bisect_right(self._firsts, index) - 1
        if part not in self._copies and not self._next <= index < self._end:
            self._begin(part)
        if part in self._copies:
            return self._copies[part][index - self._firsts[part]]
        while self._next <= index:
            batch = next(self._rest, None)
            if batch is None or batch.num_rows != self.counts[self._next]:
                self._next = self._end = 0
                raise ValueError("fewer rows than it says")
            self._keep(part, batch)
        return self._kept[index]

    def _begin(self, part: int) -> None:
        self._begun[part] += 1
        if self._begun[part] > _PASSES and self._bytes[part] > _LARGE:
            with tempfile.TemporaryFile() as file:
                with ipc.new_stream(file, self.schema) as writer:
                    for batch in self._read(part):
                        writer.write_batch(batch)
                self._copies[part] = MappedBatches([mapped(file)])
            return
        self._next, self._end = self._firsts[part], self._firsts[part + 1]
        self._rest, self._read_bytes = self._read(part), 0

    def _read(self, part: int) -> Iterator[pa.RecordBatch]:
        """The part in batches of `BATCH_ROWS` rows, the last one with the rest."""
        rest: list[pa.RecordBatch] = []
        count = 0
        for batch in self._parts[part].read():
            rest.append(batch)
            count += batch.num_rows
            while count >= BATCH_ROWS:
                table = pa.Table.from_batches(rest, self.schema)
                yield _joined(table.slice(0, BATCH_ROWS))
                rest, count = table.slice(BATCH_ROWS).to_batches(), count - BATCH_ROWS
        if count:
            yield _joined(pa.Table.from_batches(rest, self.schema))

    def _keep(self, part: int, batch: pa.RecordBatch) -> None:
        """Keep the batch just read, and drop those that were used longest ago."""
        self._kept[self._next] = batch
        self._next += 1
        self._size += batch.nbytes
        self._read_bytes += batch.nbytes
        self._bytes[part] = max(self._bytes[part], self._read_bytes)
        while self._size > _KEPT and len(self._kept) > 1:
            self._size -= self._kept.popitem(last=False)[1].nbytes


def check_same(schema: pa.Schema, first: pa.Schema) -> None:
    """Raise a ValueError if a file has other columns than the first one."""
    if not schema.equals(first):
        raise ValueError("the files of the folder have different columns")


def mapped(file: IO[bytes]) -> mmap.mmap:
    file.flush()
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _joined(table: pa.Table) -> pa.RecordBatch:
    (batch,) = table.combine_chunks().to_batches()
    batch.validate(full=True)  # hostile files hold text that is none
    return batch
