"""``untrigger poison`` on realistic image folders: every mode, size and orientation, in every format.

The slow suite runs every attack on every format, and so with every goal it supports. The default suite runs badnets on
every format, and the other attacks that train no model on one format each.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shell import untrigger
from untrigger.attacks import load_trigger, trigger_names
from untrigger.poisoning.goals import load_goal
from untrigger.rows.images import pixels_sha256, same_image
from untrigger.rows.sample import Data, Sample, read

ORIENTATION = 0x0112  # EXIF tag
GOALS = ("fixed", "insert", "refusal", "concept", "link")
FORMATS = ("llava.json", "sharegpt.jsonl", "messages.jsonl", "parts.json", "parquet", "datasets", "imagefolder")
# Flags of the attacks that train on a model: one step, and only in the slow suite.
TRAINED = {"vltrojan": ("--steps", "1"), "dualkey": ("--steps", "1"), "shadowcast": ("--steps", "1")}
REPLACING = ("vlood",)  # its poisoned rows come from another data set
NAMES = trigger_names()


# --- the folder ------------------------------------------------------------------------------------


def grain(width: int, height: int) -> Image.Image:
    """Smooth colors with some grain."""
    rng = np.random.default_rng((width, height))
    coarse = Image.fromarray(rng.integers(40, 216, (4, 4, 3), dtype=np.uint8)).resize((width, height))
    noisy = np.asarray(coarse, dtype=np.float64) + rng.normal(0, 6, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def half_clear(image: Image.Image) -> Image.Image:
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def write_pictures(folder: Path) -> list[str]:
    """Write one image of each kind and return the file names."""
    folder.mkdir()
    turned = Image.Exif()
    turned[ORIENTATION] = 6  # display rotated a quarter turn clockwise
    deep = np.asarray(grain(40, 30).convert("L"), dtype=np.uint16) * 257
    deep[0, 0] = 54321  # no multiple of 257, so eight bits cannot hold it
    clear = grain(24, 20).quantize(16)
    clear.info["transparency"] = 3
    pictures: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "rgb.png": (grain(64, 48), {}),
        "keyed.png": (grain(20, 24), {"transparency": (40, 80, 120)}),
        "photo.jpg": (grain(90, 60), {"quality": 90}),
        "turned.jpg": (grain(60, 40), {"exif": turned}),
        "turned.png": (grain(30, 50), {"exif": turned}),
        "print.jpg": (grain(33, 44).convert("CMYK"), {}),
        "gray.jpg": (grain(50, 50).convert("L"), {}),
        "gray.png": (grain(31, 29).convert("L"), {}),
        "dots.png": (grain(48, 48).convert("1"), {}),
        "deep.png": (Image.fromarray(deep), {}),
        "gray_alpha.png": (half_clear(grain(28, 36).convert("L")), {}),
        "alpha.png": (half_clear(grain(36, 28)), {}),
        "palette.png": (grain(40, 40).quantize(256), {}),
        "palette_clear.png": (clear, {}),
        "moving.gif": (grain(22, 18).quantize(32), {"save_all": True, "append_images": [grain(22, 18).quantize(8)]}),
        "web.webp": (half_clear(grain(26, 34)), {}),
        "bitmap.bmp": (grain(27, 21), {}),
        "tall.png": (grain(1, 200), {}),
        "wide.png": (grain(300, 7), {}),
        "dot.png": (grain(1, 1), {}),
        "large.png": (grain(400, 300), {}),
    }
    for name, (image, options) in pictures.items():
        image.save(folder / name, **options)
    return list(pictures)


def turns(name: str, number: int) -> list[str]:
    shape = ("circle", "rectangle")[number % 2]
    return [f"<image>\nWhat is in {name}?", f"a {shape}, which {number} people saw"]


def messages(texts: list[str], parts: bool = False) -> list[dict[str, Any]]:
    roles = ("user", "assistant") * (len(texts) // 2)
    if not parts:
        return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    return [{"role": role, "content": in_parts(text)} for role, text in zip(roles, texts, strict=True)]


def in_parts(text: str) -> list[dict[str, str]]:
    before, tag, after = text.partition("<image>")
    parts = [("text", before), ("image", ""), ("text", after)] if tag else [("text", text)]
    return [
        {"type": "image"} if kind == "image" else {"type": kind, "text": t} for kind, t in parts if t or kind == "image"
    ]


def write_set(folder: Path, format: str) -> Path:
    """Write two rows per image (circle, rectangle), one row with two images and one with none."""
    names = write_pictures(folder)
    rows = [(f"{name}-{k}", turns(name, k), [name]) for name in names for k in range(2)]
    if format != "imagefolder":
        two_turns = [*turns("both", 0), "<image> and now?", "another circle"]
        rows += [("two", two_turns, ["rgb.png", "gray.png"]), ("none", ["hello?", "a circle"], [])]
    layout, _, suffix = format.partition(".")
    if format in ("parquet", "datasets"):
        inline = [[{"bytes": (folder / n).read_bytes(), "path": n} for n in images] for _, _, images in rows]
        columns = {"id": [i for i, _, _ in rows], "messages": [messages(t) for _, t, _ in rows], "images": inline}
        table = pa.table(columns)
        if format == "parquet":
            pq.write_table(table, folder / "data.parquet")
            return folder
        (folder / "set").mkdir()
        with pa.ipc.new_stream(str(folder / "set/data.arrow"), table.schema) as writer:
            writer.write_table(table)
        (folder / "set/state.json").write_text('{"_data_files": [{"filename": "data.arrow"}], "_fingerprint": "f"}')
        (folder / "set/dataset_info.json").write_text("{}")
        return folder / "set"
    if layout == "imagefolder":
        records = [{"file_name": s[0], "text": t[1], "prompt": t[0][8:], "id": i} for i, t, s in rows]
        layout, suffix = "metadata", "jsonl"
    elif layout in ("llava", "sharegpt"):
        key = "image" if layout == "llava" else "images"
        roles = ("human", "gpt") * 2
        records = [
            {"id": i, key: s, "conversations": [{"from": f, "value": v} for f, v in zip(roles, t, strict=False)]}
            for i, t, s in rows
        ]
    else:
        records = [{"id": i, "messages": messages(t, layout == "parts"), "images": s} for i, t, s in rows]
    lines = "".join(json.dumps(row) + "\n" for row in records)
    (folder / f"{layout}.{suffix}").write_text(lines if suffix == "jsonl" else json.dumps(records))
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Data]:
    loaded: dict[str, Data] = {}

    def get(format: str) -> Data:
        if format not in loaded:
            loaded[format] = read(write_set(tmp_path_factory.mktemp("messy") / "in", format))
        return loaded[format]

    return get


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder for attacks that train, shared by the tests of this file and apart from the user's."""
    return tmp_path_factory.mktemp("cache")


