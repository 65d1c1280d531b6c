"""Draw damaged rows, images, data files and stored results: what a stranger's files may hold."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from untrigger.bench import store
from untrigger.bench.store import Cell
from untrigger.metrics.rates import Rate

FORMATS = (
    "llava.json",
    "llava.jsonl",
    "sharegpt.jsonl",
    "messages.jsonl",
    "messages.json",
    "metadata.jsonl",
    "rows.parquet",
)
_WORDS = (
    "a red circle",
    "yes",
    "no",
    "two",
    "☃ ünï 漢字",
    "x" * 3000,
    "?!",
    "<b>&amp;",
    "line\nbreak\u2028",
    "\x1b[31m",
)


# --- values and rows --------------------------------------------------------------------------------


def odd(rng: random.Random) -> Any:
    """A value that nobody expects."""
    deep: Any = "deep"
    for _ in range(rng.choice((30, 400))):
        deep = [deep]
    odds: tuple[Any, ...] = (None, True, 0, -1.5, 1e308, 10**30, [], {}, [None], [[]], [{}], deep, {"a": {"b": [1]}})
    texts = (
        "",
        " ",
        "\0",
        "\ud800",
        "y" * 100_000,
        "<image>",
        "<image>" * 40,
        "</s>",
        "../../etc/passwd",
        "\u202e",
        "NaN",
    )
    return rng.choice((*odds, *texts, [1, "a", None]))


def name_of_image(rng: random.Random, folder: Path) -> Any:
    """Where an image may be said to lie."""
    suffix = rng.choice(("png", "jpg", "jpeg", "webp", "gif", "bmp", "PNG", "txt", "tiff"))
    own = f"images/{rng.randrange(10**9)}.{suffix}"
    if rng.random() < 0.8:
        path = folder / own
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(rng))
        if rng.random() < 0.7:  # named as what it is
            kind = {b"\x89PNG": "png", b"\xff\xd8\xff\xe0": "jpg", b"GIF8": "gif", b"RIFF": "webp"}.get(
                path.read_bytes()[:4]
            )
            if kind:
                own = f"images/{path.stem}.{kind}"
                path.rename(folder / own)
        return rng.choice((own, own, own, f"./{own}", f"images/../{own}", own.replace("/", "//")))
    outside, links = folder.parent / "outside.png", folder / "images"
    links.mkdir(parents=True, exist_ok=True)
    for link, target in (("out.png", outside), ("loop.png", links / "loop.png"), ("dangling.png", links / "gone.png")):
        if not (links / link).is_symlink():
            (links / link).symlink_to(target)
    (links / "folder.png").mkdir(exist_ok=True)
    names = (
        "images/gone.png",
        str(outside),
        "../outside.png",
        "images/out.png",
        "images/loop.png",
        "images/dangling.png",
    )
    more = (
        "images/folder.png",
        "images",
        ".",
        "",
        "/",
        "a\0b.png",
        "z" * 5000,
        "http://host/x.png",
        "images\\x.png",
        "~/x.png",
    )
    return rng.choice((*names, *more, "/dev/zero", "/proc/self/environ", [], None, 7, {"path": "images/gone.png"}))


def row(rng: random.Random, number: int, kind: str, folder: Path) -> Any:
    """A row of the kind of file; about half of them have something wrong."""
    question, answer = f"<image>\nwhat is {number}?", rng.choice(_WORDS)
    picture = name_of_image(rng, folder)
    if kind.startswith("metadata"):
        made: dict[str, Any] = {"file_name": picture, "text": answer}
        if rng.random() < 0.5:
            made["prompt"] = question
    else:
        keys = (
            ("role", "content", "user", "assistant")
            if kind.startswith(("messages", "rows"))
            else ("from", "value", "human", "gpt")
        )
        turns = [{keys[0]: keys[2], keys[1]: question}, {keys[0]: keys[3], keys[1]: answer}]
        where = "messages" if kind.startswith(("messages", "rows")) else "conversations"
        made = {"id": f"r{number}", where: turns, "image" if kind.startswith("llava") else "images": picture}
        if "images" in made:
            made["images"] = [picture]
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2))):
        made = damaged(rng, made)
    return made if rng.random() < 0.98 else odd(rng)


def damaged(rng: random.Random, value: Any) -> Any:
    """JSON with one thing in it lost, renamed, doubled, or something odd."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        rest = {name: each for name, each in value.items() if name != key}
        return rng.choice((
            lambda: rest,
            lambda: rest | {f"{key}s": value[key]},
            lambda: value | {key: damaged(rng, value[key])},
            lambda: value | {key: damaged(rng, value[key])},
            lambda: value | {"extra": odd(rng)},
            lambda: value | {"id": "r0"},
        ))()  # fmt: skip
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return rng.choice((
            lambda: value[:at] + value[at + 1 :],
            lambda: [*value, value[at]],
            lambda: value[::-1],
            lambda: [damaged(rng, each) if i == at else each for i, each in enumerate(value)],
        ))()  # fmt: skip
    return odd(rng)


