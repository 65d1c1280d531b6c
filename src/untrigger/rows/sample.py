"""Samples: rows of a vision-language data set, and the formats they are read from and written to."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path, PurePosixPath
from typing import Literal, cast, final, overload

from PIL import Image

from untrigger.errors import InputError
from untrigger.files import new_file, new_folder
from untrigger.rows.formats import (
    IMAGE_TAG,
    LAYOUTS,
    Entry,
    Format,
    Message,
    Role,
    check,
    detect,
    edited,
    elements,
    parse,
)
from untrigger.rows.images import address, decode, encode, locate, quote, same
from untrigger.rows.storage import Row, Rows, Unreadable, dump, find, open_rows

Size = tuple[int, int]  # of an image: width and height

_PIXELS = 240  # longest side of a picture in a notebook

__all__ = ["IMAGE_TAG", "Data", "Format", "Message", "Role", "Sample", "read", "write"]


@dataclass(frozen=True)
class Sample:
    """One conversation about zero or more images; tags in the turns stand for ``images`` in order."""

    id: str
    images: tuple[Image.Image, ...]
    messages: tuple[Message, ...]

    def until(self, turn: int) -> Sample:
        """The conversation before this turn, with the images that it shows by then."""
        messages = self.messages[:turn]
        shown = sum(message.text.count(IMAGE_TAG) for message in messages)
        return replace(self, images=self.images[:shown], messages=messages)

    def _repr_html_(self) -> str:
        """Pictures and turns, for a notebook."""
        shown = "".join(f'<img src="{address(image, _PIXELS)}" alt="">' for image in self.images)
        turns = "".join(f"<div><b>{turn.role}</b> {escape(turn.text)}</div>" for turn in self.messages)
        return f"<div>{escape(self.id)}</div>{shown}{turns}"


@final
@dataclass(frozen=True, eq=False, repr=False)
class LazyRows(Sequence[Sample]):
    """Samples made on each access; item ``i`` is made from row ``numbers[i]`` of the data behind it."""

    numbers: Sequence[int]
    make: Callable[[int], Sample]
    behind: Sequence[Sample] | None = None  # that data, where the samples are its own

    def __len__(self) -> int:
        return len(self.numbers)

    def __repr__(self) -> str:
        return f"LazyRows: {len(self):,} rows"

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> LazyRows: ...
    def __getitem__(self, index: int | slice) -> Sample | LazyRows:
        if isinstance(index, slice):
            return LazyRows(self.numbers[index], self.make, self.behind)
        return self.make(self.numbers[index])


def check_rows(rows: Sequence[Sample]) -> None:
    """Raises InputError unless there are rows, and they are samples; the first one tells."""
    if not len(rows):
        raise InputError("rows: there are none; give some")
    if not isinstance(rows[0], Sample):
        raise InputError(f"rows: are of the type {type(rows[0]).__name__}; give what untrigger.read gives, or Samples")


def picked(rows: Sequence[Sample], numbers: Sequence[int]) -> LazyRows:
    """The rows of these numbers; images are opened when a row is asked for."""
    return LazyRows(numbers, rows.__getitem__, rows)


def without(rows: Sequence[Sample], numbers: Collection[int]) -> LazyRows:
    """All rows but those of these numbers."""
    return picked(rows, [number for number in range(len(rows)) if number not in numbers])


@final
class Data(Sequence[Sample]):
    """A data set on disk. It holds text and image names; images are decoded on each access and not kept.

    ``path`` is the data file (or the ``datasets`` folder), ``skipped`` the number of bad rows left out.
    Item access raises InputError, naming file and row, if an image can no longer be read. A slice is a Data.
    """

    path: Path
    format: Format
    rows: Rows  # all rows of the file, as they stand there
    numbers: Sequence[int]  # of each sample its row, from 0
    skipped: int

    def __init__(self, path: Path, format: Format, rows: Rows, numbers: Sequence[int], skipped: int = 0) -> None:
        self.path, self.format, self.rows, self.numbers, self.skipped = path, format, rows, numbers, skipped

    def __len__(self) -> int:
        return len(self.numbers)

    def __repr__(self) -> str:
        left_out = f", {self.skipped:,} bad ones left out" if self.skipped else ""
        return f"Data: {len(self):,} rows{left_out}; {self.format}, {self.path}"

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Data: ...
    def __getitem__(self, index: int | slice) -> Sample | Data:
        if isinstance(index, slice):
            return Data(self.path, self.format, self.rows, self.numbers[index], self.skipped)
        entry = self._entry(index)
        with _blame(self.path, self.numbers[index]):
            images = tuple(_open(picture, self.folder) for picture in entry.pictures)
        return Sample(entry.id, images, entry.messages)

    def image_count(self, index: int) -> int:
        """How many images a row shows; decodes none."""
        return len(self._entry(index).pictures)

    def told(self, index: int) -> Sample:
        """A row's turns without its images: decodes none."""
        entry = self._entry(index)
        return Sample(entry.id, (), entry.messages)

    def _entry(self, index: int) -> Entry:
        number = self.numbers[index]
        with _blame(self.path, number):
            return parse(self.rows[number], number, LAYOUTS[self.format])

    @property
    def folder(self) -> Path:
        """Where image paths begin."""
        return self.path if self.path.is_dir() else self.path.parent


