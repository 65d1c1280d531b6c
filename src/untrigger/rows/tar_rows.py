"""WebDataset storage of rows: members of a tar file whose names differ only in their suffix are one row.

``0001.json`` holds the row's keys, ``0001.txt`` its caption, ``0001.jpg`` or ``0001.0.png``, ``0001.1.png`` its images.
Several images need numbers, or their names in ``images`` of the JSON: tar files do not keep the order that was meant.
The files stay on disk; nothing is unpacked. Source: the format of github.com/webdataset/webdataset.
"""

from __future__ import annotations

import io
import re
import tarfile
from array import array
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import cast, final

from untrigger.errors import InputError, UnreadableFile
from untrigger.rows.images import quote
from untrigger.rows.keys import is_empty
from untrigger.rows.shards import merged_name
from untrigger.rows.storage import Row, Rows, Unreadable, dump, parse_json

_IMAGES = ("png", "jpg", "jpeg", "webp", "gif", "bmp")
_NUMBERED = re.compile(r"(?:(?:images?|img)?[._-]?)?([0-9]{1,9})\.[a-z]+")
_MAX_TEXT = 2**20  # bytes of a member that is neither JSON nor an image and is still taken as a text
Member = tuple[str, int, int]  # suffix, offset, size


@final
class TarRows(Rows):
    """Rows of one or more uncompressed tar files."""

    inline = True

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        self._path, self._files = path, [file.absolute() for file in files]
        self._names: list[str] = []  # by row
        self._file_of, self._first = array("L"), array("Q")  # by row: its file and its first member
        self._suffixes: list[str] = []
        self._offsets, self._sizes = array("Q"), array("Q")
        for number, file in enumerate(self._files):
            self._scan(number, file)
        self._first.append(len(self._offsets))

    def _scan(self, number: int, path: Path) -> None:
        last, names = None, set[str]()
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    name = PurePosixPath(member.name)
                    if member.isdir() or name.name.startswith("."):
                        continue
                    if not member.isreg() or member.issparse():
                        raise InputError(f"{path}: {quote(member.name)} is no plain file; leave links out")
                    stem, _, suffix = name.name.partition(".")
                    key = str(name.with_name(stem))
                    if key != last:
                        if key in names:
                            raise InputError(
                                f"{path}: members of {quote(key)} do not lie side by side; sort them by name"
                            )
                        names.add(key)
                        self._names.append(key)
                        self._file_of.append(number)
                        self._first.append(len(self._offsets))
                        last = key
                    self._suffixes.append(suffix.lower())
                    self._offsets.append(member.offset_data)
                    self._sizes.append(member.size)
                    tar.members = []  # type: ignore[assignment]  # or it keeps every header in memory
        except tarfile.TarError as error:
            raise InputError(f"{path}: cannot be read ({quote(str(error))[1:-1]}); write the tar file again") from None

    def __len__(self) -> int:
        return len(self._names)

    def _members(self, index: int) -> list[Member]:
        span = range(self._first[index], self._first[index + 1])
        return [(self._suffixes[k], self._offsets[k], self._sizes[k]) for k in span]

    def _content(self, index: int) -> list[tuple[str, bytes]]:
        """Suffix and bytes of each member of a row."""
        content: list[tuple[str, bytes]] = []
        path, members = self._files[self._file_of[index]], self._members(index)
        try:
            with path.open("rb") as file:
                for suffix, offset, size in members:
                    file.seek(offset)
                    content.append((suffix, file.read(size)))
        except OSError as error:
            raise UnreadableFile(f"{path}: cannot be read ({error.strerror or error}); check its drive") from None
        for (suffix, _, size), (_, member) in zip(members, content, strict=True):
            if len(member) < size:
                raise InputError(f"{quote(f'{self._names[index]}.{suffix}')} is cut short; write the tar file again")
        return content

    def __getitem__(self, index: int) -> object:
        name = self._names[index]
        try:
            return _row(name, self._content(index))
        except UnreadableFile:
            raise
        except InputError as error:
            return Unreadable(name, str(error))

    def write(self, folder: Path, rows: Iterable[tuple[int, Row | None]], keys: Collection[str] | None = None) -> None:
        names = set[str]()
        with tarfile.open(folder / merged_name(self._path.name), "w") as tar:
            for index, row in rows:
                name = self._names[index] if row is None else f"{index + 1:08}"
                if row is None and name in names:  # of rows in two shards; one after the other they would be one row
                    row = cast(Row, self[index])
                while name in names:
                    name += "_"
                names.add(name)
                for suffix, content in self._content(index) if row is None else _new_members(row):
                    info = tarfile.TarInfo(f"{name}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def _row(name: str, content: Sequence[tuple[str, bytes]]) -> Row:
    """The keys of the JSON member, the caption, and the images in the order of the file."""
    row: Row = {"id": name}
    images: dict[str, bytes] = {}
    suffixes = [suffix for suffix, _ in content]
    if twice := next((suffix for suffix in suffixes if suffixes.count(suffix) > 1), None):
        raise InputError(f"has two members {quote(f'{name}.{twice}')}; keep one of them")
    for suffix, member in sorted(content, key=lambda each: each[0] != "json"):
        if suffix == "json":
            fields = parse_json(member, 1)
            if not isinstance(fields, dict):
                raise InputError(f"{quote(f'{name}.json')} is no object; write the row's keys")
            row |= cast(Row, fields)
        elif suffix.rpartition(".")[2] in _IMAGES:
            images[f"{PurePosixPath(name).name}.{suffix}"] = member
        else:
            key, text = "text" if suffix == "txt" else suffix, _text(member)
            if not is_empty(row.get(key)) and row[key] != text:
                raise InputError(f"has {quote(key)} in its JSON and in a member of its own; keep one of them")
            row[key] = text
    if images:
        row["images"] = [{"bytes": member, "path": None} for member in _ordered(row, images)]
    if row.get("caption") == row.get("text"):  # img2dataset writes both
        row.pop("caption", None)
    return row


def _text(member: bytes) -> object:
    try:
        return member.decode() if len(member) < _MAX_TEXT else member
    except UnicodeDecodeError:
        return member


def _ordered(row: Row, images: dict[str, bytes]) -> list[bytes]:
    """Images in the order in which the row's own keys name them; a row that names others is refused later."""
    for key in ("image", "images"):
        value = row.get(key)
        names = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        files = [PurePosixPath(name).name for name in names if isinstance(name, str)]
        if files and set(files) == set(images):
            del row[key]
            return [images[file] for file in files]
        if key == "images" and not is_empty(value):
            raise InputError("has 'images' that are not its own members; name them as in the tar file, or leave it out")
    if len(images) == 1:
        return list(images.values())
    numbers = {name: _NUMBERED.fullmatch(name.partition(".")[2]) for name in images}
    by_number = {int(match[1]): images[name] for name, match in numbers.items() if match}
    if len(by_number) < len(images):
        listed = ", ".join(map(quote, list(images)[:4])) + ", ..." * (len(images) > 4)
        raise InputError(f"has several images ({listed}); number them, or list them as 'images' in the JSON")
    return [by_number[number] for number in sorted(by_number)]


def _new_members(row: Row) -> list[tuple[str, bytes]]:
    images = cast("list[dict[str, bytes]]", row.get("images") or [])
    fields = {key: value for key, value in row.items() if key != "images"}
    return [("json", dump(fields)), *((f"{k}.png", image["bytes"]) for k, image in enumerate(images))]
