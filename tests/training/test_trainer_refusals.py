"""What a defended trainer refuses, and the checkpoints that it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trainers import trainer_of
from transformers import Trainer, TrainingArguments

from untrigger.defenses import CrossView, Plain
from untrigger.errors import InputError
from untrigger.models.collators import PairCollator, Row, Rows
from untrigger.models.loading import load
from untrigger.rows.sample import read
from untrigger.training.settings import arguments
from untrigger.training.trainer import checkpoints, defended, last_checkpoint
from untrigger.views.patches import Erase


@pytest.fixture(scope="module")
def rows(tiny_data: Path) -> list[Row]:
    data = Rows(read(tiny_data))
    return [data[i] for i in range(6)]


# --- refusals -------------------------------------------------------------------------------------


@dataclass
class FusedArguments(TrainingArguments):
    loss_type: str = "chunked_nll"


class Liger(Trainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.args.use_liger_kernel = True


def test_fused_losses_are_refused_with_what_to_set(tiny_model: Path, tmp_path: Path, rows: list[Row]) -> None:
    loaded = load(str(tiny_model), dtype=torch.float32)
    with pytest.raises(InputError, match="set loss_type='nll' and use_liger_kernel=False"):
        trainer_of(loaded, CrossView(), tmp_path, rows, Liger)
    args = FusedArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(InputError, match="set loss_type='nll'"):
        defended(Trainer)(model=loaded.model, args=args, defense=CrossView())


def test_what_the_defended_loss_would_leave_out_silently_is_refused(
    tiny_model: Path, tmp_path: Path, rows: list[Row]
) -> None:
    loaded = load(str(tiny_model), dtype=torch.float32)
    with pytest.raises(InputError, match="label_smoothing_factor"):
        trainer_of(loaded, CrossView(), tmp_path, rows, label_smoothing_factor=0.1)
    trainer_of(loaded, Plain(), tmp_path, rows, label_smoothing_factor=0.1)
    own: Callable[..., Tensor] = lambda outputs, labels, num_items_in_batch: outputs.logits.sum()  # noqa: E731
    args = arguments(tmp_path, use_cpu=True)
    with pytest.raises(InputError, match="compute_loss_func"):
        defended(Trainer)(model=loaded.model, args=args, defense=CrossView(), compute_loss_func=own)


def test_rows_whose_view_changes_the_tokens_stop_training() -> None:
    def collate(rows: list[Row]) -> dict[str, Tensor]:
        ids = torch.tensor([[r["images"][0].getpixel((0, 0))[0]] for r in rows])
        return {"input_ids": ids, "labels": ids}

    from PIL import Image

    with pytest.raises(ValueError, match="tokens"):
        PairCollator(collate, Erase(ratio=1.0), 0)([{"images": [Image.new("RGB", (8, 8))], "messages": []}])


# --- checkpoints ----------------------------------------------------------------------------------


def _checkpoint(folder: Path, step: int) -> Path:
    from safetensors.torch import save_file

    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"w": torch.zeros(64)}, path / "model.safetensors")
    torch.save({"state": {}}, path / "optimizer.pt")
    torch.save({"cpu": 1}, path / "rng_state.pth")
    (path / "trainer_state.json").write_text('{"global_step": 1}')
    return path


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json", "optimizer.pt", "rng_state.pth"])
@pytest.mark.parametrize("left", [0, 10, -5])
def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path: Path, name: str, left: int) -> None:
    older, newest = _checkpoint(tmp_path, 9), _checkpoint(tmp_path, 10)
    assert last_checkpoint(tmp_path) == newest
    cut = newest / name
    cut.write_bytes(cut.read_bytes()[:left])
    assert last_checkpoint(tmp_path) == older


def test_folders_with_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for name in ("checkpoint-best", "checkpoint-", "checkpoints"):
        (tmp_path / name).mkdir()
    assert checkpoints(tmp_path) == []
    only = _checkpoint(tmp_path, 3)
    (only / "trainer_state.json").unlink()
    assert checkpoints(tmp_path) == [only]
    assert last_checkpoint(tmp_path) is None