def numbered(rows: Sequence[Sample], index: int) -> int:
    """A row's number, from 1, as it stands in its file; without a file as it stands in ``rows``."""
    while isinstance(rows, LazyRows) and rows.behind is not None:
        rows, index = rows.behind, rows.numbers[index]
    return 1 + (rows.numbers[index] if isinstance(rows, Data) else index)


def without_images(rows: Sequence[Sample], index: int) -> Sample:
    """A row's id and turns; decodes no image where the rows are those of a file."""
    return rows.told(index) if isinstance(rows, Data) else replace(rows[index], images=())


def read(
    path: Path | str,
    *,
    on_bad_row: Literal["error", "skip"] = "error",
    skipped_to: Path | None = None,
    fits: Callable[[Sample, Sequence[Size]], None] | None = None,
) -> Data:
    """Opens a data file, or a folder that holds one, and checks every row and every image once.

    Reads LLaVA (``image`` + ``conversations``), ShareGPT (``conversations`` + ``images``) and ``messages`` +
    ``images``, each as a JSON list or JSON lines, and ``messages`` + ``images`` in parquet or a ``datasets``
    folder; also the ``metadata.jsonl`` of an image folder (``file_name`` + ``text``, the caption, and where there
    is one ``prompt``). The content tells which. Image paths are relative to the data file's folder. A row's id is
    its own ``id``, or else its number from 1.

    A bad row raises InputError ``FILE: row N: what is wrong; what to do``. With ``on_bad_row="skip"`` it is
    left out, and ``skipped_to`` gets a JSON line ``{"row", "reason", "original"}`` for each. A row is also bad if
    ``fits``, given it without its images and the sizes of these, raises InputError: as
    `untrigger.models.lengths.Lengths` does for rows that are longer than a model reads.
    """
    path = find(Path(path))
    rows = open_rows(path, ("id", "messages", "images"))
    if not len(rows):
        raise InputError(f"{path}: holds no rows; add some")
    format = detect(rows)
    data = Data(path, format, rows, range(len(rows)))
    good: list[int] = []
    ids: dict[str, int] = {}
    seen: dict[str | bytes, Size | str] = {}  # of each distinct image its size, or what is wrong with it
    first_reason = ""
    log_to = skipped_to if on_bad_row == "skip" else None
    with new_file(log_to) if log_to else nullcontext() as log:
        for number in range(len(rows)):
            row = rows[number]
            try:
                entry = parse(row, number, LAYOUTS[format])
                if entry.id in ids:
                    other = f"row {ids[entry.id] + 1}"
                    raise InputError(f"duplicate id {quote(entry.id)}, as in {other}; make ids unique")
                sizes: list[Size] = []
                for picture in entry.pictures:
                    key = picture if isinstance(picture, str) else hashlib.sha256(picture).digest()
                    if key not in seen:
                        seen[key] = _looked_at(picture, data.folder)
                    size = seen[key]
                    if isinstance(size, str):
                        raise InputError(size)
                    sizes.append(size)
                if fits:
                    fits(Sample(entry.id, (), entry.messages), sizes)
            except InputError as reason:
                if on_bad_row == "error":
                    raise InputError(f"{path}: row {number + 1}: {reason}") from None
                first_reason = first_reason or f"row {number + 1}: {reason}"
                if log:
                    original = row.text if isinstance(row, Unreadable) else row
                    with _blame(path, number):
                        record = {"row": number + 1, "reason": str(reason), "original": original}
                        log.write(dump(record) + b"\n")
            else:
                ids[entry.id] = number
                good.append(number)
    if not good:
        raise InputError(f"{path}: holds no good row; the first is {first_reason}")
    return Data(path, format, rows, good, len(rows) - len(good))


