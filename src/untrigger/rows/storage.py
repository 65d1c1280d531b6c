"""Storage of rows: the interface, JSON lists and JSON lines, read row by row and written back.

Nothing here interprets rows: `untrigger.rows.formats` does. JSON lines stay on disk; reading a row is one small read.
Arrow files are read by `untrigger.rows.arrow_rows`.
"""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, final

from untrigger.errors import InputError
from untrigger.files import file_errors
from untrigger.rows.images import quote

Row = dict[str, object]

BOM = b"\xef\xbb\xbf"  # byte order mark that some editors write before UTF-8
HINT = "give a JSON list of rows, JSON lines (one row per line) or parquet"


@final
@dataclass(frozen=True)
class Unreadable:
    """A row that could not be parsed: its raw text, and the reason as ``what is wrong; what to do``."""

    text: str
    reason: str


class Rows(ABC):
    """The rows of one data set, in the order of the file."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> object:
        """Return row ``index`` (from 0) as parsed; Arrow rows hold only the columns that were opened."""

    @abstractmethod
    def write(self, folder: Path, rows: Iterable[tuple[int, Row | None]]) -> None:
        """Write into ``folder``, under the same file name, for each pair (index, replacement).

        A replacement of None writes row ``index`` unchanged.
        """


@final
class JsonRows(Rows):
    """Rows in memory, written as a JSON list or, with ``lines``, as JSON lines; image files are not read here."""

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
    """Rows of JSON lines, which stay on disk: memory holds three integers per row. Blank lines are skipped."""

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self._offsets, self._lengths, self._line_numbers = array("Q"), array("Q"), array("Q")
        with path.open("rb") as file:
            self._fingerprint = _fingerprint(file)
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
            if _fingerprint(file) != self._fingerprint:
                raise InputError(f"{self._path}: changed while it was in use; start again")
            file.seek(self._offsets[index])
            line = file.read(self._lengths[index])
        text = (line.removeprefix(BOM) if self._line_numbers[index] == 1 else line).strip()
        try:
            return parse_json(text, self._line_numbers[index])
        except InputError as error:
            return Unreadable(text.decode(errors="backslashreplace"), str(error))

    def write(self, folder: Path, rows: Iterable[tuple[int, Row | None]]) -> None:
        _write_json(folder / self._path.name, self, rows, lines=True)


def _fingerprint(file: BinaryIO) -> tuple[int, int, int]:
    """Return size, time of modification and inode, which change when a file is written or replaced."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns, status.st_ino


def _write_json(path: Path, source: Rows, rows: Iterable[tuple[int, Row | None]], *, lines: bool) -> None:
    with path.open("wb") as file:
        file.write(b"" if lines else b"[\n")
        separator = b""
        for index, row in rows:
            file.write(separator + dump(source[index] if row is None else row))
            separator = b"\n" if lines else b",\n"
        file.write(b"\n" if lines else b"\n]\n")


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
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else str(value)


def parse_json(text: bytes, first_line: int) -> object:
    """Parse JSON; NaN and infinities are errors. Raises InputError with the line number in the file."""
    try:
        return json.loads(text.decode(), parse_constant=_reject_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        line = first_line + text[: error.start].count(b"\n")
        raise InputError(f"bad text at line {line}: not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        position = f"line {first_line + error.lineno - 1}, column {error.colno}"
        raise InputError(f"bad JSON at {position}: {error.msg}; correct it, or {HINT}") from None
    except RecursionError:
        raise InputError(f"bad JSON at line {first_line}: nested too deeply; flatten it") from None
    except ValueError as error:  # a number of thousands of digits, NaN, an infinity
        reason = str(error).partition(";")[0]
        raise InputError(f"bad JSON at line {first_line}: {reason}; correct the number") from None


def _reject_constant(constant: str) -> object:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{quote(text)} is too large for a float")
    return value


def read_list(path: Path) -> JsonRows:
    """Read a whole file that holds a JSON list. Raises InputError with the file's name."""
    try:
        rows = parse_json(path.read_bytes().removeprefix(BOM), 1)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if not isinstance(rows, list):
        raise InputError(f"{path}: is not a list of rows; {HINT}")
    return JsonRows(path.name, rows, lines=False)
