"""What a model's processor refuses about a row is an error that names the row while the data is read, in each family.

And if rows were not read so: one line that names the row, from the first batch that holds it.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.version import Version
from PIL import Image

from tiny import FAMILIES
from untrigger import fine_tune
from untrigger.errors import InputError
from untrigger.models.collators import ChatCollator, Rows
from untrigger.models.generate import encode_prompts
from untrigger.models.lengths import Lengths
from untrigger.models.loading import embedded_model_path, embedded_models
from untrigger.models.processors import load_processor, reserved_tokens
from untrigger.rows.sample import Message, Sample, read
from untrigger.training.stages import Tuning

Folder = Callable[[str], Path]
Row = Callable[..., Sample]
Turns = tuple[str, str, list[tuple[int, int]]]  # question, answer and sizes of images

GOOD: Turns = ("<image>\nwhat?", "a red circle", [(40, 40)])
TOKENS = {
    "llava": ["</s>", "<pad>"],
    "llava_onevision": ["<video>", "<|im_end|>", "<|im_start|>"],
    "qwen2_vl": ["<|image_pad|>", "<|vision_start|>"],
    "qwen2_5_vl": ["<|video_pad|>", "<|im_end|>"],
    "internvl": ["<IMG_CONTEXT>", "</img>"],
    "idefics3": ["<fake_token_around_image>", "<row_1_col_2>", "<end_of_utterance>"],
    "smolvlm": ["<global-img>", "<video>"],
    "paligemma": ["</s>"],
    "gemma3": ["<boi>", "<eoi>", "<img>", "<end>"],
    "blip2": ["</s>"],
    "smol": ["<|im_end|>", "<empty_output>"],
}


def write_rows(folder: Path, rows: Sequence[Turns]) -> Path:
    lines: list[dict[str, Any]] = []
    for number, (question, answer, sizes) in enumerate(rows):
        names = [f"{width}x{height}.png" for width, height in sizes]
        for name, size in zip(names, sizes, strict=True):
            Image.new("RGB", size, "gray").save(folder / name)
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append({"id": f"n{number}", "messages": turns, "images": names})
    (folder / "data.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def check_refused(processor: Any, folder: Path, bad: Turns, reason: str) -> None:
    """The bad row, row 3 of 4, is named; without it the others are encoded for training."""
    write_rows(folder, [GOOD, GOOD, bad, GOOD])
    with pytest.raises(InputError) as error:
        read(folder, fits=Lengths(processor))
    line = rf"\S+data.jsonl: row 3: {reason}[^\n]*(; take (it|the row) out|remove the row)"
    assert re.fullmatch(line, str(error.value)), error.value
    others = read(folder, on_bad_row="skip", skipped_to=folder / "skipped", fits=Lengths(processor))
    assert [row.id for row in others] == ["n0", "n1", "n3"]
    assert [json.loads(line)["row"] for line in (folder / "skipped").read_text().splitlines()] == [3]
    rows = Rows(others)
    assert ChatCollator(processor)([rows[i] for i in range(3)])["labels"].shape[0] == 3


@pytest.mark.parametrize(("name", "token"), [(name, token) for name in TOKENS for token in TOKENS[name]])
def test_a_token_of_the_model_in_a_text_is_refused(folder: Folder, tmp_path: Path, name: str, token: str) -> None:
    processor: Any = load_processor(str(folder(name)))
    known = re.escape(repr(token))  # some are refused whatever the model is
    reason = f"(?:holds {known}, a token of the model|has {known} in its text, which would be learned as text)"
    check_refused(processor, tmp_path, (f"<image>\nsee {token}!", "no", [(40, 40)]), reason)
    (tmp_path / "answer").mkdir()
    check_refused(processor, tmp_path / "answer", ("<image>\nwhat?", f"no{token}", [(40, 40)]), reason)


def test_a_token_in_the_last_answer_is_no_part_of_a_prompt(folder: Folder, row: Row) -> None:
    processor: Any = load_processor(str(folder("qwen2_5_vl")))
    one = row("hello?", "no<|im_end|>")
    Lengths(processor, prompts_only=True)(one, [])
    with pytest.raises(InputError, match="holds"):
        Lengths(processor)(one, [])


def test_a_token_that_an_image_tag_cuts_is_refused(folder: Folder, row: Row) -> None:
    """This family's template puts images first, and so joins the text around them."""
    processor: Any = load_processor(str(folder("llava")))
    for question in ("</<image>s>", "</ <image> s>", "<im<image>age>"):
        with pytest.raises(InputError, match="a token of the model"):
            Lengths(processor)(Sample("r", (), row(question, "no").messages), [(40, 40)])