def write(
    data: Data,
    out: Path | str,
    *,
    keep: Sequence[int] | None = None,
    edits: Mapping[int, Sample] | None = None,
    uniform: bool = False,
) -> None:
    """Writes ``data`` into the new folder ``out``, in its own format, under its own file name.

    ``keep``: the indices to write, in this order (all by default). ``edits``: samples to write in place of
    those at their index; ids must stay. Images that an edit left as they were are copied byte for byte,
    others become PNG; fields of a row that samples do not hold survive. With ``uniform`` every image becomes
    a PNG of its own, so that neither names nor files tell edits apart. ``out`` appears whole or not at all.
    Raises InputError if ``out`` has content, an edit is no valid row, an image has gone, or rows lie in memory alone.
    """
    if not isinstance(data, Data):
        raise InputError(
            "write: these rows have no file whose format they could have; give what `untrigger.read` gives, and the "
            "changed rows as edits"
        )
    with new_folder(Path(out)) as folder:
        indices = range(len(data)) if keep is None else keep
        data.rows.write(folder, _written(data, folder, indices, edits or {}, uniform))


# --- images of rows -----------------------------------------------------------------------------


@contextmanager
def _blame(path: Path, number: int) -> Generator[None]:
    """Says in which row it went wrong."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: row {number + 1}: {error}") from None


def _open(picture: str | bytes, folder: Path) -> Image.Image:
    if isinstance(picture, bytes):
        return decode(picture, "an image")
    return decode(_file(picture, folder), f"image {quote(picture)}")


def _file(picture: str, folder: Path) -> Path:
    return locate(folder, picture, f"image {quote(picture)}")


def _looked_at(picture: str | bytes, folder: Path) -> Size | str:
    """An image's size, or what is wrong with it."""
    try:
        return _open(picture, folder).size
    except InputError as error:
        return str(error)


# --- writing ------------------------------------------------------------------------------------


def _written(
    data: Data, folder: Path, indices: Sequence[int], edits: Mapping[int, Sample], uniform: bool
) -> Iterator[tuple[int, Row | None]]:
    """Pairs for ``Rows.write``; copies and saves the images of a row before it gives the row."""
    layout = LAYOUTS[data.format]
    taken = {data.path.name}  # names that no new image may have: those of all rows
    if edits or uniform:
        for number in data.numbers:
            pictures = parse(data.rows[number], number, layout).pictures
            taken.update(os.path.normpath(picture) for picture in pictures if isinstance(picture, str))
    for index in indices:
        number = data.numbers[index]
        with _blame(data.path, number):
            entry = parse(data.rows[number], number, layout)
            if index in edits or uniform:
                edit = edits[index] if index in edits else data[index]
                row = _edit(data, folder, number, entry, edit, taken, uniform)
            else:
                row = None
                for picture in entry.pictures:
                    _copy(picture, data.folder, folder)
        yield number, row


def _edit(data: Data, folder: Path, number: int, entry: Entry, edit: Sample, taken: set[str], uniform: bool) -> Row:
    """The row of ``entry`` with the turns and images of ``edit``, which are saved if they are new."""
    if edit.id != entry.id:
        raise InputError(f"an edit changed the id {quote(entry.id)} to {quote(edit.id)}; keep the id")
    check(edit.messages, len(edit.images))
    layout = LAYOUTS[data.format]
    row = cast(Row, data.rows[number])
    old = elements(row, layout)
    inline = data.format == "parquet" and not any(isinstance(element, str) for element in old)
    if inline and edit.images and layout.images not in row:
        raise InputError(f"an edit adds an image, but there is no column {layout.images!r}; add the column")
    images: list[object] = []
    for k, image in enumerate(edit.images):
        picture = entry.pictures[k] if k < len(old) else None
        if not uniform and picture is not None and same(image, _open(picture, data.folder)):
            _copy(picture, data.folder, folder)
            images.append(old[k])
        elif inline:
            images.append({"bytes": encode(image), "path": _label(old[k]) if k < len(old) else None})
        else:
            name = _free_name(picture if isinstance(picture, str) else "images/new", number, taken)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(encode(image))
            images.append(name)
    return edited(row, layout, edit.messages, images)


def _copy(picture: str | bytes, source: Path, target: Path) -> None:
    if isinstance(picture, str) and not (target / picture).exists():
        original = _file(picture, source)
        (target / picture).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(original, target / picture)


def _label(element: object) -> str | None:
    path = element.get("path") if isinstance(element, dict) else None
    return f"{os.path.splitext(path)[0]}.png" if isinstance(path, str) else None


def _free_name(name: str, number: int, taken: set[str]) -> str:
    stem = str(PurePosixPath(name).with_suffix(""))
    count, free = 0, f"{stem}-{number + 1}.png"
    while os.path.normpath(free) in taken:
        count, free = count + 1, f"{stem}-{number + 1}-{count + 1}.png"
    taken.add(os.path.normpath(free))
    return free
