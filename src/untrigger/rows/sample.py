"""Samples: rows of a vision-language data set, read from disk, checked, and written back in their own format."""

from __future__ import annotations

import hashlib
import logging
import shutil
from array import array
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any, Literal, cast, final, overload

from PIL import Image

from untrigger.errors import InputError, UnreadableFile
from untrigger.files import new_file, new_folder
from untrigger.rows.arrow_rows import open_stream
from untrigger.rows.data_file import find_data_file, open_rows
from untrigger.rows.formats import (
    REFERENCES,
    Entry,
    Picture,
    parse,
    read_keys,
    relocated,
    rewritten,
)
from untrigger.rows.images import (
    data_uri,
    decode,
    encode,
    is_data_uri,
    locate,
    png_uri,
    quote,
    relative_name,
    uri_bytes,
)
from untrigger.rows.layouts import LAYOUTS
from untrigger.rows.storage import Row, Rows, Unreadable, dump
from untrigger.rows.turns import IMAGE_TAG, Message, Role, check_turns

Size = tuple[int, int]  # width and height of an image

_log = logging.getLogger(__name__)
_CACHED_SIZES = 2**17  # images whose sizes are in memory
_STREAM = Path("stream.parquet")  # what rows without a file are called, and written as
_NOTEBOOK_SIDE = 240  # longest side of an image in a notebook, in pixels
_WRITTEN_KEYS = frozenset[str]().union(*map(read_keys, LAYOUTS)) - {REFERENCES}

__all__ = ["IMAGE_TAG", "Data", "Message", "Role", "Sample", "read", "write"]


@dataclass(frozen=True)
class Sample:
    """One conversation about zero or more images; ``<image>`` tags in the turns stand for ``images`` in order.

    ``references``: all true answers to the last question, for data that have several; empty where the last answer is
    the only one. Evaluation alone reads them.
    """

    id: str
    images: tuple[Image.Image, ...]
    messages: tuple[Message, ...]
    references: tuple[str, ...] = ()

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
        rows: all rows of the file, unparsed.
        numbers: the row number of each sample, from 0.
        skipped: the number of bad rows left out.
        ignored: keys of rows that are ignored, whatever they hold.
        folder: what image paths are relative to.
    """

    def __init__(
        self, path: Path, rows: Rows, numbers: Sequence[int], skipped: int = 0, ignored: Collection[str] = ()
    ) -> None:
        self.path, self.rows, self.numbers, self.skipped, self.ignored = path, rows, numbers, skipped, ignored
        self.folder = path if path.is_dir() else path.parent

    def __len__(self) -> int:
        return len(self.numbers)

    def __repr__(self) -> str:
        skipped = f", {self.skipped:,} bad rows skipped" if self.skipped else ""
        return f"Data: {len(self):,} rows{skipped}; {self.path}"

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Data: ...
    def __getitem__(self, index: int | slice) -> Sample | Data:
        if isinstance(index, slice):
            return Data(self.path, self.rows, self.numbers[index], self.skipped, self.ignored)
        entry = self.entry(index)
        with _row_errors(self.path, self.numbers[index]):
            return opened(entry, self.folder)

    def image_count(self, index: int) -> int:
        """Count a row's images without decoding them."""
        return len(self.entry(index).pictures)

    def without_images(self, index: int) -> Sample:
        """Return a row's id and turns without decoding its images."""
        entry = self.entry(index)
        return Sample(entry.id, (), entry.messages, entry.references)

    def entry(self, index: int) -> Entry:
        """Return a row parsed, with its images as they are stored."""
        number = self.numbers[index]
        with _row_errors(self.path, number):
            return parse(self.rows[number], number, self.ignored)


def row_number(rows: Sequence[Sample], index: int) -> int:
    """Return a row's number in its data file, from 1; rows without a file are numbered in ``rows``."""
    rows, index = _at_source(rows, index)
    return 1 + (rows.numbers[index] if isinstance(rows, Data) else index)


def _at_source(rows: Sequence[Sample], index: int) -> tuple[Sequence[Sample], int]:
    """The rows that selected ones are taken from, and the index there."""
    while isinstance(rows, LazyRows) and rows.source is not None:
        rows, index = rows.source, rows.numbers[index]
    return rows, index


def without_images(rows: Sequence[Sample], index: int) -> Sample:
    """Return a row's id and turns; for `Data`, and rows selected of it, no image is decoded."""
    rows, index = _at_source(rows, index)
    return rows.without_images(index) if isinstance(rows, Data) else replace(rows[index], images=())