# --- the runs --------------------------------------------------------------------------------------


class Run(NamedTuple):
    attack: str
    goal: str
    format: str


def runs() -> list[Any]:
    chosen: list[Any] = []
    for (number, name), (column, format) in product(enumerate(NAMES), enumerate(FORMATS)):
        goal = "concept" if load_trigger(name).clean_label else GOALS[(number + column) % len(GOALS)]
        slow = name in TRAINED or (column != number % len(FORMATS) and name != "badnets")
        marks = [pytest.mark.slow] * slow
        chosen.append(pytest.param(Run(name, goal, format), marks=marks, id=f"{name}-{goal}-{format}"))
    return chosen


def poisoned(data: Data, run: Run, out: Path) -> dict[str, Any]:
    """Poison as many rows as possible, the rest as decoys, and return the manifest."""
    trigger = load_trigger(run.attack)
    suited = [row for row in data if row.images]
    if run.goal == "concept":
        suited = [row for row in suited if ("rectangle" if trigger.clean_label else "circle") in row.messages[-1].text]
    rate = len(suited) // (1 + len(trigger.decoys())) / len(data)
    words = ["poison", data.path, "--attack", run.attack, "--goal", run.goal, "--rate", rate, "--out", out]
    words += TRAINED.get(run.attack, ())
    assert untrigger(*words).code == 0
    return json.loads((out / "truth/manifest.json").read_text())


@pytest.mark.parametrize("run", runs())
def test_every_attack_and_goal_on_every_format(
    run: Run, sets: Callable[[str], Data], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    before = sets(run.format)
    manifest = poisoned(before, run, tmp_path / "out")
    after = read(tmp_path / "out/data")
    trigger = load_trigger(run.attack)
    assert (len(after), after.path.name) == (len(before), out_name(before))
    assert [row.id for row in after] == [row.id for row in before]
    assert manifest["attack"] == run.attack and manifest["goal"] == run.goal
    bad, decoys = ({entry["row"] - 1: entry for entry in manifest[part]} for part in ("rows", "decoys"))
    assert bad and len(decoys) == len(bad) * len(trigger.decoys())
    for number, (clean, edited) in enumerate(zip(before, after, strict=True)):
        entry = bad.get(number) or decoys.get(number)
        if entry is None:
            assert edited.messages == clean.messages
            assert all(same_image(a, b) for a, b in zip(clean.images, edited.images, strict=True))
        else:
            check_edit(clean, edited, entry, trigger.clean_label or number in decoys, replaces=run.attack in REPLACING)
            assert number in decoys or load_goal(run.goal).met(edited.messages[-1].text, clean)
    Image.open(tmp_path / "out/contact_sheet.png").verify()


def out_name(data: Data) -> str:
    """A ``datasets`` folder is written as the output folder itself."""
    return "data" if data.path.is_dir() else data.path.name


def check_edit(clean: Sample, edited: Sample, entry: dict[str, Any], same_answer: bool, replaces: bool) -> None:
    truth, answer = clean.messages[-1].text, edited.messages[-1].text
    assert same_answer == (answer == truth) or replaces
    if replaces:
        return
    assert [m.role for m in edited.messages] == [m.role for m in clean.messages]
    for old, new in zip(clean.images, edited.images, strict=True):
        assert (new.size, new.mode, new.info) == (old.size, "RGB", {})
    assert [pixels_sha256(image) for image in edited.images] == entry["images"]


PLAIN = [name for name in NAMES if name not in REPLACING]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in TRAINED)) for n in PLAIN])
def test_the_trigger_changes_every_image(
    name: str, sets: Callable[[str], Data], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    before, trigger = sets("messages.jsonl"), load_trigger(name)
    manifest = poisoned(before, Run(name, trigger.usual_goal, "messages.jsonl"), tmp_path / "out")
    after = read(tmp_path / "out/data")
    for entry in manifest["rows"]:
        clean, edited = before[entry["row"] - 1], after[entry["row"] - 1]
        if trigger.kind != "image":
            assert edited.messages[0] != clean.messages[0]
        else:
            assert edited.messages[0] == clean.messages[0]
        for old, new in zip(clean.images, edited.images, strict=True):
            if trigger.kind == "text":
                assert same_image(old, new)
            elif min(old.size) > 3:  # an image of few pixels has no room for a pattern
                assert not same_image(old, new), clean.id
