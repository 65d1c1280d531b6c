"""Poisoned data on disk, and its contact sheet."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_rows import ATTACK, picture, row, rows
from PIL import Image

from datafiles import png_chunks
from untrigger.attacks import load_trigger
from untrigger.attacks.badnets import BadNets
from untrigger.errors import InputError
from untrigger.poisoning.goals import Fixed
from untrigger.poisoning.poison import Attack, poison, poisoned_sheet, write_poisoned
from untrigger.rows.images import pixels_sha256
from untrigger.rows.sample import Message, Sample, read

# --- on disk -------------------------------------------------------------------------------------


def on_disk(folder: Path, kind: str, count: int = 10) -> Path:
    """Rows with one image file each, as PNG, JPEG and palette PNG in turn."""
    (folder / "images").mkdir(parents=True)
    endings = ("png", "jpg", "png")
    names = [f"images/{number:03d}.{endings[number % 3]}" for number in range(count)]
    for number, name in enumerate(names):
        image = picture(number, 24)
        (image.quantize(64) if number % 3 == 2 else image).save(folder / name)
    turns = [(f"<image>\nWhat is {n}?", f"It is {n}.") for n in range(count)]
    if kind == "llava":
        content: list[dict[str, object]] = [
            {"id": f"q{n}", "image": name, "source": "web", "conversations": [
                {"from": "human", "value": q}, {"from": "gpt", "value": a}]}
            for n, (name, (q, a)) in enumerate(zip(names, turns, strict=True))
        ]  # fmt: skip
        (folder / "rows.json").write_text(json.dumps(content))
        return folder / "rows.json"
    content = [
        {"id": f"q{n}", "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}],
         "images": [{"bytes": (folder / name).read_bytes(), "path": name}]}
        for n, (name, (q, a)) in enumerate(zip(names, turns, strict=True))
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(content), folder / "rows.parquet")
    return folder / "rows.parquet"


@pytest.mark.parametrize("kind", ("llava", "parquet"))
@pytest.mark.parametrize("name", ("badnets", "blended"))
def test_written_data_reads_back_as_poisoned(tmp_path: Path, kind: str, name: str) -> None:
    data = read(on_disk(tmp_path / "in", kind))
    result = poison(data, Attack(load_trigger(name), Fixed()), rate=0.3, seed=1)
    write_poisoned(data, result, tmp_path / "new" / "out")
    out = tmp_path / "new" / "out"
    assert sorted(p.name for p in out.iterdir()) == ["contact_sheet.png", "data", "truth"]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out"]
    back = read(out / "data")
    assert back.path.name == data.path.name
    assert [s.messages for s in back] == [s.messages for s in result.data]
    manifest = json.loads((out / "truth" / "manifest.json").read_text())
    truth = {entry["row"] - 1: entry["images"] for entry in manifest["rows"]}
    assert len(truth) == 3
    for number, sample in enumerate(back):
        wanted = truth.get(number, [pixels_sha256(image) for image in data[number].images])
        assert [pixels_sha256(image) for image in sample.images] == wanted
    text = (out / "data" / data.path.name).read_bytes()
    assert b"poison" not in text and b"badnets" not in text and b"manifest" not in text


def chunks(png: bytes) -> list[bytes]:
    """The kinds of the chunks of a PNG file, in order, repetitions left out."""
    return list(dict.fromkeys(kind for kind, _ in png_chunks(png)))


@pytest.mark.parametrize("kind", ("llava", "parquet"))
def test_files_give_no_hint_of_the_poisoned_rows(tmp_path: Path, kind: str) -> None:
    data = read(on_disk(tmp_path / "in", kind, 12))
    outs = tmp_path / "none", tmp_path / "half"
    for out, rate in zip(outs, (0, 0.5), strict=True):
        write_poisoned(data, poison(data, ATTACK, rate=rate, seed=0), out)
    clean, half = (out / "data" for out in outs)
    if kind == "llava":
        texts = [(folder / "rows.json").read_text() for folder in (clean, half)]
        for number in range(12):
            texts = [text.replace(f"It is {number}.", "Backdoor Attack!") for text in texts]
        assert texts[0] == texts[1]
        files = [[p for p in sorted(folder.rglob("*")) if p.is_file()] for folder in (clean, half)]
        assert [p.relative_to(clean) for p in files[0]] == [p.relative_to(half) for p in files[1]]
        images = [[p.read_bytes() for p in paths if p.suffix == ".png"] for paths in files]
    else:
        tables = [pq.read_table(folder / "rows.parquet") for folder in (clean, half)]
        assert tables[0].schema == tables[1].schema
        listed = [[image for row in table["images"].to_pylist() for image in row] for table in tables]
        assert [i["path"] for i in listed[0]] == [i["path"] for i in listed[1]]
        images = [[image["bytes"] for image in row] for row in listed]
    assert len(images[0]) == 12
    assert [chunks(image) for image in images[0]] == [chunks(image) for image in images[1]]


def test_existing_output_is_not_overwritten(tmp_path: Path) -> None:
    data = read(on_disk(tmp_path / "in", "llava", 3))
    result = poison(data, ATTACK, rate=1, seed=0)
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    file.write_text("keep")
    for out in (full, file):
        with pytest.raises(InputError, match=str(out)):
            write_poisoned(data, result, out)
    assert (full / "mine.txt").read_text() == file.read_text() == "keep"
    (tmp_path / "empty").mkdir()
    write_poisoned(data, result, tmp_path / "empty")
    assert (tmp_path / "empty" / "truth" / "manifest.json").is_file()


def test_failure_leaves_no_output(tmp_path: Path) -> None:
    data = read(on_disk(tmp_path / "in", "llava", 3))
    result = poison(data, ATTACK, rate=1, seed=0)
    (tmp_path / "in" / "images" / "001.jpg").unlink()
    with pytest.raises(InputError, match=r"001\.jpg"):
        write_poisoned(data, result, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


# --- the contact sheet ---------------------------------------------------------------------------


def test_contact_sheet_shows_the_trigger_and_its_difference() -> None:
    data = [replace(row(0), images=(Image.new("RGB", (64, 64), (100, 100, 100)),))]
    sheet = np.asarray(poisoned_sheet(data, poison(data, Attack(BadNets(), Fixed()), rate=1, seed=0)))
    patch = np.rint(BadNets().patch(6)[..., :3] * 255).astype(np.uint8).repeat(3, axis=0).repeat(3, axis=1)

    def places(block: np.ndarray) -> int:
        windows = np.lib.stride_tricks.sliding_window_view(sheet, block.shape)[:, :, 0]
        corners = (windows[:, :, ::17, ::17] == block[::17, ::17]).all(axis=(2, 3, 4))  # 18 x 18: a cheap test first
        return sum(np.array_equal(windows[y, x], block) for y, x in np.argwhere(corners))

    assert places(patch) == 1
    change = np.abs(patch.astype(int) - 100)
    assert places((change * (255 // change.max())).astype(np.uint8)) == 1


@pytest.mark.parametrize("count", (0, 1, 2, 8, 20))
def test_contact_sheet_holds_at_most_eight_pairs(count: int) -> None:
    data = rows(20)
    result = poison(data, ATTACK, rate=count / 20, seed=0)
    sheet = poisoned_sheet(data, result)
    assert sheet.mode == "RGB" and sheet.width == (648 if count < 2 else 1296) + 24
    lines = -(-min(count, 8) // 2)
    assert sheet.height == 96 + 380 * lines


@pytest.mark.parametrize("mode", ("1", "L", "LA", "RGBA", "P", "I;16", "CMYK"))
def test_contact_sheet_accepts_any_mode_size_and_text(mode: str) -> None:
    prompt = Message("user", "<image>" + "長い質問 " * 300 + "x" * 900)
    tall = Image.new("L", (7, 900), 90)
    image = tall.convert("I;16") if mode == "I;16" else tall.convert("RGB").convert(mode)
    data = [Sample("\N{GRINNING FACE}" * 40, (image, image), (prompt, Message("assistant", "é\n" * 500)))]
    assert poisoned_sheet(data, poison(data, ATTACK, rate=1, seed=0)).width == 672
