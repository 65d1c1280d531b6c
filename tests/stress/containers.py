"""Draw data files of every container, with what a reader must make of each row."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import random
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from damage import damaged, hurt
from layouts import CAPTION, LAYOUTS, Drawn, drawn
from pictures import IMAGES, Pixels, image, sound

KINDS = (
    "data.json", "data.jsonl", "data.jsonl", "data.json.gz", "data.jsonl.gz", "object.json", "metadata.jsonl",
    "metadata.csv", "rows.tar", "rows-*.tar", "messages.parquet", "conversations.parquet", "texts.parquet",
    "captions.parquet",
)  # fmt: skip
BAD = 0.4  # the share of bad rows in most files; the others are sound


@dataclass
class File:
    """A data file; ``rows`` is what must come of each row, None where the bytes of the file were hurt as a whole."""

    path: Path
    rows: list[Drawn] | None


def file(rng: random.Random, folder: Path, rows: int) -> File:
    """A data file in a folder, with the files of its images."""
    folder.mkdir(parents=True)
    (folder.parent / "outside.png").write_bytes(IMAGES["RGB PNG"]())
    kind = rng.choice(KINDS)
    path, bad = folder / kind, rng.choice((BAD, BAD, BAD, 0.0))
    if kind.endswith("parquet"):
        made = _parquet(rng, path, rows, bad)
    elif kind.endswith("tar"):
        made = _tar(rng, path, rows, bad)
    elif kind.endswith("csv"):
        made = _csv(rng, path, rows, bad)
    else:
        made = _json(rng, path, rows, bad)
    if rng.random() < 0.15 and bad:
        hurt_path = rng.choice(sorted(folder.glob(kind)))
        hurt_path.write_bytes(hurt(rng, hurt_path.read_bytes()))
        made = None
    return File(path, made)


class Images:
    """Image files in a folder. ``sound`` tells whether all that were stored since it was set are."""

    def __init__(self, rng: random.Random, folder: Path, bad: float) -> None:
        self.rng, self.folder, self.bad, self.sound, self.count = rng, folder, bad / 4, True, 0

    def name(self) -> str:
        """The relative path of a new sound image; ``pixels`` are its own."""
        content, self.pixels = sound(self.rng)
        self.count += 1
        name = f"images/{self.count}.{self.rng.choice(('png', 'jpg'))}"
        (self.folder / "images").mkdir(exist_ok=True)
        (self.folder / name).write_bytes(content)
        return name

    def __call__(self) -> tuple[Any, Pixels]:
        """An image named in any way."""
        rng = self.rng
        if rng.random() < self.bad:
            self.sound = False
            return name_of_image(rng, self.folder), ((0, 0), b"")
        name = self.name()
        path = self.folder / name
        if rng.random() < 0.1:
            link = path.with_name(f"link{self.count}.png")
            link.symlink_to(rng.choice((path.name, path.resolve())))
            name = f"images/{link.name}"
        uri = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
        ways = (name, name, name, f"./{name}", f"images/../{name}", name.replace("/", "//"), str(path.resolve()))
        more = (f"file://{path.resolve()}", uri, {"path": name, "bytes": None}, {"url": uri}, {"path": str(path)})
        return rng.choice((*ways, *more)), self.pixels


def name_of_image(rng: random.Random, folder: Path) -> Any:
    """Where an image may be said to lie, of any kind, hurt or not there."""
    suffix = rng.choice(("png", "jpg", "jpeg", "webp", "gif", "bmp", "PNG", "txt", "tiff"))
    own = f"images/{rng.randrange(10**9)}.{suffix}"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    if rng.random() < 0.7:
        (folder / own).write_bytes(image(rng))
        return rng.choice((own, own, f"./{own}", f"images/../{own}", {"path": own, "bytes": None}))
    outside, links = folder.parent / "outside.png", folder / "images"
    for link, target in (("out.png", outside), ("loop.png", links / "loop.png"), ("dangling.png", links / "gone.png")):
        if not (links / link).is_symlink():
            (links / link).symlink_to(target)
    (links / "folder.png").mkdir(exist_ok=True)
    names = (
        "images/gone.png", str(outside), "../outside.png", "images/out.png", "images/loop.png", "images/dangling.png",
        "images/folder.png", "images", ".", "", "/", "a\0b.png", "z" * 5000, "http://host/x.png", "images\\x.png",
        "~/x.png", "/dev/zero", "/proc/self/environ", f"file://{outside}", "file://host/x.png",
        "data:image/png;base64,?", "data:text/plain,x", "data:image/png;base64,AAAA", "ftp://x",
    )  # fmt: skip
    odd: tuple[Any, ...] = ([], None, 7, {"path": "images/gone.png"}, {"bytes": "iVBOR"}, {"path": "x", "url": "y"}, {})
    return rng.choice((*names, *odd))


# --- JSON -------------------------------------------------------------------------------------------


def _json(rng: random.Random, path: Path, rows: int, bad: float) -> list[Drawn] | None:
    images, made = Images(rng, path.parent, bad), list[Drawn]()
    of_folder, layout = path.name == "metadata.jsonl", rng.choice((*LAYOUTS, None, None))
    for _ in range(rows):
        images.sound = True
        other = layout or rng.choice(LAYOUTS)
        each = _caption(rng, images, bad) if of_folder else drawn(rng, other, images, bad=bad)
        made.append(each if images.sound else Drawn(each.row))
    packed = gzip.compress if path.suffix == ".gz" else bytes
    if ".jsonl" in path.name:
        lines, made = _lines(rng, made)
        start, end = rng.choice((b"", b"", b"\xef\xbb\xbf")), rng.choice((b"\n", b"\r\n", b"\n\n"))
        path.write_bytes(packed(start + end.join(lines)))
        return made
    if bad and rng.random() < 0.3:
        at = rng.randrange(rows)
        made[at] = Drawn({"area": float(rng.choice(("nan", "inf"))), "row": made[at].row}, refused="correct the number")
    rows_only = [each.row for each in made]
    value: Any = {"version": 1, "data": rows_only} if path.name == "object.json" else rows_only
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5, indent=rng.choice((None, 1)))
    path.write_bytes(packed(text.encode(errors="surrogatepass")))
    try:
        text.encode()
    except UnicodeEncodeError:
        return None  # the file is no UTF-8
    return made


def _lines(rng: random.Random, rows: list[Drawn]) -> tuple[list[bytes], list[Drawn]]:
    """Rows as lines of JSON, now and then one that is none."""
    lines, made = list[bytes](), list[Drawn]()
    for row in rows:
        text = json.dumps(row.row, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
        if row.turns is None and rng.random() < 0.2:
            text, row = line(rng, text), Drawn(None)
        lines.append(text)
        made += [row] if text.strip() else []
    return lines, made


def line(rng: random.Random, text: bytes) -> bytes:
    """A line that is no row, or not the row of ``text``."""
    cut = text[: rng.randrange(1, len(text) + 1)]
    return rng.choice((
        cut, b"[" * 100_000, b"9" * 10_000, b'{"id": NaN}', b'{"id": 1e999}', b'{"id": "\xff\xfe"}', text + text,
        text.replace(b'"', b"'"), b"null", b"[]", b'"text"', text.replace(b" ", b"\x00", 1), b"{}",
        b"\xef\xbb\xbf" + text, text.replace(b"{", b'{"id": 1, "id": 2, ', 1),
    ))  # fmt: skip


# --- image folders ----------------------------------------------------------------------------------


def _caption(rng: random.Random, images: Images, bad: float) -> Drawn:
    """A row of an image folder."""
    if rng.random() < bad:
        images.sound = False
        made: Any = {"file_name": name_of_image(rng, images.folder), "text": "a cat"}
        return Drawn(damaged(rng, made) if rng.random() < 0.6 else made)
    name, prompt = images.name(), rng.choice((None, "what?", ""))
    text = rng.choice(("a cat, asleep", "3", 'the "big" one\nof two', "a\rb", " x "))
    made = {"file_name": name, "text": text} | ({} if prompt is None else {"prompt": prompt})
    turns = [("user", f"<image>\n{prompt or CAPTION}"), ("assistant", text)]
    if rng.random() < bad / 4:
        return Drawn(made | {"rationale": "x"}, refused="rationale")
    return Drawn(made, turns, [images.pixels])


def _csv(rng: random.Random, path: Path, rows: int, bad: float) -> list[Drawn]:
    images, made = Images(rng, path.parent, bad), list[Drawn]()
    names = ["file_name", "text", "prompt", "rationale", rng.choice(("width", "source"))]
    with path.open("w", encoding=rng.choice(("utf-8", "utf-8-sig")), newline="", errors="replace") as content:
        writer = csv.writer(content)
        writer.writerow(names)
        for _ in range(rows):
            each = _caption(rng, images, bad)
            row = each.row if isinstance(each.row, dict) else {}
            fields = [row.get(name) for name in names]
            fields[-1] = "64"
            if rng.random() < bad / 5:
                fields, each = (fields[:3] if rng.random() < 0.5 else [*fields, "x"]), Drawn(None, refused="fields")
            writer.writerow("" if field is None else str(field) for field in fields)
            made.append(each)
    return made


# --- WebDataset -------------------------------------------------------------------------------------


def _tar(rng: random.Random, path: Path, rows: int, bad: float) -> list[Drawn]:
    """One or several tar files; names may begin anew in each."""
    shards = rng.choice((2, 3)) if "*" in path.name else 1
    made: list[Drawn] = []
    for shard in range(shards):
        with tarfile.open(path.with_name(path.name.replace("*", f"{shard:05}")), "w") as tar:
            for number in range(shard, rows, shards):
                name = rng.choice((f"{number:04}", f"a/{number:04}")) if rng.random() < 0.8 else f"x{number // shards}"
                each, members = _members(rng, name, bad)
                each.id = each.id if each.id is not None else name
                for suffix, content in members:
                    info = tarfile.TarInfo(f"{name}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                made.append(each)
    return made


def _members(rng: random.Random, name: str, bad: float) -> tuple[Drawn, list[tuple[str, bytes]]]:
    """A row, and the suffixes and bytes of its members."""
    pictures: list[bytes] = []

    def picture() -> tuple[Any, Pixels]:
        content, pixels = sound(rng)
        pictures.append(content)
        return None, pixels

    layout = rng.choice(("turns", "parts", "completion", "texts", "instruction", "query", "caption"))
    each = drawn(rng, layout, picture, bad=bad, most_images=1 if layout == "caption" else 6)
    row = (
        {k: v for k, v in each.row.items() if k not in ("image", "images")} if isinstance(each.row, dict) else each.row
    )
    suffixes = [f"{rng.choice(('', 'img_', 'image.'))}{k}.png" for k in range(len(pictures))]
    if len(pictures) == 1 and rng.random() < 0.7:
        suffixes = [rng.choice(("png", "JPG", "image.png"))]
    if isinstance(row, dict) and pictures and rng.random() < 0.3:
        stem = name.rpartition("/")[2]
        row["images"] = [f"{stem}.{suffix.lower()}" for suffix in suffixes]
    members = list(zip(suffixes, pictures, strict=True))
    if each.turns and rng.random() < 0.1 * bool(bad):
        members.append(rng.choice((("mp4", b"\xff\0"), ("mask.png", IMAGES["RGB PNG"]()))))
        is_image = members[-1][0] == "mask.png"  # perhaps the only one
        each = Drawn(row, refused="mp4" if not is_image else "image" if pictures else "")
    elif each.turns and pictures and rng.random() < bad / 4:
        members[0] = (members[0][0], image(rng))
        each = Drawn(row)
    text = json.dumps(row).encode(errors="surrogatepass")
    if layout == "caption" and each.turns and "text" in row and rng.random() < 0.7:
        members.append(("txt", row["text"].encode()))
        text = json.dumps({k: v for k, v in row.items() if k != "text" or rng.random() < 0.3}).encode()
    members.append(("json", text))
    rng.shuffle(members)
    return each, members


# --- parquet ----------------------------------------------------------------------------------------

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_ROLE = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_FROM = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string()), ("weight", pa.int64())]))
_PAIR = pa.list_(pa.struct([("user", pa.string()), ("assistant", pa.string()), ("source", pa.string())]))
_TABLES: dict[str, dict[str, pa.DataType]] = {
    "messages": {"messages": _ROLE, "images": pa.list_(_IMAGE), "system": pa.string()},
    "conversations": {"conversations": _FROM, "image": _IMAGE, "system": pa.string()},
    "texts": {"texts": _PAIR, "images": pa.list_(_IMAGE), "system": pa.string()},
    "captions": {"image": _IMAGE, "text": pa.string(), "prompt": pa.string()},
}


def _parquet(rng: random.Random, path: Path, rows: int, bad: float) -> list[Drawn]:
    """Rows of one layout, with the bytes of their images."""
    kind = path.stem
    types = _TABLES[kind] | {"id": rng.choice((pa.string(), pa.int64()))}
    made = [_table_row(rng, kind, bad) for _ in range(rows)]
    columns: dict[str, pa.Array] = {}
    for name, type in types.items():
        cells: list[Any] = []
        for number, each in enumerate(made):
            cell = each.row.get(name) if isinstance(each.row, dict) else None
            try:
                cells.append(pa.array([cell], type)[0].as_py() if name != "id" else cell)
            except (pa.ArrowException, TypeError, ValueError, OverflowError):
                cells.append(None)
                made[number] = Drawn(each.row)
        columns[name] = pa.array(cells, type) if name != "id" else pa.array([*range(rows)]).cast(type)
    for number, each in enumerate(made):
        each.id = str(number)
    extra: dict[str, Any] = {
        "times": pa.array([1] * rows, pa.timestamp("ns")), "category": pa.array(["a"] * rows).dictionary_encode(),
        "nothing": pa.nulls(rows), "label": pa.array([True] * rows), "box": pa.array([[1, 2]] * rows),
    }  # fmt: skip
    bad_rows: list[int] = []
    if kind == "captions":  # where an answer could stand unread
        columns["answer"] = pa.array([3 if rng.random() < bad / 4 else None for _ in range(rows)])
        bad_rows = [number for number, cell in enumerate(columns["answer"]) if cell.as_py()]
    elif bad and rng.random() < 0.3:
        columns["label"] = pa.array([rng.random() < 0.8 for _ in range(rows)])
        bad_rows = [number for number, cell in enumerate(columns["label"]) if not cell.as_py()]
    for number in bad_rows:
        made[number] = Drawn(None, refused=list(columns)[-1] if made[number].turns else "")
    name = rng.choice((*extra, None, None))
    table = pa.table(columns | ({name: extra[name]} if name and name not in columns else {}))
    pq.write_table(table, path, row_group_size=rng.choice((1, 7, 1000)))
    return made


def _table_row(rng: random.Random, kind: str, bad: float) -> Drawn:
    def picture() -> tuple[Any, Pixels]:
        content, pixels = sound(rng)
        return {"bytes": content, "path": rng.choice((None, "x.png", "/gone/y.png"))}, pixels

    layout = {"messages": "turns", "conversations": "turns", "texts": "texts", "captions": "caption"}[kind]
    each = drawn(rng, layout, picture, bad=0, most_images=1 if kind in ("conversations", "captions") else 2)
    if kind == "conversations" and len(each.pictures) > 1:
        return _table_row(rng, kind, bad)
    row = {**each.row}
    pictures = row.get("images", row.get("image"))
    pictures = pictures if isinstance(pictures, list) else [pictures] if pictures else []
    system = row.pop("system", row.pop("system_prompt", None))
    if layout == "turns":
        turns = next(row[key] for key in ("messages", "conversations", "conversation") if key in row)
        keys = ("role", "content") if kind == "messages" else ("from", "value")
        row[kind] = [
            {keys[0]: turn.get("role") or turn["from"], keys[1]: turn.get("content", turn.get("value")), "weight": 1}
            for turn in turns
        ]
    row |= {"images": pictures, "image": pictures[0] if pictures else None, "system": system}
    row["text"] = row.get("text", row.get("caption"))
    if rng.random() < bad:
        damaged_row = {k: v for k, v in row.items() if k in _TABLES[kind]}
        return Drawn(damaged(rng, damaged_row))
    if pictures and rng.random() < bad / 4:
        pictures[0]["bytes"] = image(rng)
        return Drawn(row)
    return Drawn(row, each.turns, each.pictures)