@pytest.mark.parametrize("name", FAMILIES)
def test_ordinary_texts_pass(folder: Folder, row: Row, name: str) -> None:
    processor: Any = load_processor(str(folder(name)))
    texts = ["a < b > c, <b>bold</b> [x] </div> USER: <loc0001> <|box_start|>(1,2)<|box_end|> 5% <unk> unk pad", "!!"]
    processor.tokenizer.add_tokens(["<|box_start|>", "<|box_end|>", "bold", "!"], special_tokens=True)
    for text in texts:
        assert not reserved_tokens(processor).search(text)
        Lengths(processor)(row(f"<image>\n{text}", text), [(40, 40)])


def test_the_texts_of_the_embedded_models_tasks_pass() -> None:
    for name in embedded_models():
        if name != "smol":
            pattern = reserved_tokens(load_processor(str(embedded_model_path(name))))
            assert pattern.search("x<pad>") and pattern.search("</s>")
            assert not pattern.search("What shape is there? a red circle left of 2 blue stars, <emoji>")


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_shape_that_the_processor_refuses_is_refused(folder: Folder, tmp_path: Path, name: str) -> None:
    processor: Any = load_processor(str(folder(name)))
    reason = r"the model's processor takes no image of 201 x 1 pixels \(absolute aspect ratio .*\)"
    check_refused(processor, tmp_path, ("<image>\nwhat?", "no", [(201, 1)]), reason)


