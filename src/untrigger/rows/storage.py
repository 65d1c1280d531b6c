"""Storage of rows: the interface, JSON lists and JSON lines, read row by row and written back.

Nothing here interprets rows: `untrigger.rows.formats` does. JSON lines stay on disk; reading a row is one small read,
and a row that is written unchanged keeps its values. `datasets` offers neither row numbers of bad lines nor that.
Arrow files are read by `untrigger.rows.arrow_rows`, tar files by `untrigger.rows.tar_rows`.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import shutil
import tempfile
import zlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Collection, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast, final

from untrigger.errors import InputError
from untrigger.files import file_errors
from untrigger.rows.images import quote
from untrigger.rows.keys import check_keys, leaves

Row = dict[str, object]

BOM = b"\xef\xbb\xbf"  # byte order mark that some editors write before UTF-8
HINT = (
    "give a JSON list of rows, JSON lines (one row per line), parquet, a WebDataset tar or a folder with metadata.csv"
)


@final
@dataclass(frozen=True)
class Unreadable:
    """A row that could not be parsed: its raw text, and the reason as ``what is wrong; what to do``."""

    text: str
    reason: str


class Rows(ABC):
    """The rows of one data set, in the order of the file.

    Attributes:
        inline: whether images stand in the file itself.
    """

    inline = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> object:
        """Return row ``index`` (from 0) as parsed; Arrow rows hold only the columns that were opened."""

    @abstractmethod
    def write(self, folder: Path, rows: Iterable[tuple[int, Row | None]], keys: Collection[str] | None = None) -> None:
        """Write into ``folder``, under the same file name, for each pair (index, replacement).

        A replacement of None writes row ``index`` unchanged.

        Args:
            keys: the only columns that a table keeps; every row must be replaced then. All by default.
        """


@final
class JsonRows(Rows):
    """Rows in memory, written as a JSON list or, with ``lines``, as JSON lines; image files are not read here.

    ``head``: the other keys of the object ``{"data": [rows]}`` that held the list; None if the list stood alone.
    """

    def __init__(self, name: str, rows: list[object], *, lines: bool, head: Row | None = None) -> None:
        self._name, self._rows, self._lines, self._head = name, rows, lines, head

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> object:
        return self._rows[index]

    def write(self, folder: Path, rows: Iterable[tuple[int, Row | None]], keys: Collection[str] | None = None) -> None:
        before, after = b"[\n", b"\n]\n"
        if self._head is not None:
            before, after = dump({**self._head, "data": 0})[:-2] + b"[\n", b"\n]}\n"
        if self._lines:
            before, after = b"", b"\n"
        _write_json(folder / self._name, self, rows, before, b"\n" if self._lines else b",\n", after)


@final
class JsonLines(Rows):
    """Rows of JSON lines, which stay on disk: memory holds three integers per row. Blank lines are skipped.

    Lines in gzip are unpacked to a temporary file (in TMPDIR), where each can be read alone.
    """

    def __init__(self, path: Path) -> None:
        self._name, self._path = path.name, path.absolute()
        self._unpacked = _unpacked(path) if path.suffix.lower() == ".gz" else None
        if self._unpacked:
            self._path = Path(self._unpacked.name)
        self._offsets, self._lengths, self._line_numbers = array("Q"), array("Q"), array("Q")
        with self._path.open("rb") as file:
            self._fingerprint = fingerprint(file)
            offset = 0
            for number, line in enumerate(file, 1):
                if (line.removeprefix(BOM) if number == 1 else line).strip():
                    self._offsets.append(offset)
                    self._lengths.append(len(line))
                    self._line_numbers.append(number)
                offset += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> object:
        with file_errors(self._path, "read"), self._path.open("rb") as file:
            check_unchanged(self._path, file, self._fingerprint)
            file.seek(self._offsets[index])
            line = file.read(self._lengths[index])
        text = (line.removeprefix(BOM) if self._line_numbers[index] == 1 else line).strip()
        try:
            return parse_json(text, self._line_numbers[index])
        except InputError as error:
            return Unreadable(text.decode(errors="backslashreplace"), str(error))

    def write(self, folder: Path, rows: Iterable[tuple[int, Row | None]], keys: Collection[str] | None = None) -> None:
        _write_json(folder / self._name, self, rows, b"", b"\n", b"\n")


# --- files ------------------------------------------------------------------------------------------


def fingerprint(file: BinaryIO) -> tuple[int, int, int]:
    """Return size, time of modification and inode, which change when a file is written or replaced."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns, status.st_ino


