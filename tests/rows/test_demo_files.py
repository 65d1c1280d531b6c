"""Rows in the shapes of public demo files: read to the letter and the pixel, or refused with the word that matters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datafiles import IMAGE_TYPE, Row, assert_second_row_refused, picture, png
from shell import refused, untrigger
from untrigger.rows.sample import read

ONE_STEP = ("--max_steps", "1", "--per_device_train_batch_size", "2")
Turns = list[tuple[str, str]]


def turns(*texts: str, role: str = "role", text: str = "content") -> list[Row]:
    """Turns of a user and an assistant who alternate."""
    names = ("user", "assistant") if role == "role" else ("human", "gpt")
    return [{role: names[k % 2], text: each} for k, each in enumerate(texts)]


def sharegpt(*texts: str) -> list[Row]:
    return turns(*texts, role="from", text="value")


def expected(*texts: str, system: str = "") -> Turns:
    both = [(("user", "assistant")[k % 2], each) for k, each in enumerate(texts)]
    return [("system", system), *both] if system else both


# --- shapes that are read ---------------------------------------------------------------------------

# LLaMA-Factory's mllm_demo.json; its images lie in a folder beside it.
MLLM_DEMO = [
    {"messages": turns(f"<image>{question}", answer, "And where?", "In a yard."), "images": [f"mllm_demo_data/{k}.jpg"]}
    for k, (question, answer) in enumerate([("Who is it?", "A goat."), ("他是谁", "一只山羊"), ("What?", "A hat.")] * 2)
]
# ms-swift's custom data: both of its layouts for images, with the keys that only sort or report rows.
MS_SWIFT = [
    {
        "messages": [{"role": "system", "content": "Be brief."}, *turns("<image>What is in the <image>picture?", "a")],
        "images": ["img/0.png", "img/1.png"],
        "channel": "general",
    },
    {"query": "<image>And now?", "response": "b", "history": [["Hello", "Hi"]], "images": ["img/2.png"], "system": "s"},
    {"query": "Say 7.", "response": "7", "images": [], "videos": [], "audios": [], "objects": {"ref": [], "bbox": []}},
] * 2
READ: dict[str, tuple[list[Row], list[tuple[Turns, list[int]]]]] = {
    "LLaMA-Factory, images": (
        MLLM_DEMO[:1],
        [(expected("<image>Who is it?", "A goat.", "And where?", "In a yard."), [0])],
    ),
    "LLaMA-Factory, Alpaca": (
        [
            {"instruction": "Name one.", "input": "", "output": "Goat."},
            {"instruction": "Add", "input": "1, 2", "output": "3"},
        ],
        [(expected("Name one.", "Goat."), []), (expected("Add\n1, 2", "3"), [])],
    ),
    "LLaMA-Factory, a good answer for KTO": (
        [{"messages": turns("Hello", "Hi"), "label": True}],
        [(expected("Hello", "Hi"), [])],
    ),
    "ms-swift": (
        MS_SWIFT[:3],
        [
            (expected("<image>What is in the <image>picture?", "a", system="Be brief."), [0, 1]),
            (expected("Hello", "Hi", "<image>And now?", "b", system="s"), [2]),
            (expected("Say 7.", "7"), []),
        ],
    ),
    "ms-swift, grounding in the text": (
        [{"messages": turns("<image>Find <ref>goat</ref>", "<box>(20,45),(50,80)</box>"), "images": ["img/3.png"]}],
        [(expected("<image>Find <ref>goat</ref>", "<box>(20,45),(50,80)</box>"), [3])],
    ),
    "Qwen2.5-VL": (
        [
            {"image": "img/1.png", "conversations": sharegpt("<image>\nWhat?", "A goat.")},
            {"image": ["img/1.png", "img/2.png"], "conversations": sharegpt("<image>\n<image>\nWhich?", "Both.")},
        ],
        [(expected("<image>\nWhat?", "A goat."), [1]), (expected("<image>\n<image>\nWhich?", "Both."), [1, 2])],
    ),
    "LLaVA's mix, with rows of text alone": (
        [
            {
                "id": "000000033471",
                "image": "img/4.png",
                "conversations": sharegpt("<image>\nWhat?", "A bus.", "?", "!"),
            },
            {"id": "wgByO4Y_0", "model": "", "conversations": sharegpt("Why?", "Because.")},
        ],
        [(expected("<image>\nWhat?", "A bus.", "?", "!"), [4]), (expected("Why?", "Because."), [])],
    ),
    "TRL's prompt and completion": (
        [
            {
                "prompt": [{"role": "user", "content": "What color?"}],
                "completion": [{"role": "assistant", "content": "It is blue."}],
                "images": ["img/5.png"],
            }
        ],
        [(expected("<image>\nWhat color?", "It is blue."), [5])],
    ),
}


def data_folder(folder: Path) -> Path:
    for name in ("img", "mllm_demo_data"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for k in range(6):
            (folder / name / f"{k}.{'png' if name == 'img' else 'jpg'}").write_bytes(png(k))
    return folder


def save(folder: Path, rows: list[Row], name: str = "demo.json") -> Path:
    (data_folder(folder) / name).write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    return folder / name


def assert_reads(path: Path, wanted: list[tuple[Turns, list[int]]]) -> None:
    data = read(path)
    assert [[(message.role, message.text) for message in sample.messages] for sample in data] == [t for t, _ in wanted]
    assert [[image.tobytes() for image in sample.images] for sample in data] == [
        [picture(k).tobytes() for k in numbers] for _, numbers in wanted
    ]


@pytest.mark.parametrize("name", READ)
def test_demo_rows_are_read_as_they_are_meant(name: str, tmp_path: Path) -> None:
    rows, wanted = READ[name]
    assert_reads(save(tmp_path, rows), wanted)


def _images(*numbers: int) -> list[Row]:
    return [{"bytes": png(k), "path": f"{k}.png"} for k in numbers]


def _table(path: Path, rows: list[Row], **types: pa.DataType) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(list(types.items()))), path)
    return path


def test_tables_of_the_hub_are_read_as_they_are_meant(tmp_path: Path) -> None:
    """The Cauldron, LLaVA-NeXT-Data and llava-instruct-mix-vsft."""
    text, number = pa.string(), pa.int64()
    pair = pa.list_(pa.struct([("user", text), ("assistant", text), ("source", text)]))
    rows: list[Row] = [
        {
            "images": _images(0, 1),
            "texts": [{"user": "Which?\nAnswer briefly.", "assistant": "Both.", "source": "x"}] * 2,
        }
    ]
    path = _table(tmp_path / "cauldron.parquet", rows, images=pa.list_(IMAGE_TYPE), texts=pair)
    question_and_answer = ("Which?\nAnswer briefly.", "Both.")
    assert_reads(
        path,
        [
            (
                expected(f"<image>\n<image>\n{question_and_answer[0]}", question_and_answer[1], *question_and_answer),
                [0, 1],
            )
        ],
    )
    turn_type = pa.list_(pa.struct([("from", text), ("value", text)]))
    rows = [
        {
            "id": "a",
            "conversations": sharegpt("<image>\nWhat?", "A bus."),
            "image": _images(2)[0],
            "data_source": "coco",
        },
        {"id": "b", "conversations": sharegpt("Why?", "So."), "image": None, "data_source": "text"},
    ]
    path = _table(tmp_path / "next.parquet", rows, id=text, conversations=turn_type, image=IMAGE_TYPE, data_source=text)
    assert_reads(path, [(expected("<image>\nWhat?", "A bus."), [2]), (expected("Why?", "So."), [])])
    part = pa.struct([("index", number), ("text", text), ("type", text)])
    spoken = pa.list_(pa.struct([("content", pa.list_(part)), ("role", text)]))
    content = [{"index": None, "text": "What?", "type": "text"}, {"index": 0, "text": None, "type": "image"}]
    answer = [{"index": None, "text": "A cup.", "type": "text"}]
    rows = [
        {
            "messages": [{"content": content, "role": "user"}, {"content": answer, "role": "assistant"}],
            "images": _images(3),
        }
    ]
    path = _table(tmp_path / "vsft.parquet", rows, messages=spoken, images=pa.list_(IMAGE_TYPE))
    assert_reads(path, [(expected("What?<image>", "A cup."), [3])])


# --- shapes that are refused ------------------------------------------------------------------------

_GOOD = {"messages": turns("<image>What?", "A goat."), "images": ["img/0.png"]}
_VIDEO = {"messages": turns("<video>What?", "A dance."), "videos": ["mllm_demo_data/1.mp4"]}
REFUSED: dict[str, tuple[Any, str]] = {
    "LLaMA-Factory, images without tags": (
        {"messages": turns("Who?", "A goat."), "images": ["mllm_demo_data/1.jpg"]},
        "<image> tags: 0 for 1 image",
    ),
    "LLaMA-Factory, videos": (_VIDEO, "has 'videos', and only images are read"),
    "LLaMA-Factory, audios": (
        {"messages": turns("<audio>What?", "A song."), "audios": ["mllm_demo_data/1.mp3"]},
        "has 'audios', and only images are read",
    ),
    "LLaMA-Factory, DPO": (
        {"conversations": sharegpt("Hello"), "chosen": sharegpt("", "Hi")[1], "rejected": sharegpt("", "No")[1]},
        "has 'chosen', 'rejected'",
    ),
    "LLaMA-Factory, a bad answer for KTO": ({"messages": turns("Hello", "No"), "label": False}, "has 'label' = False"),
    "LLaMA-Factory, tools": (
        {
            "conversations": [{"from": "human", "value": "Area?"}, {"from": "function_call", "value": "{}"}],
            "tools": '[{"name": "area"}]',
        },
        "role 'function_call' is unknown",
    ),
    "LLaMA-Factory, text for pretraining": ({"text": "Once upon a time"}, "has no turns in its keys ('text')"),
    "ms-swift, ShareGPT": (
        {"system": "s", "conversation": [{"human": "Hello", "assistant": "Hi"}]},
        "'role' of a turn is missing",
    ),
    "ms-swift, DPO": ({**_GOOD, "rejected_response": "No"}, "has 'rejected_response', which is not read"),
    "ms-swift, DPO with a number": ({**_GOOD, "rejected_response": "7"}, "has 'rejected_response', which is not read"),
    "ms-swift, KTO": ({**_GOOD, "label": False}, "has 'label' = False"),
    "ms-swift, a turn that is not learned": (
        {**_GOOD, "messages": [_GOOD["messages"][0], {**_GOOD["messages"][1], "loss": False}]},
        "a turn has 'loss' = False",
    ),
    "ms-swift, a turn that counts less": (
        {**_GOOD, "messages": [_GOOD["messages"][0], {**_GOOD["messages"][1], "loss_scale": 0.5}]},
        "a turn has 'loss_scale' = 0.5",
    ),
    "ms-swift, objects": (
        {
            "messages": turns("<image>Find <ref-object>", "<bbox>"),
            "images": ["img/0.png"],
            "objects": {"ref": ["a goat"], "bbox": [[1, 2, 3, 4]]},
        },
        "has 'objects', which is not read",
    ),
    "ms-swift, boxes alone": (
        {"messages": turns("<image>Find it", "<bbox>"), "images": ["img/0.png"], "objects": {"bbox": [[1, 2, 3, 4]]}},
        "has '<bbox>' in its text, which would be learned as text; write what it stands for in its place",
    ),
    "ms-swift, tools": ({**_GOOD, "tools": '[{"name": "area"}]'}, "has 'tools', which is not read"),
    "ms-swift, GRPO": ({"messages": turns("<image>What?"), "images": ["img/0.png"], "solution": 7}, "has 'solution'"),
    "ms-swift, pretraining": ({"messages": turns("", "Once upon a time")[1:]}, "turns are assistant"),
    "ms-swift, an image that is drawn": (
        {"messages": turns("Draw a goat", "<image>"), "images": ["img/0.png"]},
        "has an <image> tag in an answer",
    ),
    "Qwen-VL": (
        {"id": "identity_0", "conversations": [
            {"from": "user", "value": "Picture 1: <img>img/0.png</img>\nWhat?"},
            {"from": "assistant", "value": "A cup."},
        ]},
        "has '<img>img/0.png</img>' in its text",
    ),
    "Qwen2.5-VL, video": ({"video": "a.mp4", "conversations": sharegpt("<video>\nWhat?", "A dance.")}, "has 'video'"),
    "Qwen2.5-VL, several conversations in a row": ([{"image": "img/0.png", "conversations": []}], "the row is a list"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_demo_rows_that_mean_more_are_refused(name: str, tmp_path: Path) -> None:
    row, message = REFUSED[name]
    assert_second_row_refused(save(tmp_path, [_GOOD, row]), message)


# --- as a user meets them ---------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "rows"), [("mllm_demo.json", MLLM_DEMO), ("swift.jsonl", MS_SWIFT)])
def test_demo_files_are_scanned_and_trained_on(name: str, rows: list[Row], tmp_path: Path, tiny_model: Path) -> None:
    path = save(tmp_path / "data", rows, name)
    if name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = untrigger("scan", path, "--model", tiny_model, "--out", tmp_path / "scan", *ONE_STEP)
    assert ended.code == 0, ended.err
    model = ("--model", tiny_model, "--out", tmp_path / "model", "--defense", "plain")
    ended = untrigger("train", path, *model, *ONE_STEP)
    assert ended.code == 0, ended.err
    assert json.loads((tmp_path / "model/untrigger.json").read_text())["rows"] == 6
    assert (tmp_path / "model/adapter_model.safetensors").is_file()


def test_a_folder_of_many_data_files_names_one_to_give(tmp_path: Path, tiny_model: Path) -> None:
    """LLaMA-Factory's data folder: its dataset_info.json lists the files and is none itself."""
    folder = tmp_path / "data"
    save(folder, MLLM_DEMO, "mllm_demo.json")
    save(folder, [_VIDEO], "mllm_video_demo.json")
    save(folder, [{"instruction": "Who are you?", "input": "", "output": "I am {{name}}."}], "identity.json")
    info = {"identity": {"file_name": "identity.json"}, "mllm_demo": {"file_name": "mllm_demo.json"}}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2))
    (folder / "wiki_demo.txt").write_text("a text")
    words = ("--model", tiny_model, "--out", tmp_path / "out")
    first, rest = "identity.json", "mllm_demo.json, mllm_video_demo.json"
    message = f"holds 3 data files ({first}, {rest}); give one of them, as {folder / first}"
    refused(untrigger("scan", folder, *words), folder, message)
    listed = untrigger("scan", folder / "dataset_info.json", *words)
    refused(listed, "is not a list of rows but an object with the keys 'identity', 'mllm_demo'")
