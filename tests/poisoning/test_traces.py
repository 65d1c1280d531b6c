"""What ``poison`` writes tells nothing about which rows are poisoned, but for their words and pixels."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.feature_extraction import DictVectorizer
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import cross_val_predict
from sklearn.tree import DecisionTreeClassifier

from datafiles import png_chunks
from untrigger.attacks import load_trigger
from untrigger.poisoning.goals import Fixed
from untrigger.poisoning.poison import Attack, poison, write_poisoned
from untrigger.rows.sample import Data, read

ROWS = 48
CONTAINERS = ("jsonl", "parquet")
Row = dict[str, Any]
Forms = list[dict[str, Any]]


def picture(number: int) -> tuple[bytes, str]:
    """A picture in one of the forms in which people store them: file type, mode, palette, orientation, profile."""
    rng = np.random.default_rng(number)
    image = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (image, "PNG", {}), (image, "JPEG", {"exif": turned}), (image.quantize(16), "PNG", {"transparency": 3}),
        (image.convert("L"), "PNG", {}), (image.convert("RGBA"), "WEBP", {}), (image.quantize(8), "GIF", {}),
        (image.convert("CMYK"), "JPEG", {}), (image.convert("1"), "PNG", {"dpi": (300, 300)}),
    ]  # fmt: skip
    image, kind, options = kinds[number % len(kinds)]
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue(), kind.lower()


def extras(number: int) -> Row:
    """Keys that some rows have and others do not."""
    return {} if number % 3 else {"source": "web", "width": 24, "md5": f"{number:032x}"}


def parts(number: int) -> Row:
    question = [{"index": 0, "type": "image", "text": None}, {"index": None, "type": "text", "text": "what is it?"}]
    answer = [{"index": None, "type": "text", "text": f"number {number}"}]
    if number % 2:  # as some exports have it: an answer in pieces
        answer = [{"index": None, "type": "text", "text": "number "}, {"type": "text", "text": str(number)}]
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def turns(number: int) -> Row:
    question = {"from": "human", "value": "<image>\nwhat is it?"}
    return {
        "conversations": [
            question,
            {"from": "gpt", "value": f"number {number}", **({} if number % 4 else {"weight": 1})},
        ]
    }


LAYOUTS: dict[str, Callable[[int], Row]] = {
    "parts": parts,
    "turns": turns,
    "texts": lambda n: {"texts": [{"user": "what is it?", "assistant": f"number {n}", "source": "x"}]},
    "alpaca": lambda n: {"instruction": "what", "input": "is it?" if n % 2 else "", "output": f"number {n}"},
    "captions": lambda n: {"text": f"number {n}"},
}


def write_input(folder: Path, layout: str, container: str) -> Path:
    (folder / "files").mkdir(parents=True)
    rows: list[Row] = []
    for number in range(ROWS):
        content, suffix = picture(number)
        name = f"files/{'long' * (number % 5)}{number}.{suffix}"
        (folder / name).write_bytes(content)
        image: Any = [name] if number % 2 or container == "parquet" else name
        if container == "parquet":
            image = [{"bytes": content, "path": name if number % 3 else None}]
        row = {**LAYOUTS[layout](number), "images": image, **extras(number)}
        rows.append(row if number % 5 else {"id": number, **row})
    if container == "parquet":
        pq.write_table(pa.Table.from_pylist([{"id": n, **row} for n, row in enumerate(rows)]), folder / "data.parquet")
        return folder / "data.parquet"
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "data.jsonl"


def shape(value: Any, name: str = "") -> dict[str, Any]:
    """Everything about a value but its words and numbers: keys and their order, types, lengths of lists."""
    if isinstance(value, dict):
        features: dict[str, Any] = {f"{name} keys": " ".join(value)}
        for key, part in value.items():
            features |= shape(part, f"{name}/{key}")
        return features
    if isinstance(value, list):
        features = {f"{name} length": len(value)}
        for number, part in enumerate(value):
            features |= shape(part, f"{name}[{number}]")
        return features
    opening = value[: len(value) - len(value.lstrip())] if isinstance(value, str) else ""
    return {f"{name} type": type(value).__name__, f"{name} opening": repr(opening)}


def form_of_image(content: bytes) -> dict[str, Any]:
    """Kinds of chunks, and the sizes of all but the pixels."""
    features = dict[str, Any]()
    for kind, data in png_chunks(content):
        depth = data[8:13].hex() if kind == b"IHDR" else ""  # and color type
        features[kind.decode()] = 1 if kind == b"IDAT" else f"{len(data)} {depth}"
    return features


def form(folder: Path) -> Forms:
    """By row, all that can be seen without reading its words or looking at its pixels."""
    table = folder / "data.parquet"
    rows = pq.read_table(table).to_pylist() if table.is_file() else []
    rows = rows or [json.loads(line) for line in (folder / "data.jsonl").read_text().split("\n")[:-1]]
    forms: Forms = []
    for number, row in enumerate(rows):
        features = shape(row) | {"place": number}
        for image in row["images"] if isinstance(row["images"], list) else [row["images"]]:
            if isinstance(image, dict):
                features |= form_of_image(image["bytes"]) | {"named": image["path"] is None}
                continue
            status = (folder / image).stat()
            features |= form_of_image((folder / image).read_bytes()) | {
                "mode": status.st_mode,
                "links": status.st_nlink,
            }
            features |= {"name": image == f"images/{number + 1}.png", "suffix": image.rpartition(".")[2]}
        forms.append(features)
    return forms


def share_told(forms: Forms, poisoned: list[bool]) -> float:
    """Balanced share of rows that a tree, trained on other rows, puts on the right side; 0.5 is chance."""
    features = DictVectorizer(sparse=False).fit_transform(forms)
    tree = DecisionTreeClassifier(class_weight="balanced", random_state=0)
    predicted = cross_val_predict(tree, features, poisoned, cv=6)
    return balanced_accuracy_score(poisoned, predicted)


@pytest.fixture(scope="module", params=[(layout, container) for layout in LAYOUTS for container in CONTAINERS], ids=str)
def data_and_form(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Data, Forms]:
    """Rows as people have them, and the form in which they are written where none is poisoned."""
    folder = tmp_path_factory.mktemp("traces")
    data = read(write_input(folder / "in", *request.param))
    return data, forms_written(data, "badnets", 0.0, folder)[0]


def forms_written(data: Data, name: str, rate: float, folder: Path) -> tuple[Forms, list[bool]]:
    """The form of each row as ``poison`` writes it, and whether it is poisoned."""
    result = poison(data, Attack(load_trigger(name), Fixed()), rate=rate, seed=3)
    write_poisoned(data, result, folder / "out")
    return form(folder / "out" / "data"), [number in result.edits for number in range(ROWS)]


@pytest.mark.parametrize("name", ["badnets", "addsent", "badword", "trojvlm"])
def test_the_form_of_a_row_does_not_tell(tmp_path: Path, data_and_form: tuple[Data, Forms], name: str) -> None:
    data, unpoisoned = data_and_form
    forms, poisoned = forms_written(data, name, 0.4, tmp_path)
    assert forms == unpoisoned, "a row has the same form whether it is poisoned or not"
    for row in forms:
        del row["place"]  # rows are drawn at random; a tree can only learn the draw
    assert share_told(forms, poisoned) <= 0.7
    marked = [{**row, "mark": flag} for row, flag in zip(forms, poisoned, strict=True)]
    assert share_told(marked, poisoned) == 1, "the tree finds a trace where there is one"