def check_unchanged(path: Path, file: BinaryIO, before: tuple[int, int, int]) -> None:
    """Raise an InputError if the open file is no longer what its `fingerprint` was ``before``."""
    if fingerprint(file) != before:
        raise InputError(f"{path}: changed while it was in use; start again")


def _unpacked(path: Path) -> IO[bytes]:
    """The content of a gzip file as a temporary file, which is deleted when it is closed."""
    file = tempfile.NamedTemporaryFile(prefix="untrigger-")  # noqa: SIM115  # stays open as long as the rows
    with _source(path) as packed:
        shutil.copyfileobj(packed, file)
    file.flush()
    return cast("IO[bytes]", file)


@contextmanager
def _opened(path: Path) -> Generator[IO[bytes]]:
    """A new file, in gzip if its name says so. Equal content gives equal bytes."""
    with path.open("wb") as file:
        if path.suffix.lower() != ".gz":
            yield file
            return
        with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
            yield cast("IO[bytes]", packed)


def _write_json(
    path: Path, source: Rows, rows: Iterable[tuple[int, Row | None]], before: bytes, between: bytes, after: bytes
) -> None:
    with _opened(path) as file:
        file.write(before)
        separator = b""
        for index, row in rows:
            file.write(separator + dump(source[index] if row is None else row))
            separator = between
        file.write(after)


def dump(value: object) -> bytes:
    """Serialize one row as a line of JSON in UTF-8. Bytes, which JSON lacks, are replaced by their length.

    Raises:
        InputError: the row is nested too deeply.
    """
    try:
        try:
            return json.dumps(value, ensure_ascii=False, default=_placeholder).encode()
        except UnicodeEncodeError:  # half of a surrogate pair: JSON can escape it, UTF-8 cannot hold it
            return json.dumps(value, default=_placeholder).encode()
    except RecursionError:
        raise InputError("a row is nested too deeply; flatten or remove it") from None


def _placeholder(value: object) -> str:
    if isinstance(value, Unreadable):
        return value.text
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else str(value)


# --- parsing ----------------------------------------------------------------------------------------


class _BadValue(InputError):
    """A number that JSON does not have, or a key that stands twice in an object: the file is sound but for that."""


