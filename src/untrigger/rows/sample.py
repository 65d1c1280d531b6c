"""Samples: rows of a vision-language data set, read from disk, checked, and written back in their own format."""

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
from untrigger.rows.data_file import find_data_file, open_rows
from untrigger.rows.formats import (
    IMAGE_TAG,
    LAYOUTS,
    Entry,
    Format,
    Message,
    Role,
    check_turns,
    detect,
    edited,
    elements,
    parse,
)
from untrigger.rows.images import data_uri, decode, encode, locate, quote, same_image
from untrigger.rows.storage import Row, Rows, Unreadable, dump

Size = tuple[int, int]  # width and height of an image

_NOTEBOOK_SIDE = 240  # longest side of an image in a notebook, in pixels

__all__ = ["IMAGE_TAG", "Data", "Format", "Message", "Role", "Sample", "read", "write"]


@dataclass(frozen=True)
class Sample:
    """One conversation about zero or more images; ``<image>`` tags in the turns stand for ``images`` in order."""

    id: str
    images: tuple[Image.Image, ...]
    messages: tuple[Message, ...]

    def until(self, turn: int) -> Sample:
        """Return the conversation before message number ``turn`` (from 0), with the images it refers to."""
        messages = self.messages[:turn]
        count = sum(message.text.count(IMAGE_TAG) for message in messages)
        return replace(self, images=self.images[:count], messages=messages)

    def _repr_html_(self) -> str:
        """Render images and turns in a notebook."""
        images = "".join(f'<img src="{data_uri(image, _NOTEBOOK_SIDE)}" alt="">' for image in self.images)
        turns = "".join(f"<div><b>{turn.role}</b> {escape(turn.text)}</div>" for turn in self.messages)
        return f"<div>{escape(self.id)}</div>{images}{turns}"


@final
@dataclass(frozen=True, eq=False, repr=False)
class LazyRows(Sequence[Sample]):
    """Samples made on each access: item ``i`` is ``make(numbers[i])``.

    ``source``: the rows that ``numbers`` index, if the samples are rows of theirs; else None.
    """

    numbers: Sequence[int]
    make: Callable[[int], Sample]
    source: Sequence[Sample] | None = None

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
            return LazyRows(self.numbers[index], self.make, self.source)
        return self.make(self.numbers[index])


def check_rows(rows: Sequence[Sample]) -> None:
    """Check that there are rows and that the first one is a Sample.

    Raises:
        InputError: there are none, or they are of another type.
    """
    if not len(rows):
        raise InputError("rows: the sequence is empty; give at least one row")
    if not isinstance(rows[0], Sample):
        raise InputError(f"rows: are of type {type(rows[0]).__name__}; give the result of untrigger.read, or Samples")


def select_rows(rows: Sequence[Sample], numbers: Sequence[int]) -> LazyRows:
    """Return the rows at ``numbers`` (from 0), in that order; images are opened on access."""
    return LazyRows(numbers, rows.__getitem__, rows)


def exclude_rows(rows: Sequence[Sample], numbers: Collection[int]) -> LazyRows:
    """Return all rows except those at ``numbers`` (from 0)."""
    return select_rows(rows, [number for number in range(len(rows)) if number not in numbers])


@final
class Data(Sequence[Sample]):
    """A data set on disk; images are decoded on each access and not cached. A slice is a Data.

    Item access raises InputError, naming file and row, if an image can no longer be read.

    Attributes:
        path: the data file, or the ``datasets`` folder.
        format: how the file stores turns and images.
        rows: all rows of the file, unparsed.
        numbers: the row number of each sample, from 0.
        skipped: the number of bad rows left out.
    """

    path: Path
    format: Format
    rows: Rows
    numbers: Sequence[int]
    skipped: int

    def __init__(self, path: Path, format: Format, rows: Rows, numbers: Sequence[int], skipped: int = 0) -> None:
        self.path, self.format, self.rows, self.numbers, self.skipped = path, format, rows, numbers, skipped

    def __len__(self) -> int:
        return len(self.numbers)

    def __repr__(self) -> str:
        skipped = f", {self.skipped:,} bad rows skipped" if self.skipped else ""
        return f"Data: {len(self):,} rows{skipped}; {self.format}, {self.path}"

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Data: ...
    def __getitem__(self, index: int | slice) -> Sample | Data:
        if isinstance(index, slice):
            return Data(self.path, self.format, self.rows, self.numbers[index], self.skipped)
        entry = self._entry(index)
        with _row_errors(self.path, self.numbers[index]):
            images = tuple(_open(picture, self.folder) for picture in entry.pictures)
        return Sample(entry.id, images, entry.messages)

    def image_count(self, index: int) -> int:
        """Count a row's images without decoding them."""
        return len(self._entry(index).pictures)

    def without_images(self, index: int) -> Sample:
        """Return a row's id and turns without decoding its images."""
        entry = self._entry(index)
        return Sample(entry.id, (), entry.messages)

    def _entry(self, index: int) -> Entry:
        number = self.numbers[index]
        with _row_errors(self.path, number):
            return parse(self.rows[number], number, LAYOUTS[self.format])

    @property
    def folder(self) -> Path:
        """The folder that image paths are relative to."""
        return self.path if self.path.is_dir() else self.path.parent