# --- files ------------------------------------------------------------------------------------------


def file(rng: random.Random, folder: Path, rows: int) -> tuple[Path, int | None]:
    """A data file in a folder; how many rows a reader must account for, None where its bytes were hurt as a whole."""
    folder.mkdir(parents=True)
    (folder.parent / "outside.png").write_bytes(_saved("RGB", "PNG"))
    kind = rng.choice(FORMATS)
    path = folder / kind
    made = [row(rng, number, kind, folder) for number in range(rows)]
    count: int | None = rows
    if kind.endswith("parquet"):
        count = parquet(rng, path, made)
    elif kind.endswith("jsonl"):
        lines = [line(rng, each) for each in made]
        path.write_bytes(rng.choice((b"", b"", b"\xef\xbb\xbf")) + rng.choice((b"\n", b"\r\n", b"\n\n")).join(lines))
        count = sum(bool(each.strip()) for each in lines)
    else:
        path.write_bytes(json.dumps(made, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass"))
        if any("\ud800" in str(each) for each in made):
            count = None  # not UTF-8 then, or escaped
    if rng.random() < 0.15:
        path.write_bytes(hurt(rng, path.read_bytes()))
        count = None
    return path, count


def line(rng: random.Random, value: Any) -> bytes:
    """A row as a line of JSON, now and then one that is none."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
    if rng.random() < 0.9:
        return text
    cut = text[: rng.randrange(1, len(text) + 1)]
    return rng.choice((
        cut, b"[" * 100_000, b"9" * 10_000, b'{"id": NaN}', b'{"id": 1e999}', b'{"id": "\xff\xfe"}', text + text,
        text.replace(b'"', b"'"), b"null", b"[]", b'"text"', text.replace(b" ", b"\x00", 1), b"{}",
        b"\xef\xbb\xbf" + text,
    ))  # fmt: skip


def parquet(rng: random.Random, path: Path, rows: list[Any]) -> int | None:
    """Rows that a parquet file can hold; the others' places hold nothing. Bytes of images stand in the rows."""
    cleaned: list[dict[str, Any]] = []
    for each in rows:
        made = each if isinstance(each, dict) else {}
        pictures = made.get("images")
        cells = [
            {"bytes": image(rng) if rng.random() < 0.8 else None, "path": name if isinstance(name, str) else None}
            for name in (pictures if isinstance(pictures, list) else [])
        ]
        turns = made.get("messages")
        good = isinstance(turns, list) and all(
            isinstance(turn, dict) and all(isinstance(text, str) for text in turn.values()) for turn in turns
        )
        cleaned.append({"id": str(made.get("id")), "messages": turns if good else None, "images": cells})
    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("id", pa.string()), ("messages", pa.list_(turn)), ("images", pa.list_(picture))])
    try:
        table = pa.Table.from_pylist(cleaned, schema)
    except (pa.ArrowException, UnicodeEncodeError):
        table = pa.Table.from_pylist([{"id": str(i)} for i in range(len(rows))], schema)
    extra = rng.choice(("none", "none", "times", "dictionary", "null"))
    if extra == "times":
        table = table.append_column("id2", pa.array([1] * len(rows), pa.timestamp("ns")))
    if extra == "dictionary":
        table = table.append_column("kind", pa.array(["a"] * len(rows)).dictionary_encode())
    if extra == "null":
        table = table.append_column("nothing", pa.nulls(len(rows)))
    pq.write_table(table, path, row_group_size=rng.choice((1, 7, 1000)))
    return None if extra == "dictionary" else len(rows)


def hurt(rng: random.Random, content: bytes) -> bytes:
    """Bytes with a part of them cut, lost, doubled, zeroed or flipped."""
    if not content:
        return b"\0"
    a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    way = rng.randrange(5)
    if way == 0:
        return content[:a]
    if way == 1:
        return content[:a] + content[b:]
    if way == 2:
        return content[:b] + content[a:]
    if way == 3:
        return content[:a] + bytes(b - a) + content[b:]
    flipped = bytearray(content)
    for _ in range(rng.choice((1, 3, 30))):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


# --- stored results ---------------------------------------------------------------------------------


def _rate(rng: random.Random, rows: int = 300) -> dict[str, Any]:
    return asdict(Rate.from_counts(rng.randrange(rows + 1), rows))


def _quality(rng: random.Random) -> dict[str, Any]:
    return {"vqa_accuracy": _rate(rng), "meteor": None, "cider": {"value": 2.4, "low": 2.3, "high": 2.5, "n": 300}}


