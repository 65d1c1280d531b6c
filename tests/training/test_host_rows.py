"""Flagged rows of a host name the user's own row: by id, images, prompts and answers, from columns or tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset
from transformers import Trainer

from untrigger import defended
from untrigger.defenses import SharedSurprise
from untrigger.models.collators import ChatCollator, Row, Rows
from untrigger.models.loading import add_lora, load
from untrigger.rows.images import pixels_sha256
from untrigger.rows.sample import Message, Sample
from untrigger.training.flagged_rows import FLAGGED_ROWS, prompts_of
from untrigger.training.host_rows import column_prompts, decoded_turns, image_names, is_reordered, row_id
from untrigger.training.settings import arguments

EAGER = SharedSurprise(warmup_share=0.25, min_nll=0.1, iqr_factor=0.0, p_value=1 - 1e-6, min_ratio=0.0)


class Packaged(Trainer):
    """A trainer of a package that shuffles."""


Packaged.__module__ = "llamafactory.train.sft.trainer"


@pytest.fixture
def flagged(tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Callable[..., list[dict[str, Any]]]:
    """The lines of flagged_rows.jsonl that a host writes for a data set."""

    def run(dataset: Any, collate: Any = None, host: type[Trainer] = Trainer) -> list[dict[str, Any]]:
        loaded = load(tiny_model)
        trainer = defended(host)(
            add_lora(loaded.model),  # type: ignore[arg-type]
            args=arguments(tmp_path, max_steps=4, per_device_train_batch_size=8, save_strategy="no"),
            data_collator=collate or ChatCollator(loaded.processor),
            processing_class=loaded.processor,
            train_dataset=dataset,
            defense=EAGER,
        )
        trainer.train()
        lines = [json.loads(line) for line in (tmp_path / FLAGGED_ROWS).read_text().splitlines()]
        assert 0 < len(lines) < 24
        return lines

    return run


def question(sample: Sample) -> str:
    return sample.messages[0].text.removeprefix("<image>\n")


def test_columns_of_the_host_identify_a_row(flagged: Callable[..., Any], samples: list[Sample]) -> None:
    talk = (Message("user", "and now?"), Message("assistant", "a green cube"))
    for line in flagged(Rows([replace(sample, messages=(*sample.messages, *talk)) for sample in samples])):
        sample = samples[line["row"] - 1]
        assert (line["id"], line["reordered"]) == (sample.id, False)
        assert line["images"] == [f"pixels-sha256:{pixels_sha256(sample.images[0])}"]
        assert line["prompts"] == [question(sample), "and now?"]
        assert line["answers"] == [sample.messages[1].text, "a green cube"]


def test_tokenized_rows_are_decoded(
    flagged: Callable[..., Any], tiny_model: Path, samples: list[Sample], caplog: pytest.LogCaptureFixture
) -> None:
    """As in LLaMA-Factory: rows are token ids and the paths of images."""
    collator, rows = ChatCollator(load(tiny_model).processor), Rows(samples)

    def tokenized(at: int) -> Row:
        batch = {name: values[0] for name, values in collator([rows[at]]).items()}
        return {**batch, "images": [f"images/{at}.png"], "position_ids": None}

    def collate(batch: list[Row]) -> dict[str, torch.Tensor]:
        texts = ("input_ids", "labels", "attention_mask")
        pad = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        padded = {
            name: torch.nn.utils.rnn.pad_sequence([row[name] for row in batch], True, pad[name]) for name in texts
        }
        return padded | {"pixel_values": torch.stack([row["pixel_values"] for row in batch])}

    for line in flagged([tokenized(at) for at in range(len(rows))], collate, Packaged):
        sample = samples[line["row"] - 1]
        assert (line["id"], line["reordered"]) == (None, True)
        assert line["images"] == [f"images/{line['row'] - 1}.png"] and line["answers"] == [sample.messages[1].text]
        (prompt,) = line["prompts"]
        assert question(sample) in prompt and "<image>" not in prompt and sample.messages[1].text not in prompt
    assert "the host reorders rows, so find them by id, images and prompts" in caplog.text


def test_an_id_that_the_host_drops_is_written(flagged: Callable[..., Any], samples: list[Sample]) -> None:
    """The number of a shuffled row is nobody's, and its id is that of the user's row."""
    rows = Rows(samples)
    columns = [{name: rows[at][name] for name in ("id", "images", "messages")} for at in range(len(rows))]
    dataset: Any = pytest.importorskip("datasets").Dataset.from_list(columns).shuffle(seed=1)
    by_id = {sample.id: sample for sample in samples}
    lines = flagged(dataset)
    for line in lines:
        sample = by_id[line["id"]]
        assert line["reordered"] and line["images"] == [f"pixels-sha256:{pixels_sha256(sample.images[0])}"]
        assert (line["prompts"], line["answers"]) == ([question(sample)], [sample.messages[1].text])
    assert any(samples[line["row"] - 1].id != line["id"] for line in lines)


class Prepared(Dataset[Row]):
    """Rows as ms-swift's data set gives them: made from those of the data set that it wraps, without their columns."""

    def __init__(self, dataset: Any, samples: list[Sample]) -> None:
        self.dataset, self.rows = dataset, {sample.id: row for sample, row in zip(samples, Rows(samples), strict=True)}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Row:
        return {"prepared": self.rows[self.dataset[index]["id"]]}