def read(
    path: Path | str | Any,
    *,
    on_bad_row: Literal["error", "skip"] = "error",
    skipped_to: Path | None = None,
    fits: Callable[[Sample, Sequence[Size]], None] | None = None,
    ignore_keys: Collection[str] = (),
) -> Data:
    """Open a data file, a folder that holds one, or a data set of the hub; check every row and every image once.

    docs/data.md lists the files and rows that are read. Every key of a row is read, is known to be harmless, or is an
    error. Image paths are relative to the data file's folder. A row without an ``id`` gets its number, from 1, as its
    id; ids need not differ.

    Args:
        path: the data file, its folder, a pattern of parquet or tar files (``DIR/*.parquet``), or
            ``OWNER/NAME[:SPLIT]`` of the Hugging Face hub; or an IterableDataset (or Dataset) of `datasets`, which is
            read again in each pass, and so must give the same rows each time.
        on_bad_row: ``error`` stops at the first bad row, ``skip`` leaves bad rows out.
        skipped_to: with ``skip``, a file that gets a JSON line ``{"row", "reason", "original"}`` for each bad row.
        fits: called with each row, without its images, and the sizes of its images. A row is bad if it raises
            InputError, as `untrigger.models.lengths.Lengths` does for rows longer than the model's context.
        ignore_keys: keys of rows to ignore, whatever they hold.

    Raises:
        InputError: no row is good, or ``on_bad_row`` is ``error`` and a row is bad:
            ``FILE: row N: what is wrong; what to do``.
        UnreadableFile: an image is there but cannot be read; such a row is never skipped.
    """
    ignored = frozenset(ignore_keys)
    if isinstance(path, Path | str):
        path = find_data_file(Path(path))
        rows = open_rows(path, ignored)
    else:
        path, rows = _STREAM, open_stream(_STREAM, path)
    if not len(rows):
        raise InputError(f"{path}: holds no rows; add at least one")
    data = Data(path, rows, range(len(rows)), ignored=ignored)
    good = array("Q")
    with_images = 0
    image_sizes: dict[str | bytes, Size | str] = {}  # per image: its size, or the reason it is bad
    first_reason = ""
    log_to = skipped_to if on_bad_row == "skip" else None
    with new_file(log_to) if log_to else nullcontext() as log:
        for number in range(len(rows)):
            row = rows[number]
            try:
                entry = parse(row, number, ignored)
                sizes = [_checked_size(picture, data.folder, image_sizes) for picture in entry.pictures]
                if fits:
                    fits(Sample(entry.id, (), entry.messages), sizes)
            except InputError as reason:
                if on_bad_row == "error" or isinstance(reason, UnreadableFile):
                    raise type(reason)(f"{path}: row {number + 1}: {reason}") from None
                first_reason = first_reason or f"row {number + 1}: {reason}"
                if log:
                    original = row.text if isinstance(row, Unreadable) else row
                    with _row_errors(path, number):
                        record = {"row": number + 1, "reason": str(reason), "original": original}
                        log.write(dump(record) + b"\n")
            else:
                good.append(number)
                with_images += bool(entry.pictures)
    if not good:
        raise InputError(f"{path}: no row can be used; the first is {first_reason}")
    if not with_images:
        _log.warning("%s: no row has an image, so no trigger in an image can be found; is a key misspelled?", path)
    return Data(path, rows, good, len(rows) - len(good), ignored)


def write(
    data: Data, out: Path | str, *, keep: Sequence[int] | None = None, edits: Mapping[int, Sample] | None = None
) -> None:
    """Write ``data`` into the new folder ``out``, in its own format and under its own file name.

    ``out`` appears complete or not at all. Without ``edits`` rows and image files are copied as they are. With
    ``edits`` every row is written anew, edited or not: with no keys but those that are read and no ``references``, and
    each image as a PNG of its own that is named by the row. So nothing but text and pixels can reveal the edited rows.

    Args:
        data: what `read` returned.
        out: a folder that does not exist or is empty.
        keep: the indices to write, in this order; all by default.
        edits: samples that replace those at their index; an edit keeps the id.

    Raises:
        InputError: ``out`` has content, an edit is no valid row, an image is missing, or ``data`` has no file.
    """
    if not isinstance(data, Data):
        raise InputError(
            "write: these rows belong to no data file, so there is no format to write; give the result of "
            "untrigger.read, and changed rows as edits"
        )
    indices = range(len(data)) if keep is None else keep
    with new_folder(Path(out)) as folder:
        if edits is None:
            data.rows.write(folder, _copies(data, folder, indices))
        else:
            data.rows.write(folder, _edited(data, folder, indices, edits), _WRITTEN_KEYS)


