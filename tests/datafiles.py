"""Small data sets on disk in every supported format, and helpers that read them without this package."""

from __future__ import annotations

import io
import json
import struct
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from untrigger.errors import InputError
from untrigger.rows.sample import Sample, read

Row = dict[str, Any]
TEXT_FORMATS = ["llava", "sharegpt", "messages"]
TEXT_KINDS = [f"{format}.{suffix}" for format in TEXT_FORMATS for suffix in ("json", "jsonl")]
KINDS = [*TEXT_KINDS, "parts.jsonl", "parquet.parquet", "parquet.folder"]
IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TURN_TYPE = pa.struct([("role", pa.string()), ("content", pa.string())])
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("messages", pa.list_(TURN_TYPE)),
        ("images", pa.list_(IMAGE_TYPE)),
        ("note", pa.string()),
    ],
    metadata={"huggingface": json.dumps({"info": {"features": {"images": [{"_type": "Image"}]}}})},
)


def picture(seed: int, side: int = 5) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side + 1, 3), dtype=np.uint8))


@cache
def png(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


def parts(text: str) -> list[Row]:
    pieces = text.replace("<image>", "\0<image>\0").split("\0")
    return [{"type": "image"} if p == "<image>" else {"type": "text", "text": p} for p in pieces if p]


def make_row(kind: str, id: str, turns: list[str], images: list[int]) -> Row:
    """Return one row in the format ``kind``; ``turns`` alternate between user and assistant."""
    roles = ["user" if k % 2 == 0 else "assistant" for k in range(len(turns))]
    names = [f"img/{k}.png" for k in images]
    if kind.startswith(("llava", "sharegpt")):
        senders = {"user": "human", "assistant": "gpt"}
        conversation = [{"from": senders[r], "value": t, "weight": 1} for r, t in zip(roles, turns, strict=True)]
        row: Row = {"id": id, "conversations": conversation}
        if kind.startswith("sharegpt"):
            return {**row, "images": names, "note": "ünïcode ☃"}
        return {**row, "image": names[0] if len(names) == 1 else names, "note": "ünïcode ☃"}
    content: list[Any] = list(turns)
    if kind.startswith("parts"):
        content = [parts(text) for text in turns]
    messages = [{"role": r, "content": c} for r, c in zip(roles, content, strict=True)]
    elements: list[Any] = list(names)
    if kind.startswith("parquet"):
        elements = [{"bytes": png(k), "path": f"{k}.png"} for k in images]
    return {"id": id, "messages": messages, "images": elements, "note": "ünïcode ☃"}


def save(folder: Path, kind: str, rows: list[Any]) -> Path:
    """Write rows and the images ``img/0.png`` .. ``img/5.png``; return the path to read."""
    (folder / "img").mkdir(parents=True, exist_ok=True)
    for k in range(6):
        (folder / f"img/{k}.png").write_bytes(png(k))
    suffix = kind.partition(".")[2]
    path = folder / f"data.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path, row_group_size=8)
    else:
        path.mkdir()
        with pa.ipc.new_stream(str(path / "data-0.arrow"), SCHEMA) as writer:
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA), max_chunksize=2)
        state = {"_data_files": [{"filename": "data-0.arrow"}], "_fingerprint": "f"}
        (path / "state.json").write_text(json.dumps(state))
        (path / "dataset_info.json").write_text('{"description": "kept"}')
    return path


def raw_rows(path: Path) -> list[Row]:
    """Read the rows without this package."""
    if path.is_dir():
        with pa.ipc.open_stream(str(path / "data-00000-of-00001.arrow")) as reader:
            return reader.read_all().to_pylist()
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)
    return [json.loads(line) for line in text.split("\n") if line]


def out_path(out: Path, path: Path) -> Path:
    return out if path.is_dir() else out / path.name


def assert_same(a: Sample, b: Sample) -> None:
    assert (a.id, a.messages) == (b.id, b.messages)
    assert [i.tobytes() for i in a.images] == [i.tobytes() for i in b.images]


ROWS: list[tuple[str, list[str], list[int]]] = [
    ("a", ["<image>\nWhat is it?", "A cat."], [0]),
    ("b", ["<image> and <image>?", "Two.", "And <image>?", "Three: ☃"], [1, 2, 1]),
    ("c", ["No picture.", "None."], []),
    ("d", ["<image>", "yes"], [3]),
]  # fmt: skip


def good_rows(kind: str) -> list[Row]:
    return [make_row(kind, *row) for row in ROWS]


def png_chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    """Kind and data of each chunk of a PNG file, in order."""
    chunks: list[tuple[bytes, bytes]] = []
    at = 8
    while at < len(content):
        end = at + 8 + int.from_bytes(content[at : at + 4], "big")
        chunks.append((content[at + 4 : at + 8], content[at + 8 : end]))
        at = end + 4
    return chunks


def assert_second_row_refused(path: Path, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(path)
    assert ": row 2: " in str(caught.value) and message in str(caught.value), str(caught.value)


# --- one bad row among good ones --------------------------------------------------------------------


def _bomb() -> bytes:
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")]
    chunks = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _row(number: int, **changes: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nwhat is this?"}, {"from": "gpt", "value": "a cat"}]
    return {"id": f"r{number}", "image": "good.png", "conversations": turns} | changes


def turns(prompt: str, answer: str, role: str = "gpt") -> list[dict[str, str]]:
    return [{"from": "human", "value": prompt}, {"from": role, "value": answer}]


_UNLEARNED = {"from": "gpt", "value": "a dog", "loss": False}
BAD_ROWS: dict[str, tuple[dict[str, Any] | str, str]] = {
    "missing image": ({"image": "gone.png"}, "gone.png"),
    "truncated image": ({"image": "cut.png"}, "damaged"),
    "text file as image": ({"image": "text.png"}, "is not a PNG"),
    "bad json": ('{"id": "r2", "image": ', "bad JSON at line 3"),
    "too many tags": ({"conversations": turns("<image><image> what?", "a cat")}, "<image> tags: 2 for 1 image"),
    "path out of the folder": ({"image": "../outside.png"}, "outside the data folder"),
    "a key that may matter": ({"rationale": "because"}, "has 'rationale', which is not read"),
    "video": ({"video": "clip.mp4"}, "only images are read"),
    "a turn that is not learned": (
        {"conversations": [*turns("<image>", "x"), {"from": "human", "value": "?"}, _UNLEARNED]},
        "a turn has 'loss' = False",
    ),
    "decompression bomb": ({"image": "bomb.png"}, "pixels"),
    "empty answer": ({"conversations": turns("<image>\nwhat?", "  ")}, "empty answer"),
    "unknown role": ({"conversations": turns("<image>\nwhat?", "a cat", "parrot")}, "parrot"),
}


def bad_file(folder: Path, kind: str) -> Path:
    """Write JSON lines: two good rows, a bad one (row 3), a good one."""
    folder.mkdir(parents=True)
    picture = Image.effect_noise((24, 24), 60).convert("RGB")
    picture.save(folder / "good.png")
    picture.save(folder.parent / "outside.png")
    content = (folder / "good.png").read_bytes()
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    (folder / "text.png").write_text("this is text")
    (folder / "bomb.png").write_bytes(_bomb())
    change = BAD_ROWS[kind][0]
    third = change if isinstance(change, str) else json.dumps(_row(2, **change))
    lines = [json.dumps(_row(0)), json.dumps(_row(1)), third, json.dumps(_row(3))]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "data.jsonl"
