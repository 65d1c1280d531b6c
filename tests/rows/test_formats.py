"""Every layout and container: what is read is exactly what stands there, and anything else is refused by name."""

from __future__ import annotations

import base64
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datafiles import Row, assert_second_row_refused, picture, png
from talks import LAYOUTS, NAMES, PLAIN, Talk, assert_reads, data_folder, flat, save_rows
from untrigger.errors import InputError
from untrigger.rows.keys import HARMLESS
from untrigger.rows.sample import read, write

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
_VALUE = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just("img/0.png")
_INNER = _VALUE | st.lists(_VALUE, max_size=2)
ODD = _INNER | st.dictionaries(st.text(max_size=3), _INNER, max_size=2) | st.lists(_INNER, max_size=2)


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
    assert list(data.numbers) == [0, 2] and json.loads((tmp_path / "log").read_text())["row"] == 2
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
    assert_second_row_refused(save_rows(tmp_path, [good, row]), message)


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