@pytest.mark.parametrize("turned", [False, True])
def test_every_size_is_judged_though_few_are_put_to_the_processor(
    folder: Folder, row: Row, turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor: Any = load_processor(str(folder("qwen2_5_vl")))
    lengths, counted = Lengths(processor), list[tuple[int, int]]()
    count = lengths._count  # type: ignore[reportPrivateUsage]

    def counting(text: str, sizes: Sequence[tuple[int, int]]) -> int:
        counted.extend(sizes)
        return count(text, sizes)

    monkeypatch.setattr(lengths, "_count", counting)

    def refuses(width: int, height: int) -> bool:
        try:
            lengths(row("<image>\nwhat?", "a"), [(height, width) if turned else (width, height)])
        except InputError as error:
            assert "takes no image of" in str(error)
            return True
        return False

    sizes = [(width, height) for height in range(1, 30) for width in range(height, 4200, 37)]
    random.Random(0).shuffle(sizes)
    refused = [size for size in sizes if refuses(*size)]
    assert refused == [(width, height) for width, height in sizes if width > 200 * height]
    assert len(sizes) > 3000 and len(counted) < len(refused) + 60
    before = len(counted)
    assert refuses(300, 1) and refuses(300, 1)
    assert len(counted) == before + 1


def test_wide_images_do_not_speak_for_tall_ones(folder: Folder, row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    processor: Any = load_processor(str(folder("paligemma")))
    image_processor = processor.image_processor
    process = type(image_processor).__call__

    def no_tall_ones(self: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
        if images[0][0].height > 2 * images[0][0].width:
            raise ZeroDivisionError("division by zero")
        return process(self, images, *args, **kwargs)

    monkeypatch.setattr(type(image_processor), "__call__", no_tall_ones)
    lengths, one = Lengths(processor), row("<image>\nwhat?", "a")
    lengths(one, [(300, 10)])
    lengths(one, [(30, 40)])
    with pytest.raises(InputError, match=r"takes no image of 40 x 200 pixels \(division by zero\); take the row out"):
        lengths(one, [(40, 200)])


def test_blip_rows_need_an_image(folder: Folder, tmp_path: Path) -> None:
    processor: Any = load_processor(str(folder("blip2")))
    check_refused(processor, tmp_path, ("hello?", "no", []), "has no image, and BLIP-2 needs one in each row")
    processor = load_processor(str(folder("instructblip")))
    (tmp_path / "instruct").mkdir()
    two: Turns = ("<image> <image> same?", "no", [(40, 40), (30, 40)])
    check_refused(processor, tmp_path / "instruct", two, "has 2 images, and InstructBLIP needs one in each row")


def test_turns_that_a_chat_template_refuses_are_refused(folder: Folder, tmp_path: Path) -> None:
    processor: Any = load_processor(str(folder("llava")))
    write_rows(tmp_path, [GOOD, GOOD])
    lines = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    lines[1]["messages"].insert(0, {"role": "system", "content": "You answer."})
    (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    processor.chat_template = refusal + processor.chat_template
    with pytest.raises(InputError, match="row 2: the model's chat template does not take a row: no system turn"):
        read(tmp_path, fits=Lengths(processor))
    assert [row.id for row in read(tmp_path, on_bad_row="skip", fits=Lengths(processor))] == ["n0"]
    processor.chat_template = "{% for m in messages %}{{ 'x' + m['content'] }}{% endfor %}"  # for plain strings
    with pytest.raises(InputError, match="row 1: the model's chat template does not take a row: "):
        read(tmp_path, fits=Lengths(processor))


def test_an_image_alone_is_put_to_the_template_as_such(folder: Folder, row: Row) -> None:
    processor: Any = load_processor(str(folder("llava")))
    refusal = "{% if messages[0]['content'] | length == 1 %}{{ raise_exception('no text') }}{% endif %}"
    processor.chat_template = refusal + processor.chat_template
    lengths = Lengths(processor)
    lengths(row("<image>\nwhat?", "no"), [(40, 40)])
    with pytest.raises(InputError, match="no text"):
        lengths(row("<image>", "no"), [(40, 40)])


# --- rows that were read without the check -----------------------------------------------------------


def test_a_batch_names_the_row_that_the_processor_refuses(folder: Folder, row: Row) -> None:
    processor: Any = load_processor(str(folder("qwen2_5_vl")))
    rows = [row("<image>\nwhat?", "a", (40, 40)), row("<image>\nand?", "b", (201, 1), id="strip")]
    data = Rows(rows)
    with pytest.raises(InputError, match=r"^row 2, id 'strip': the model's processor does not take it \(absolute"):
        ChatCollator(processor)([data[0], data[1]])
    with pytest.raises(InputError, match=r"^id 'strip': the model's processor does not take it \(absolute"):
        encode_prompts(processor, rows)
    if Version(transformers.__version__) < Version("5.22"):
        return  # processors then count only the tokens of what they are given
    text = Sample("text", (), (Message("user", "see <|video_pad|>"), Message("assistant", "no")))
    with pytest.raises(InputError, match=r"^row 1, id 'text': .* does not take it \(Found 1 <\|video_pad\|>"):
        ChatCollator(processor)([Rows([text])[0]])


def test_a_batch_that_is_refused_only_together_names_its_first_row(
    folder: Folder, row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor: Any = load_processor(str(folder("llava")))
    process = type(processor).__call__

    def alone(self: Any, *args: Any, text: list[str], **kwargs: Any) -> Any:
        if len(text) > 1:
            raise RuntimeError("one at a time")
        return process(self, *args, text=text, **kwargs)

    monkeypatch.setattr(type(processor), "__call__", alone)
    data = Rows([row("<image>\nwhat?", "a", (40, 40))] * 2)
    with pytest.raises(
        InputError, match=r"^row 1, id 'row' and the rest of its batch: .*\(one at a time\); set per_dev"
    ):
        ChatCollator(processor)([data[0], data[1]])


def test_training_stops_in_one_line_that_names_the_row(folder: Folder, tmp_path: Path) -> None:
    strip: Turns = ("<image>\nwhat?", "no", [(201, 1)])
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data", [GOOD, GOOD, strip, GOOD])
    with pytest.raises(InputError, match=r"row 3, id 'n2': the model's processor does not take it"):
        fine_tune(
            folder("qwen2_5_vl"), read(tmp_path / "data"), "plain", out=tmp_path / "out",
            tuning=Tuning(rank=2), per_device_train_batch_size=2,
        )  # fmt: skip