def test_a_row_of_a_wrapped_data_set_is_named_by_its_columns(
    flagged: Callable[..., Any], tiny_model: Path, samples: list[Sample]
) -> None:
    columns = [{"id": sample.id, "images": [f"images/{sample.id}.png"]} for sample in samples]
    table: Any = pytest.importorskip("datasets").Dataset.from_list(columns).shuffle(seed=1)
    collator = ChatCollator(load(tiny_model).processor)
    by_id = {sample.id: sample for sample in samples}
    for line in flagged(Prepared(table, samples), lambda rows: collator([row["prepared"] for row in rows])):
        assert line["reordered"] and line["images"] == [f"images/{line['id']}.png"]
        assert line["answers"] == [by_id[line["id"]].messages[1].text]


# --- the parts ----------------------------------------------------------------------------------------


def test_ids_are_text_or_null() -> None:
    assert [row_id(row) for row in ({"id": 7}, {"id": "a"}, {"id": None}, {})] == ["7", "a", None, None]


def test_images_are_named_by_path_or_hash(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 4), "red")
    image.save(tmp_path / "red.png")
    content = (tmp_path / "red.png").read_bytes()
    pixels, file = f"pixels-sha256:{pixels_sha256(image)}", f"file-sha256:{sha256(content).hexdigest()}"
    uri = "data:image/png;base64,AAAA"
    with Image.open(tmp_path / "red.png") as opened:
        opened.load()
    for value, names in (
        (image, [pixels]),
        ([image, "a.png", tmp_path / "b.png"], [pixels, "a.png", str(tmp_path / "b.png")]),
        (opened, [str(tmp_path / "red.png")]),
        ({"path": "c.png", "bytes": content}, ["c.png"]),
        ([{"path": None, "bytes": content}, content], [file, file]),
        (uri, [f"uri-sha256:{sha256(uri.encode()).hexdigest()}"]),
        ([["a.png"], ["b.png"]], ["a.png", "b.png"]),
    ):
        assert image_names({"images": value}) == image_names({"image": value, "images": None}) == names
    assert image_names({}) == image_names({"images": []}) == []


def test_prepared_pixels_name_a_row_without_images() -> None:
    ones, zeros = torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    names = [image_names({"images": None, "pixel_values": values}) for values in (ones, ones.clone(), zeros)]
    assert names[0] == names[1] != names[2] and names[0][0].startswith("prepared:")
    assert len(image_names({"pixel_values": zeros.tolist()})) == 1
    assert image_names({"images": [np.zeros((2, 2))]})[0].startswith("prepared:")


def test_prompts_of_columns() -> None:
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "what?"}]
    talk = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "a cube"},
        {"role": "user", "content": "<image>\nand  this? <image>"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": None},
    ]
    assert prompts_of(talk) == column_prompts({"messages": talk}) == ["Be short.\nwhat?", "and  this?"]
    assert column_prompts({"prompt": "<image> what?", "completion": "a cube"}) == ["what?"]
    assert column_prompts({"prompt": talk[:4], "completion": []}) == ["Be short.\nwhat?\na cube\nand  this?"]
    assert column_prompts({"input_ids": [1]}) is column_prompts({"messages": [], "prompt": ""}) is None


def test_turns_are_decoded_from_labels() -> None:
    def decode(ids: Any, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(str(id) for id in ids)

    ids = torch.tensor([0, 0, 5, 9, 6, 1, 2, 7, 3, 8, 0])
    labels = torch.tensor([-100, -100, -100, -100, -100, 1, 2, -100, 3, -100, -100])
    attended = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0])
    assert decoded_turns(decode, ids, labels, attended, 9) == (["5 6", "7"], ["1 2", "3"])
    assert decoded_turns(decode, ids, labels, attended, None) == (["5 9 6", "7"], ["1 2", "3"])
    assert decoded_turns(decode, ids, torch.full_like(ids, -100), attended, 9) == ([], [])


class Lazy:
    """A data set around another one, as ms-swift's."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset


def test_a_host_that_shuffles_is_recognized(samples: list[Sample]) -> None:
    table: Any = pytest.importorskip("datasets").Dataset.from_dict({"a": [1, 2, 3]})

    def reordered(dataset: Any, kind: type[Trainer] = Trainer) -> bool:
        host = object.__new__(kind)
        host.train_dataset = dataset
        return is_reordered(host)

    assert not any(map(reordered, (Rows(samples), [{}], table, Lazy(table))))
    assert all(map(reordered, (table.shuffle(seed=0), Lazy(table.shuffle(seed=0)), Subset(Rows(samples), [1]))))
    assert reordered([{}], Packaged) and reordered([{}], type("Own", (Packaged,), {}))