def parse_json(text: bytes, first_line: int) -> object:
    """Parse JSON; NaN, infinities and keys given twice are errors. Raises InputError with the line in the file."""
    try:
        return json.loads(
            text.decode(), parse_constant=_reject_constant, parse_float=_finite, object_pairs_hook=_unique
        )
    except UnicodeDecodeError as error:
        line = first_line + text[: error.start].count(b"\n")
        raise InputError(f"bad text at line {line}: not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        position = f"line {first_line + error.lineno - 1}, column {error.colno}"
        raise InputError(f"bad JSON at {position}: {error.msg}; correct it, or {HINT}") from None
    except RecursionError:
        raise InputError(f"bad JSON at line {first_line}: nested too deeply; flatten it") from None
    except ValueError as error:  # a number of thousands of digits, NaN, an infinity, a key given twice
        raise _BadValue(f"bad JSON at line {first_line}: {_what_and_fix(error)}") from None


def _reject_constant(constant: str) -> object:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{quote(text)} is too large for a float")
    return value


def _unique(pairs: list[tuple[str, object]]) -> Row:
    """An object of JSON. Of a key given twice tools read the first or the last one."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for k, name in enumerate(names) if name in names[:k])
        raise ValueError(f"the key {quote(twice)} stands twice in an object; keep one of them")
    return fields


def _what_and_fix(error: ValueError) -> str:
    what, _, fix = str(error).partition("; ")
    return f"{what}; {fix if fix.startswith('keep') else 'correct the number'}"  # Python adds advice for programmers


def _lenient(parse: Callable[[Any], object]) -> Callable[[Any], object]:
    """Parse a value, or keep its text with the reason why it is none."""

    def parsed(value: Any) -> object:
        try:
            return parse(value)
        except ValueError as error:
            return Unreadable(value if isinstance(value, str) else dump(value).decode(), _what_and_fix(error))

    return parsed


def _with_bad_values(text: str) -> Any:
    """Parse JSON with bad values: a row that holds one becomes Unreadable, so that the others can be used."""
    value = json.loads(
        text,
        parse_constant=_lenient(_reject_constant),
        parse_float=_lenient(_finite),
        parse_int=_lenient(int),
        object_pairs_hook=_lenient(_unique),
    )

    def checked(row: object) -> object:
        bad = next((leaf for leaf in leaves(row) if isinstance(leaf, Unreadable)), None)
        return Unreadable(dump(row).decode(), bad.reason) if bad else row

    if isinstance(value, dict) and isinstance(value.get("data"), list):
        return {**value, "data": [*map(checked, value["data"])]}
    return [*map(checked, value)] if isinstance(value, list) else value


def is_document(path: Path, head: bytes) -> bool:
    """Whether a file is one JSON value, a list or ``{"data": [...]}``, and not JSON lines.

    A line of JSON lines may start with "[" too: then one row is bad, not the file.
    """
    if ".jsonl" in path.name.lower():
        return False
    if head.startswith(b"["):
        return True
    if not head.startswith(b"{") or ".json" not in path.name.lower():
        return False
    with _source(path) as file:
        first = file.readline().removeprefix(BOM)
        only = not file.readline().strip()
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        return not only or b'"data"' in first[:4096]  # an object over several lines
    return only and isinstance(row, dict) and isinstance(row.get("data"), list)


@contextmanager
def _source(path: Path) -> Generator[IO[bytes]]:
    """The content of a file, unpacked if its name ends in ``.gz``. Raises InputError if that is damaged."""
    if path.suffix.lower() != ".gz":
        with path.open("rb") as file:
            yield file
        return
    try:
        with gzip.open(path) as packed:
            yield cast("IO[bytes]", packed)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        reason = quote(str(error))[1:-1]
        raise InputError(f"{path}: is damaged ({reason}); fetch or write it again") from None


def first_bytes(path: Path, count: int) -> bytes:
    """The first bytes of a file, unpacked if its name ends in ``.gz``, without a byte order mark and blanks."""
    with _source(path) as file:
        return file.read(count).removeprefix(BOM).lstrip()


def read_list(path: Path, ignored: Collection[str] = ()) -> JsonRows:
    """Read a whole file that holds a JSON list, or an object whose ``data`` is one; ``ignored`` as in `parse`.

    Raises:
        InputError: it holds neither; the message names the file.
    """
    with _source(path) as file:
        text = file.read().removeprefix(BOM)
    try:
        try:
            value = parse_json(text, 1)
        except _BadValue:
            value = _with_bad_values(text.decode())
            if isinstance(value, Unreadable):
                raise
        head = None
        if isinstance(value, dict) and isinstance(value.get("data"), list):
            head = {name: part for name, part in value.items() if name != "data"}
            check_keys(head, (), ignored, what="the file")
            value = cast(Row, value)["data"]
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if not isinstance(value, list):
        names = ", ".join(map(quote, list(cast(Row, value))[:8])) if isinstance(value, dict) else ""
        raise InputError(f"{path}: is not a list of rows{names and f' but an object with the keys {names}'}; {HINT}")
    return JsonRows(path.name, value, lines=False, head=head)