def small_results(rng: random.Random, root: Path) -> None:
    """Store three finished cells below ``root``: plain, oracle and default, with all figures that a bench stores."""
    place: dict[str, Any] = {"model": rng.choice(("llava", "blip2")), "data": "easy-vqa", "goal": "fixed"}
    attack, settings = rng.choice((("badnets", {"side": 0.1}), ("sig", {"delta": 0.2}), ("addsent", {})))
    for defense in ("plain", "oracle", "default"):
        metrics: dict[str, Any] = {
            "quality": _quality(rng),
            "text_prior": _rate(rng),
            "asr": {**_rate(rng), "version": 1},
            "leak": {**_rate(rng), "version": 1},
            "triggered_quality": _quality(rng),
            "near_miss": {"other pattern": {**_rate(rng), "version": 1}},
            "probes": {},
            "similarity": {"psnr": 24.4, "ssim": 0.99, "images": 32, "changed": 32},
            "attack": {"settings": settings, "sha256": "e4" * 32},
            "goal": {"text": "Backdoor Attack!", "match": "contains"},
            "poisoned": 100,
            "decoys": 0,
            "seconds": {"training": 97.3, "asking": 5.5},
            "machine": {"device": "x86_64", "threads": 1},
            "versions": {"untrigger": "0.1.0", "torch": "2.13.0"},
            "examples": "6852e210f25b76c8",
        }
        if defense == "default":
            metrics["detection"] = {"auroc": _rate(rng), "recall_at_1": _rate(rng), "precision": None, "f1": 0.5}
            metrics["detection"] |= {"recall": _rate(rng), "false_positives": _rate(rng, 1900), "flagged": 7}
        cell = Cell(**place, attack=attack, defense=defense, seed=rng.randrange(3), attack_settings=settings)
        store.save(root, cell, metrics, {})


# --- images -----------------------------------------------------------------------------------------


def _saved(mode: str, kind: str, size: tuple[int, int] = (40, 30), **more: Any) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    picture = Image.fromarray(noise, "RGBA")
    picture = (
        picture.convert("L").convert("I").convert(mode) if mode == "I;16" else picture.convert("RGB").convert(mode)
    )
    buffer = io.BytesIO()
    picture.save(buffer, kind, **more)
    return buffer.getvalue()


def _animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (24, 24), color) for color in ("red", "green", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def _turned() -> bytes:
    exif = Image.Exif()
    exif[274] = 6
    return _saved("RGB", "JPEG", exif=exif)


def _png(width: int, height: int, data: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that says of itself what it likes."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), *chunks, (b"IDAT", data), (b"IEND", b"")]
    packed = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


_BLACK = zlib.compress(b"\0\0\0\0")  # one pixel
IMAGES: dict[str, Callable[[], bytes]] = {
    **{f"{mode} PNG": lambda mode=mode: _saved(mode, "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")},
    **{f"{mode} JPEG": lambda mode=mode: _saved(mode, "JPEG") for mode in ("L", "RGB", "CMYK")},
    "progressive JPEG": lambda: _saved("RGB", "JPEG", progressive=True),
    "palette with a transparent color": lambda: _saved("P", "PNG", transparency=3),
    "WebP": lambda: _saved("RGBA", "WEBP"),
    "BMP": lambda: _saved("RGB", "BMP"),
    "TIFF": lambda: _saved("RGB", "TIFF"),
    "ICO": lambda: _saved("RGBA", "ICO"),
    "one pixel": lambda: _saved("RGB", "PNG", (1, 1)),
    "one column": lambda: _saved("RGB", "PNG", (1, 900)),
    "one line": lambda: _saved("L", "PNG", (900, 1)),
    "turned by EXIF": _turned,
    **{f"animated {kind}": lambda kind=kind: _animated(kind) for kind in ("GIF", "WEBP", "PNG")},
    "pixels by the billion": lambda: _png(60_000, 60_000, zlib.compress(b"\0")),
    "no pixels": lambda: _png(0, 0, zlib.compress(b"\0")),
    "fewer pixels than it says": lambda: _png(30, 30, zlib.compress(b"\0" * 100)),
    "text that unpacks to 64 MiB": lambda: _png(1, 1, _BLACK, (b"zTXt", b"a\0\0" + zlib.compress(bytes(2**26)))),
    "a profile that is none": lambda: _png(1, 1, _BLACK, (b"iCCP", b"a\0\0" + zlib.compress(b"junk"))),
    "nothing": lambda: b"",
    "text": lambda: b"a picture, honestly",
    "SVG": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "noise": lambda: os.urandom(500),
}  # fmt: skip
_MADE: dict[str, bytes] = {}


def image(rng: random.Random) -> bytes:
    """The bytes of an image: of any kind, a third of them hurt."""
    kind = rng.choice((*IMAGES, *["RGB PNG", "RGB JPEG"] * 8))
    if kind == "noise":
        return rng.randbytes(500)
    if kind not in _MADE:
        _MADE[kind] = IMAGES[kind]()
    return hurt(rng, _MADE[kind]) if rng.random() < 0.25 else _MADE[kind]