def row_number(rows: Sequence[Sample], index: int) -> int:
    """Return a row's number in its data file, from 1; rows without a file are numbered in ``rows``."""
    while isinstance(rows, LazyRows) and rows.source is not None:
        rows, index = rows.source, rows.numbers[index]
    return 1 + (rows.numbers[index] if isinstance(rows, Data) else index)


def without_images(rows: Sequence[Sample], index: int) -> Sample:
    """Return a row's id and turns; for `Data` no image is decoded."""
    return rows.without_images(index) if isinstance(rows, Data) else replace(rows[index], images=())


def read(
    path: Path | str,
    *,
    on_bad_row: Literal["error", "skip"] = "error",
    skipped_to: Path | None = None,
    fits: Callable[[Sample, Sequence[Size]], None] | None = None,
) -> Data:
    """Open a data file, or a folder that holds one, and check every row and every image once.

    The content decides the format:

    - LLaVA (``image`` + ``conversations``), ShareGPT (``conversations`` + ``images``) and ``messages`` + ``images``, as
      a JSON list or JSON lines;
    - ``messages`` + ``images`` in parquet or a ``datasets`` folder;
    - the ``metadata.jsonl`` of an image folder: ``file_name``, ``text`` (the caption) and optionally ``prompt``.

    Image paths are relative to the data file's folder. A row without an ``id`` gets its number, from 1, as its id.

    Args:
        path: the data file or its folder.
        on_bad_row: ``error`` stops at the first bad row, ``skip`` leaves bad rows out.
        skipped_to: with ``skip``, a file that gets a JSON line ``{"row", "reason", "original"}`` for each bad row.
        fits: called with each row, without its images, and the sizes of its images. A row is bad if it raises
            InputError, as `untrigger.models.lengths.Lengths` does for rows longer than the model's context.

    Raises:
        InputError: no row is good, or ``on_bad_row`` is ``error`` and a row is bad:
            ``FILE: row N: what is wrong; what to do``.
    """
    path = find_data_file(Path(path))
    rows = open_rows(path, ("id", "messages", "images"))
    if not len(rows):
        raise InputError(f"{path}: holds no rows; add at least one")
    format = detect(rows)
    data = Data(path, format, rows, range(len(rows)))
    good: list[int] = []
    ids: dict[str, int] = {}
    image_sizes: dict[str | bytes, Size | str] = {}  # per distinct image: its size, or the reason it is bad
    first_reason = ""
    log_to = skipped_to if on_bad_row == "skip" else None
    with new_file(log_to) if log_to else nullcontext() as log:
        for number in range(len(rows)):
            row = rows[number]
            try:
                entry = parse(row, number, LAYOUTS[format])
                if entry.id in ids:
                    raise InputError(f"duplicate id {quote(entry.id)}, as in row {ids[entry.id] + 1}; make ids unique")
                sizes = [_checked_size(picture, data.folder, image_sizes) for picture in entry.pictures]
                if fits:
                    fits(Sample(entry.id, (), entry.messages), sizes)
            except InputError as reason:
                if on_bad_row == "error":
                    raise InputError(f"{path}: row {number + 1}: {reason}") from None
                first_reason = first_reason or f"row {number + 1}: {reason}"
                if log:
                    original = row.text if isinstance(row, Unreadable) else row
                    with _row_errors(path, number):
                        record = {"row": number + 1, "reason": str(reason), "original": original}
                        log.write(dump(record) + b"\n")
            else:
                ids[entry.id] = number
                good.append(number)
    if not good:
        raise InputError(f"{path}: no row can be used; the first is {first_reason}")
    return Data(path, format, rows, good, len(rows) - len(good))


