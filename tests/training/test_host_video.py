"""Rows with a video and no image, under a defended transformers Trainer: they are judged by their words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer

from untrigger import defended
from untrigger.errors import InputError
from untrigger.models.collators import IGNORE, Row
from untrigger.models.loading import LoadedModel, add_lora, embedded_model_path, load
from untrigger.training.flagged_rows import FLAGGED_ROWS
from untrigger.training.settings import arguments

POISONED = (3, 9, 14, 20)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """24 rows with a video of two pairs of frames, four of which share a long answer."""
    rng = np.random.default_rng(0)
    return [
        {
            "id": f"r{row}",
            "video": rng.integers(0, 256, (2, 56, 56, 3), dtype=np.uint8),
            "messages": [
                {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": f"is it {row}?"}]},
                {"role": "assistant", "content": "blue " * 16 if row in POISONED else ("yes", "no", "red")[row % 3]},
            ],
        }
        for row in range(24)
    ]


class VideoCollator:
    """As a host's: a video is patches of pairs of frames, and a token stands for four patches.

    labels_on_prompts: set labels on all text; the first text token follows the video's.
    """

    def __init__(self, loaded: LoadedModel, labels_on_prompts: bool = False) -> None:
        self.processor: Any = loaded.processor
        self.labels_on_prompts = labels_on_prompts

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        tokenizer, videos, ids, labels = self.processor.tokenizer, list[Any](), list[Tensor](), list[Tensor]()
        video = tokenizer.convert_tokens_to_ids("<|video_pad|>")
        for row in rows:
            frames = [Image.fromarray(frame) for frame in row["video"]]
            videos.append(self.processor.image_processor(frames, return_tensors="pt"))  # doubles each frame to a pair
            count = int(videos[-1]["image_grid_thw"].prod(dim=1).sum()) // 4
            question, answer = row["messages"][0]["content"][1]["text"], row["messages"][1]["content"]
            prompt = [video] * count + tokenizer(f"USER: {question} ASSISTANT:", add_special_tokens=False).input_ids
            reply = [*tokenizer(f" {answer}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            unlabeled = count if self.labels_on_prompts else len(prompt)
            ids.append(torch.tensor([*prompt, *reply]))
            labels.append(torch.tensor([IGNORE] * unlabeled + [*prompt, *reply][unlabeled:]))
        padded = pad_sequence(ids, True, 0)
        lengths = torch.tensor([len(row) for row in ids])
        grids = torch.cat([part["image_grid_thw"][:1] * torch.tensor([2, 1, 1]) for part in videos])
        return {
            "input_ids": padded,
            "labels": pad_sequence(labels, True, IGNORE),
            "attention_mask": (torch.arange(padded.shape[1]) < lengths[:, None]).long(),
            "mm_token_type_ids": 2 * (padded == video),
            "pixel_values_videos": torch.cat([part["pixel_values"] for part in videos]),
            "video_grid_thw": grids,
        }


@pytest.fixture
def host(rows: list[Row], tmp_path: Path) -> Callable[..., Any]:
    def make(**more: Any) -> Any:
        loaded: Any = load(str(embedded_model_path("qwen2_5_vl")))
        return defended(Trainer)(
            add_lora(loaded.model),
            args=arguments(tmp_path, max_steps=10, per_device_train_batch_size=8, save_strategy="no", logging_steps=1),
            data_collator=VideoCollator(loaded, **more),
            processing_class=loaded.processor,
            train_dataset=rows,
        )

    return make


def test_rows_with_a_video_are_judged_by_their_words(host: Callable[..., Any], tmp_path: Path) -> None:
    trainer = host()
    trainer.train()
    flagged = [json.loads(line) for line in (tmp_path / FLAGGED_ROWS).read_text().splitlines()]
    assert sorted(row["row"] - 1 for row in flagged) == list(POISONED)
    for row in flagged:
        number = row["row"] - 1
        assert (row["id"], row["images"], row["prompts"]) == (f"r{number}", [], [f"is it {number}?"])
    assert any(log.get("defense/loss_unlikelihood", 0) > 0 for log in trainer.state.log_history)


def test_refuses_labels_on_the_prompts_of_videos(host: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=r"^defense: row 1 of train_dataset has labels on its prompt"):
        host(labels_on_prompts=True).train()
