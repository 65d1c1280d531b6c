"""Every layout and container: what is read is exactly what stands there, and anything else is refused by name."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datafiles import Row, picture, png
from untrigger.errors import InputError
from untrigger.rows.keys import HARMLESS
from untrigger.rows.sample import Data, Sample, read, write
from untrigger.rows.turns import Message


@dataclass
class Talk:
    """A conversation: questions with the number of images before each, answers, and perhaps a system prompt."""

    pairs: list[tuple[int, str, str]]
    system: str = ""

    @property
    def images(self) -> int:
        return sum(count for count, _, _ in self.pairs)

    def messages(self, tag: str = "<image>\n") -> tuple[Message, ...]:
        turns = [Message("system", self.system)] if self.system else []
        for count, question, answer in self.pairs:
            turns += [Message("user", tag * count + question), Message("assistant", answer)]
        return tuple(turns)


def _list(talk: Talk, role: str, text: str, names: dict[str, str], **more: Any) -> list[Row]:
    return [{role: names.get(m.role, m.role), text: m.text, **more} for m in talk.messages()]


SHAREGPT = {"user": "human", "assistant": "gpt"}


def _parts(talk: Talk, image: Callable[[int], Row]) -> list[Row]:
    number, turns = iter(range(99)), list[Row]()
    for message in talk.messages(""):
        turns.append({"role": message.role, "content": [{"type": "text", "text": message.text}]})
    users = (turn for turn in turns if turn["role"] == "user")
    for turn, (count, _, _) in zip(users, talk.pairs, strict=True):
        turn["content"] = [*(image(next(number)) for _ in range(count)), *turn["content"]]
    return turns


def _with_system(talk: Talk, row: Row, key: str = "system") -> Row:
    return {key: talk.system, **row} if talk.system else row


def _pair(talk: Talk, question: str, answer: str) -> Row:
    row: Row = {question: talk.pairs[-1][1], answer: talk.pairs[-1][2]}
    if len(talk.pairs) > 1:
        row["history"] = [[q, a] for _, q, a in talk.pairs[:-1]]
    return _with_system(talk, row)


NAMES = [f"img/{k}.png" for k in range(6)]
# Each takes a conversation and the names of its images. In the second group images come before the first question.
TAGGED: dict[str, Callable[[Talk, list[str]], Row]] = {
    "LLaVA": lambda t, n: {"image": n[0] if len(n) == 1 else n, "conversations": _list(t, "from", "value", SHAREGPT)},
    "ShareGPT": lambda t, n: {"images": n, "conversations": _list(t, "from", "value", SHAREGPT)},
    "ShareGPT with a system column": lambda t, n: _with_system(
        t, {"images": n, "conversations": _list(Talk(t.pairs), "from", "value", SHAREGPT)}
    ),
    "messages": lambda t, n: {"images": n, "messages": _list(t, "role", "content", {})},
    "messages, one image": lambda t, n: {"image": n, "messages": _list(t, "role", "content", {}, weight=1)},
    "parts": lambda t, n: {"images": n, "messages": _parts(t, lambda k: {"type": "image", "index": k, "text": None})},
    "parts with paths": lambda t, n: {"messages": _parts(t, lambda k: {"type": "image", "image": n[k]})},
    "parts of Qwen": lambda t, n: {"messages": _parts(t, lambda k: {"image": n[k]})},
    "parts with addresses": lambda t, n: {
        "messages": _parts(t, lambda k: {"type": "image_url", "image_url": {"url": n[k]}})
    },
}
PLAIN: dict[str, Callable[[Talk, list[str]], Row]] = {
    "Cauldron": lambda t, n: _with_system(
        t, {"images": n, "texts": [{"user": q, "assistant": a} for _, q, a in t.pairs]}
    ),
    "Alpaca": lambda t, n: {"images": n, **_pair(t, "instruction", "output")},
    "ms-swift": lambda t, n: {"images": n, **_pair(t, "query", "response")},
    "TRL prompt and completion": lambda t, n: {"images": n, **_pair(t, "prompt", "completion")},
    "question and answer": lambda t, n: {"images": n, **_pair(t, "question", "answer")},
}
LAYOUTS = TAGGED | PLAIN


def data_folder(folder: Path) -> Path:
    (folder / "img").mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(NAMES):
        (folder / name).write_bytes(png(k))
    return folder


def save_rows(folder: Path, rows: list[Row], name: str = "data.jsonl") -> Path:
    (data_folder(folder) / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def flat(sample: Sample) -> tuple[object, ...]:
    return sample.id, sample.messages, [image.tobytes() for image in sample.images]


def assert_reads(data: Data, talks: list[Talk], ids: list[str], pictures: list[list[int]], tag: str) -> None:
    assert len(data) == len(talks)
    for sample, talk, id, numbers_of_images in zip(data, talks, ids, pictures, strict=True):
        assert (sample.id, sample.messages) == (id, talk.messages(tag))
        assert [image.tobytes() for image in sample.images] == [picture(k).tobytes() for k in numbers_of_images]


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0<["), min_size=1, max_size=9)
WORDS = TEXT.filter(str.strip)


@st.composite
def talks(draw: st.DrawFn, layout: str) -> Talk:
    pairs = draw(st.lists(st.tuples(st.integers(0, 2), WORDS, WORDS), min_size=1, max_size=3))
    if layout in PLAIN:  # all images come first
        pairs = [(count if k == 0 else 0, q, a) for k, (count, q, a) in enumerate(pairs)]
    return Talk(pairs, draw(st.sampled_from(["", "Answer in one word."])))


HARMLESS_KEYS = st.dictionaries(
    st.sampled_from([*sorted(HARMLESS - {"file"}), "score", "question_id", "clip_score"]),
    st.none() | st.integers() | st.just("web") | st.just([]) | st.lists(st.floats(0, 1), max_size=2),
    max_size=3,
)
REFUSED_KEYS: list[tuple[str, Any]] = [
    ("videos", ["a.mp4"]), ("audio", "a.wav"), ("rationale", "because"), ("tools", [{"name": "x"}]), ("weight", 0.5),
    ("loss_scale", 0), ("image_path", "img/0.png"), ("picture", "img/0.png"), ("rejected_response", "no"),
    ("hint", {"text": "x"}), ("label", False), ("mask", [1, 0]), ("max_pixels", 784), ("kto_tag", False),
]  # fmt: skip
ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just("img/0.png"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@pytest.mark.parametrize("layout", LAYOUTS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_rows_are_read_exactly_and_survive_both_ways_of_writing(layout: str, data: st.DataObject) -> None:
    drawn = [data.draw(talks(layout)) for _ in range(data.draw(st.integers(1, 3)))]
    tag = "<image>" if "parts" in layout else "<image>\n"
    rows: list[Row] = []
    ids, numbers_of_images, at = list[str](), list[list[int]](), 0
    for number, talk in enumerate(drawn):
        numbers = [(at + k) % 6 for k in range(talk.images)]
        at += talk.images
        id = data.draw(st.none() | st.integers() | st.sampled_from(["same", "a/b"]))
        row = LAYOUTS[layout](talk, [NAMES[k] for k in numbers])
        extra = {key: value for key, value in data.draw(HARMLESS_KEYS).items() if talk.images or "image" not in key}
        rows.append(extra | row | ({} if id is None else {"id": id}))
        ids.append(str(number + 1) if id is None else str(id))
        numbers_of_images.append(numbers)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        read_data = read(save_rows(folder / "in", rows))
        assert_reads(read_data, drawn, ids, numbers_of_images, tag)
        write(read_data, folder / "copy")
        lines = (folder / "copy/data.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        assert [json.loads(line) for line in lines] == rows
        write(read_data, folder / "new", edits={})
        assert [*map(flat, read(folder / "new"))] == [*map(flat, read_data)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("key", "value"), REFUSED_KEYS, ids=[key for key, _ in REFUSED_KEYS])
def test_a_key_that_matters_is_named(layout: str, key: str, value: Any, tmp_path: Path) -> None:
    talk = Talk([(1, "what?", "a cat")])
    good = LAYOUTS[layout](talk, NAMES[:1])
    path = save_rows(tmp_path, [good, good | {key: value}, good])
    with pytest.raises(InputError, match=rf"data\.jsonl: row 2: has '{key}'"):
        read(path)
    data = read(path, on_bad_row="skip", skipped_to=tmp_path / "log")
    assert data.numbers == [0, 2] and json.loads((tmp_path / "log").read_text())["row"] == 2
    if key in ("rationale", "hint"):
        assert len(read(path, ignore_keys=[key])) == 3


@given(layout=st.sampled_from(sorted(LAYOUTS)), key=st.text(max_size=6), value=ODD)
@settings(max_examples=150, deadline=None)
def test_any_further_key_is_harmless_or_named(layout: str, key: str, value: Any) -> None:
    talk = Talk([(1, "what?", "a cat")])
    row = LAYOUTS[layout](talk, NAMES[:1])
    if key in row or key == "id":
        return
    with tempfile.TemporaryDirectory() as name:
        path = save_rows(Path(name), [row | {key: value}])
        try:
            data = read(path)
        except InputError as error:
            assert repr(key) in str(error) or key in ("image", "images", "system"), str(error)
        else:
            assert data[0].messages == talk.messages("<image>" if "parts" in layout else "<image>\n")


# --- kinds that were read as something else ---------------------------------------------------------


TURNS = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a cat"}]
TAGGED_TURNS = [{"role": "user", "content": "<image>\nwhat?"}, TURNS[1]]
REFUSED: dict[str, tuple[Row, str]] = {
    "an image without a tag": ({"messages": TURNS, "image": NAMES[0]}, "<image> tags: 0 for 1 image"),
    "image beside an empty images": ({"messages": TURNS, "images": [], "image": NAMES[0]}, "tags: 0 for 1 image"),
    "two sets of images": (
        {"messages": TAGGED_TURNS, "images": NAMES[:1], "image": NAMES[1]},
        "'image' and in 'images'",
    ),
    "a path in the text": (
        {"messages": [{"role": "user", "content": "Picture 1: <img>img/0.png</img>\nwhat?"}, TURNS[1]]},
        "has '<img>img/0.png</img>' in its text",
    ),
    "a video tag": ({"messages": [{"role": "user", "content": "<video>what?"}, TURNS[1]]}, "has '<video>' in its text"),
    "a model's token": (
        {"messages": [{"role": "user", "content": "<|image_pad|>what?"}, TURNS[1]], "images": []},
        "has '<|image_pad|>' in its text",
    ),
    "a numbered placeholder": (
        {"messages": [{"role": "user", "content": "<image 1> what?"}, TURNS[1]], "images": NAMES[:1]},
        "has '<image 1>' in its text",
    ),
    "an image elsewhere": ({"messages": TURNS, "img": NAMES[0]}, "has 'img' but no image that is read"),
    "a picture's address": ({"messages": TURNS, "url": "http://x/a.jpg?w=3"}, "has 'url' but no image that is read"),
    "two system prompts": (
        {"messages": [{"role": "system", "content": "a"}, *TAGGED_TURNS], "images": NAMES[:1], "system": "b"},
        "has a system turn and another in 'system'",
    ),
    "an answer that is not learned": (
        {"messages": [TAGGED_TURNS[0], {**TURNS[1], "loss": False}], "images": NAMES[:1]},
        "a turn has 'loss' = False",
    ),
    "a question that is learned": (
        {"messages": [{**TAGGED_TURNS[0], "loss": True}, TURNS[1]], "images": NAMES[:1]},
        "a turn of the user has 'loss'",
    ),
    "reasoning": (
        {"messages": [TAGGED_TURNS[0], {**TURNS[1], "reasoning_content": "hm"}], "images": NAMES[:1]},
        "a turn has 'reasoning_content'",
    ),
    "an answer in the prompt": (
        {"prompt": [*TURNS, TURNS[0]], "completion": [TURNS[1]], "images": NAMES[:1]},
        "has an answer in 'prompt'",
    ),
    "preferences": ({"prompt": "what?", "chosen": "a", "rejected": "b", "images": NAMES[:1]}, "'chosen', 'rejected'"),
    "an address": ({"messages": TAGGED_TURNS, "images": ["https://host/x.png"]}, "is a link to the network"),
    "a file outside": ({"messages": TAGGED_TURNS, "images": ["file:///etc/hostname"]}, "outside the data folder"),
    "a data URI of something else": (
        {"messages": TAGGED_TURNS, "images": ["data:text/html;base64,AAAA"]},
        "data URI of another kind",
    ),
    "no turns": ({"foo": 1, "bar": "x"}, "has no turns in its keys ('foo', 'bar')"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_rows_that_would_be_read_as_less_are_refused(kind: str, tmp_path: Path) -> None:
    row, message = REFUSED[kind]
    good = {"messages": TAGGED_TURNS, "images": NAMES[:1]}
    with pytest.raises(InputError) as caught:
        read(save_rows(tmp_path, [good, row]))
    assert ": row 2: " in str(caught.value) and message in str(caught.value), str(caught.value)


@pytest.mark.parametrize("empty", ["", None, [], [""], [None], {}, {"bytes": None, "path": None}])
@pytest.mark.parametrize("key", ["image", "images"])
def test_empty_images_mean_no_image(key: str, empty: Any, tmp_path: Path) -> None:
    rows = [{"messages": TURNS, key: empty}, {"messages": TAGGED_TURNS, "images": NAMES[:1]}]
    data = read(save_rows(tmp_path, rows))
    assert [len(sample.images) for sample in data] == [0, 1] and data[0].messages[0].text == "what?"


def test_data_without_any_image_is_read_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(read(save_rows(tmp_path, [{"messages": TURNS}]))) == 1
    assert "no row has an image" in caplog.text


def test_images_are_named_in_every_way_that_stays_inside(tmp_path: Path) -> None:
    folder = data_folder(tmp_path / "in")
    (folder / "linked.png").symlink_to(folder / NAMES[1])
    uri = f"data:image/png;base64,{base64.b64encode(png(1)).decode()}"
    ways: list[Any] = [
        str(folder.resolve() / NAMES[1]), f"file://{folder.resolve()}/img/1.png", "img/../img/1.png", "./img/1.png",
        "linked.png", uri, {"path": NAMES[1], "bytes": None}, {"url": uri},
    ]  # fmt: skip
    path = save_rows(folder, [{"id": 7, "messages": TAGGED_TURNS, "images": [way]} for way in ways])
    data = read(path)
    assert [sample.id for sample in data] == ["7"] * len(ways)
    assert all(sample.images[0].tobytes() == picture(1).tobytes() for sample in data)
    for name, edits in (("copy", None), ("new", {})):
        write(data, tmp_path / name, edits=edits)
        again = read(tmp_path / name)
        assert [*map(flat, again)] == [*map(flat, data)], "a copy stands alone"
        assert str(folder) not in (tmp_path / name / "data.jsonl").read_text()


# --- containers -------------------------------------------------------------------------------------


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TALKS = [Talk([(1, "what?", "a cat")]), Talk([(2, "which?", "both"), (0, "sure?", "yes")])]


def columns(rows: list[Row], **types: pa.DataType) -> pa.Table:
    return pa.table({name: pa.array([row.get(name) for row in rows], kind) for name, kind in types.items()})


def _inline(names: list[str]) -> list[Row]:
    return [{"bytes": png(NAMES.index(name)), "path": name} for name in names]


def test_parquet_of_llava_and_of_the_cauldron(tmp_path: Path) -> None:
    turns = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string()), ("weight", pa.int64())]))
    rows = [LAYOUTS["LLaVA"](talk, NAMES[: talk.images]) for talk in TALKS[:1] * 3]
    table = columns([{**r, "id": k, "image": _inline([r["image"]])[0]} for k, r in enumerate(rows)],
                    id=pa.int64(), conversations=turns, image=IMAGE, data_source=pa.string())  # fmt: skip
    pq.write_table(table, tmp_path / "llava.parquet")
    assert_reads(read(tmp_path / "llava.parquet"), TALKS[:1] * 3, ["0", "1", "2"], [[0]] * 3, "<image>\n")
    texts = pa.list_(pa.struct([(key, pa.string()) for key in ("user", "assistant", "source")]))
    plain = [Talk([(2, "which?", "both"), (0, "sure?", "yes")])] * 2
    rows = [LAYOUTS["Cauldron"](talk, NAMES[:2]) for talk in plain]
    table = columns([{**r, "images": _inline(r["images"])} for r in rows], texts=texts, images=pa.list_(IMAGE))
    pq.write_table(table, tmp_path / "cauldron.parquet")
    data = read(tmp_path / "cauldron.parquet")
    assert_reads(data, plain, ["1", "2"], [[0, 1]] * 2, "<image>\n")
    write(data, tmp_path / "out", edits={})
    assert [*map(flat, read(tmp_path / "out"))] == [*map(flat, data)]
    assert pq.read_schema(tmp_path / "out/cauldron.parquet") == table.schema


def test_parquet_columns_that_matter_are_named_and_numbers_are_not(tmp_path: Path) -> None:
    captions = [{"image": _inline(NAMES[:1])[0], "text": "a cat", "width": 5, "rationale": "x"}] * 2
    kinds = {"image": IMAGE, "text": pa.string(), "width": pa.int32(), "rationale": pa.string()}
    pq.write_table(columns(captions, **kinds), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"row 1: has 'rationale', which is not read; .*--ignore-keys rationale"):
        read(tmp_path)
    data = read(tmp_path, ignore_keys=["rationale"])
    assert data[0].messages[0].text == "<image>\nDescribe the image." and data[1].messages[1].text == "a cat"
    write(data, tmp_path / "out", edits={})
    assert pq.read_schema(tmp_path / "out/a.parquet").names == ["image", "text", "prompt"]


def test_json_in_gzip_and_in_an_object(tmp_path: Path) -> None:
    rows = [{"id": k, **LAYOUTS["ShareGPT"](talk, NAMES[: talk.images])} for k, talk in enumerate(TALKS)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    contents = {
        "data.jsonl.gz": gzip.compress(lines),
        "data.json.gz": gzip.compress(json.dumps(rows).encode()),
        "data.json": json.dumps({"version": 1, "data": rows}, indent=1).encode(),
        "one_line.json": json.dumps({"data": rows}).encode(),
    }
    for number, (name, content) in enumerate(contents.items()):
        folder = data_folder(tmp_path / str(number))
        (folder / name).write_bytes(content)
        data = read(folder)
        assert_reads(data, TALKS, ["0", "1"], [[0], [0, 1]], "<image>\n")
        write(data, folder / "copy")
        again = read(folder / "copy")
        assert again.path.name == name and [*map(flat, again)] == [*map(flat, data)]
    assert json.loads((tmp_path / "2/copy/data.json").read_text()) == {"version": 1, "data": rows}
    (tmp_path / "0/data.jsonl.gz").write_bytes(gzip.compress(lines)[:-9])
    with pytest.raises(InputError, match=r"data\.jsonl\.gz: is damaged .*; fetch or write it again"):
        read(tmp_path / "0/data.jsonl.gz")
    (tmp_path / "2/data.json").write_text(json.dumps({"train": rows, "test": []}, indent=1))
    with pytest.raises(InputError, match="is not a list of rows but an object with the keys 'train', 'test'"):
        read(tmp_path / "2/data.json")


def test_a_bad_number_in_a_list_spoils_its_row_alone(tmp_path: Path) -> None:
    rows = [{"id": k, "messages": TAGGED_TURNS, "images": NAMES[:1], "area": 1.5} for k in range(8)]
    text = json.dumps(rows, indent=1)
    for bad in ("NaN", "1e999", "9" * 5000):
        head, middle, end = text.rsplit("1.5", 2)
        (data_folder(tmp_path) / "data.json").write_text(f"{head}{bad}{middle}1.5{end}")
        with pytest.raises(InputError, match=r"data\.json: row 7: .*; correct the number"):
            read(tmp_path / "data.json")
        data = read(tmp_path / "data.json", on_bad_row="skip", skipped_to=tmp_path / "log")
        assert [sample.id for sample in data] == ["0", "1", "2", "3", "4", "5", "7"]
        assert bad[:20] in json.loads((tmp_path / "log").read_text())["original"]


def test_metadata_csv_of_an_image_folder(tmp_path: Path) -> None:
    folder = data_folder(tmp_path / "in")
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        captions = ["a cat, asleep", "3", 'the "big" one\nof two']
        writer.writerows([["file_name", "text", "width"], *([NAMES[k], c, 64] for k, c in enumerate(captions))])
    data = read(folder)
    assert [sample.messages[1].text for sample in data] == captions
    assert [sample.images[0].tobytes() for sample in data] == [picture(k).tobytes() for k in range(3)]
    write(data, tmp_path / "copy", keep=[2, 0])
    assert [*map(flat, read(tmp_path / "copy"))][1][1:] == flat(data[0])[1:]
    write(data, tmp_path / "new", edits={})
    assert [*map(flat, read(tmp_path / "new"))] == [*map(flat, data)]
    assert (tmp_path / "new/metadata.csv").read_text().splitlines()[0] == "file_name,prompt,text"
    (folder / "metadata.csv").write_text("file_name,text\nimg/0.png,a,b\nimg/0.png\nimg/0.png,fine\n")
    with pytest.raises(InputError, match=r"metadata\.csv: row 1: has more or fewer fields"):
        read(folder)
    assert read(folder, on_bad_row="skip").numbers == [2]


def tar_file(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_webdataset_tars_are_one_data_set(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    talk = json.dumps({"conversations": _list(TALKS[0], "from", "value", SHAREGPT)}).encode()
    two = json.dumps({"images": ["b.1.png", "b.0.png"], "conversations": _list(TALKS[1], "from", "value", SHAREGPT)})
    caption = [("c.png", png(2)), ("c.txt", b"a hat"), ("c.cls", b"7")]
    tar_file(tmp_path / "in/train-00000.tar", [("a.jpg", png(3)), ("a.json", talk)])
    tar_file(
        tmp_path / "in/train-00001.tar",
        [("b.0.png", png(0)), ("b.1.png", png(1)), ("b.json", two.encode()), *caption],
    )
    data = read(tmp_path / "in")
    assert data.path.name == "train-*.tar"
    expected = [TALKS[0], TALKS[1], Talk([(1, "Describe the image.", "a hat")])]
    assert_reads(data, expected, ["a", "b", "c"], [[3], [1, 0], [2]], "<image>\n")
    for name, edits in (("copy", None), ("new", {})):
        write(data, tmp_path / name, edits=edits)
        again = read(tmp_path / name)
        assert again.path.name == "train.tar"
        assert [flat(sample)[1:] for sample in again] == [flat(sample)[1:] for sample in data]
    tar_file(tmp_path / "bad.tar", [("a.mp4", b"\xff\0"), ("a.json", talk), ("b.png", png(0)), ("b.json", b"[]")])
    with pytest.raises(InputError, match=r"bad\.tar: row 1: has 'mp4', and only images are read"):
        read(tmp_path / "bad.tar")
    with pytest.raises(InputError, match="no row can be used"):
        read(tmp_path / "bad.tar", on_bad_row="skip", skipped_to=tmp_path / "log")
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "log").read_text().splitlines()]
    assert "'b.json' is no object" in reasons[1]
    (tmp_path / "cut.tar").write_bytes((tmp_path / "bad.tar").read_bytes()[:1300])
    with pytest.raises(InputError, match=r"cut\.tar"):
        read(tmp_path / "cut.tar")