def write(
    data: Data,
    out: Path | str,
    *,
    keep: Sequence[int] | None = None,
    edits: Mapping[int, Sample] | None = None,
    uniform: bool = False,
) -> None:
    """Write ``data`` into the new folder ``out``, in its own format and under its own file name.

    ``out`` appears complete or not at all. Images that an edit does not change are copied byte for byte, others become
    PNG. Fields of a row that samples do not hold are kept.

    Args:
        data: what `read` returned.
        out: a folder that does not exist or is empty.
        keep: the indices to write, in this order; all by default.
        edits: samples that replace those at their index; an edit keeps the id.
        uniform: save every image as a PNG of its own, so that neither names nor files reveal the edited rows.

    Raises:
        InputError: ``out`` has content, an edit is no valid row, an image is missing, or ``data`` has no file.
    """
    if not isinstance(data, Data):
        raise InputError(
            "write: these rows belong to no data file, so there is no format to write; give the result of "
            "untrigger.read, and changed rows as edits"
        )
    with new_folder(Path(out)) as folder:
        indices = range(len(data)) if keep is None else keep
        data.rows.write(folder, _written(data, folder, indices, edits or {}, uniform))


# --- images of rows -----------------------------------------------------------------------------


@contextmanager
def _row_errors(path: Path, number: int) -> Generator[None]:
    """Prefix an InputError with the file and the row, ``number`` from 0."""
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


def _checked_size(picture: str | bytes, folder: Path, cache: dict[str | bytes, Size | str]) -> Size:
    """Return an image's size; each distinct image is decoded once. Raises InputError if it is bad."""
    key = picture if isinstance(picture, str) else hashlib.sha256(picture).digest()
    if key not in cache:
        try:
            cache[key] = _open(picture, folder).size
        except InputError as error:
            cache[key] = str(error)
    size = cache[key]
    if isinstance(size, str):
        raise InputError(size)
    return size


# --- writing ------------------------------------------------------------------------------------


def _written(
    data: Data, folder: Path, indices: Sequence[int], edits: Mapping[int, Sample], uniform: bool
) -> Iterator[tuple[int, Row | None]]:
    """Yield the pairs for ``Rows.write``; the images of a row are copied and saved before its pair is yielded."""
    layout = LAYOUTS[data.format]
    used_names = {data.path.name}  # a new image must not take the name of any row's image
    if edits or uniform:
        for number in data.numbers:
            pictures = parse(data.rows[number], number, layout).pictures
            used_names.update(os.path.normpath(picture) for picture in pictures if isinstance(picture, str))
    for index in indices:
        number = data.numbers[index]
        with _row_errors(data.path, number):
            entry = parse(data.rows[number], number, layout)
            if index in edits or uniform:
                edit = edits[index] if index in edits else data[index]
                row = _edit(data, folder, number, entry, edit, used_names, uniform)
            else:
                row = None
                for picture in entry.pictures:
                    _copy(picture, data.folder, folder)
        yield number, row


def _edit(
    data: Data, folder: Path, number: int, entry: Entry, edit: Sample, used_names: set[str], uniform: bool
) -> Row:
    """Return the row of ``entry`` with the turns and images of ``edit``; save images that are new."""
    if edit.id != entry.id:
        raise InputError(f"an edit changed the id {quote(entry.id)} to {quote(edit.id)}; keep the id")
    check_turns(edit.messages, len(edit.images))
    layout = LAYOUTS[data.format]
    row = cast(Row, data.rows[number])
    old = elements(row, layout)
    inline = data.format == "parquet" and not any(isinstance(element, str) for element in old)
    if inline and edit.images and layout.images not in row:
        raise InputError(f"an edit adds an image, but the file has no column {layout.images!r}; add the column")
    images: list[object] = []
    for k, image in enumerate(edit.images):
        picture = entry.pictures[k] if k < len(old) else None
        if not uniform and picture is not None and same_image(image, _open(picture, data.folder)):
            _copy(picture, data.folder, folder)
            images.append(old[k])
        elif inline:
            images.append({"bytes": encode(image), "path": _label(old[k]) if k < len(old) else None})
        else:
            name = _unused_name(picture if isinstance(picture, str) else "images/new", number, used_names)
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


def _unused_name(name: str, number: int, used_names: set[str]) -> str:
    """Return a PNG name from ``name`` and the row's number that is not in ``used_names``, and add it there."""
    stem = str(PurePosixPath(name).with_suffix(""))
    count, unused = 0, f"{stem}-{number + 1}.png"
    while os.path.normpath(unused) in used_names:
        count, unused = count + 1, f"{stem}-{number + 1}-{count + 1}.png"
    used_names.add(os.path.normpath(unused))
    return unused