# --- images of rows -----------------------------------------------------------------------------


@contextmanager
def _row_errors(path: Path, number: int) -> Generator[None]:
    """Prefix an InputError with the file and the row, ``number`` from 0."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"{path}: row {number + 1}: {error}") from None


def opened(entry: Entry, folder: Path) -> Sample:
    """The sample of a parsed row; image paths are relative to ``folder``. Raises InputError if one cannot be read."""
    images = tuple(_open(picture, folder) for picture in entry.pictures)
    return Sample(entry.id, images, entry.messages, entry.references)


def _open(picture: Picture, folder: Path) -> Image.Image:
    if isinstance(picture, bytes):
        return decode(picture, "an image")
    label = f"image {quote(picture)}"
    content = uri_bytes(picture, label)
    return decode(locate(folder, picture, label) if content is None else content, label)


def _checked_size(picture: str | bytes, folder: Path, cache: dict[str | bytes, Size | str]) -> Size:
    """Return an image's size; an image of the last rows is decoded once. Raises InputError if it is bad."""
    key = picture if isinstance(picture, str) else hashlib.sha256(picture).digest()
    if key not in cache:
        if len(cache) >= _CACHED_SIZES:
            cache.clear()
        try:
            cache[key] = _open(picture, folder).size
        except UnreadableFile:
            raise
        except InputError as error:
            cache[key] = str(error)
    size = cache[key]
    if isinstance(size, str):
        raise InputError(size)
    return size


# --- writing ------------------------------------------------------------------------------------


def _copies(data: Data, folder: Path, indices: Sequence[int]) -> Iterator[tuple[int, Row | None]]:
    """Yield the pairs for ``Rows.write``; the images of a row are copied before its pair is yielded."""
    for index in indices:
        number, entry = data.numbers[index], data.entry(index)
        with _row_errors(data.path, number):
            names = [_copy(picture, data.folder, folder) for picture in entry.pictures]
            moved = names != list(entry.pictures)
            row = relocated(cast(Row, data.rows[number]), entry, cast("list[str]", names)) if moved else None
        yield number, row


def _copy(picture: Picture, source: Path, target: Path) -> Picture:
    """Copy an image file to its place below ``target``; return its path relative to there."""
    if isinstance(picture, bytes) or is_data_uri(picture):
        return picture
    label = f"image {quote(picture)}"
    original, name = locate(source, picture, label), relative_name(source, picture, label)
    if not (target / name).exists():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(original, target / name)
    return name


def _edited(
    data: Data, folder: Path, indices: Sequence[int], edits: Mapping[int, Sample]
) -> Iterator[tuple[int, Row | None]]:
    """Yield the pairs for ``Rows.write``; the images of a row are saved before its pair is yielded."""
    for index in indices:
        number, entry = data.numbers[index], data.entry(index)
        sample = edits[index] if index in edits else data[index]
        with _row_errors(data.path, number):
            if sample.id != entry.id:
                raise InputError(f"an edit changed the id {quote(entry.id)} to {quote(sample.id)}; keep the id")
            check_turns(sample.messages, len(sample.images))
            style = entry.elements[0] if entry.elements else ({"bytes": b"inline"} if data.rows.inline else "")
            elements = [_saved(image, style, number, k, folder) for k, image in enumerate(sample.images)]
            yield number, rewritten(cast(Row, data.rows[number]), entry, sample.messages, elements)


def _saved(image: Image.Image, style: object, number: int, place: int, folder: Path) -> object:
    """Save image ``place`` of a row as PNG, inside the row or as a file, as the row had its first one."""
    content, name = encode(image), f"images/{number + 1}{f'-{place + 1}' * bool(place)}.png"
    inside = isinstance(style, bytes) or (isinstance(style, dict) and bool(style.get("bytes")))
    if isinstance(style, str) and is_data_uri(style):
        return png_uri(content)
    if inside:
        return content if isinstance(style, bytes) else {"bytes": content, "path": None}
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return {"bytes": None, "path": name} if isinstance(style, dict) else name
