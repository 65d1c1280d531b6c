"""Which checkpoint folders count, and which of them are complete."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from untrigger.training.checkpoints import checkpoints, last_checkpoint


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
def test_last_checkpoint_skips_incomplete_ones(tmp_path: Path, name: str, left: int) -> None:
    older, newest = _checkpoint(tmp_path, 9), _checkpoint(tmp_path, 10)
    assert last_checkpoint(tmp_path) == newest
    cut = newest / name
    cut.write_bytes(cut.read_bytes()[:left])
    assert last_checkpoint(tmp_path) == older


def test_checkpoints_ignore_other_folders(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for name in ("checkpoint-best", "checkpoint-", "checkpoints"):
        (tmp_path / name).mkdir()
    assert checkpoints(tmp_path) == []
    only = _checkpoint(tmp_path, 3)
    (only / "trainer_state.json").unlink()
    assert checkpoints(tmp_path) == [only]
    assert last_checkpoint(tmp_path) is None
