"""CSV storage of rows: the ``metadata.csv`` of an image folder. Every value is a text."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, final

from untrigger.errors import InputError
from untrigger.rows.images import quote
from untrigger.rows.storage import Row, Rows, Unreadable


@final
class CsvRows(Rows):
    """Rows of a CSV file, in memory; the first line names the keys.

    Python's reader keeps every value as it stands. Arrow's would make numbers of captions that consist of digits.
    """

    def __init__(self, path: Path) -> None:
        self._name = path.name
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file, strict=True)
                self._names = list(reader.fieldnames or ())
                self._rows = [_row(fields) for fields in reader]
        except (csv.Error, UnicodeDecodeError) as error:
            reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else quote(str(error))[1:-1]
            raise InputError(f"{path}: bad CSV: {reason}; save it as CSV in UTF-8 with a line of names") from None
        if len(set(self._names)) < len(self._names):
            raise InputError(f"{path}: two columns have the same name; rename one")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> object:
        return self._rows[index]

    def write(self, folder: Path, rows: Iterable[tuple[int, Row | None]], keys: Collection[str] | None = None) -> None:
        names = self._names if keys is None else ["file_name", "prompt", *(n for n in self._names if n in keys)]
        with (folder / self._name).open("w", encoding="utf-8", newline="") as file:
            # With another end of line than \r\n, Python 3.11 leaves a text's \r unquoted, which ends the row.
            writer = csv.DictWriter(file, list(dict.fromkeys(names)))
            writer.writeheader()
            for index, row in rows:
                fields = self._rows[index] if row is None else row
                if isinstance(fields, dict):
                    writer.writerow(fields)


def _row(fields: Mapping[str | Any, object]) -> object:
    """Fields of a line. A line that is longer or shorter than the first is no row."""
    if None in fields or None in fields.values():
        text = ",".join(str(value) for value in fields.values() if value is not None)
        return Unreadable(text, "has more or fewer fields than the first line has names; quote commas in texts")
    return dict(fields)
