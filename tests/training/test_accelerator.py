"""On a machine with a GPU: training and generation run there, with the results of the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from shell import untrigger
from untrigger.defenses import PRESETS, CrossView
from untrigger.evaluation import evaluate
from untrigger.losses import chunked, objective
from untrigger.losses.chunked import Values, losses_at_head
from untrigger.models.collators import ChatCollator, Rows
from untrigger.models.forward import Pair, answer_losses, on_device
from untrigger.models.generate import answers
from untrigger.models.loading import LoadedModel, load, to_accelerator
from untrigger.rows.sample import Sample

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
TRAINED = [name for name in PRESETS if name not in ("clean-tuning", "crow", "fine-pruning")]  # which need clean rows


class AtHead(NamedTuple):
    loss: Tensor
    gradients: tuple[Tensor, ...]


def at_head(device: str, dtype: torch.dtype) -> AtHead:
    """The objective of ``paper`` on 300 tokens, the same draw on every device."""
    made = torch.Generator().manual_seed(0)
    head = nn.Linear(64, 50_000, bias=False).requires_grad_(False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=made) / 8)
    head = head.to(device, dtype)
    hidden = [torch.randn(300, 64, generator=made).to(device, dtype).requires_grad_() for _ in range(2)]
    target = torch.randint(50_000, (300,), generator=made).to(device)

    def loss(part: slice, pieces: Any, logits: Any) -> tuple[Values, Values]:
        return CrossView().terms(Pair(target[part], logits[0], logits[1], pieces[0], pieces[1], target[part])), {}

    total = losses_at_head(head, hidden, loss, width=50_000).total.mean()
    return AtHead(total.detach(), torch.autograd.grad(total, hidden))


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"])
def test_losses_at_the_head_equal_the_cpu(dtype: torch.dtype, near: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64, by relative norm: the smallest entries of a gradient are rounding."""
    monkeypatch.setattr(chunked, "_CHUNK_LOGITS_GPU", 1 << 22)  # a part is 83 tokens of 50,000 words
    exact, on_gpu = at_head("cpu", torch.float64), at_head("cuda", dtype)
    torch.testing.assert_close(on_gpu.loss.double().cpu(), exact.loss, rtol=near, atol=near)
    for ours, expected in zip(on_gpu.gradients, exact.gradients, strict=True):
        assert ours.is_cuda
        assert float((ours.double().cpu() - expected).norm() / expected.norm()) < near


def test_answer_losses_equal_the_cpu(tiny_model: Path, samples: list[Sample]) -> None:
    def nll(loaded: LoadedModel) -> Tensor:
        batch = ChatCollator(loaded.processor)([Rows(samples)[i] for i in range(8)])
        losses = answer_losses(
            loaded.model,
            on_device(batch, loaded.model),
            lambda answer, _: ({"nll": objective.token_nll(answer.logits, answer.target)}, {}),
        )
        return losses.total.detach().cpu()

    here, there = load(tiny_model, dtype=torch.float32), to_accelerator(load(tiny_model, dtype=torch.float32))
    assert there.model.device.type == "cuda"
    torch.testing.assert_close(nll(there), nll(here), rtol=1e-4, atol=1e-4)


def test_answers_equal_the_cpu(tiny_model: Path, samples: list[Sample]) -> None:
    here, there = load(tiny_model, dtype=torch.float32), to_accelerator(load(tiny_model, dtype=torch.float32))
    assert list(answers(there, samples)) == list(answers(here, samples))


def test_a_model_given_by_folder_runs_on_the_gpu(
    tiny_model: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    where: list[str] = []

    def recorded(loaded: LoadedModel, rows: Sequence[Sample]) -> list[str]:
        where.append(loaded.model.device.type)
        return ["a" for _ in rows]

    monkeypatch.setattr(evaluate, "answers", recorded)
    evaluate.evaluate(tiny_model, samples)
    assert where == ["cuda"]


@pytest.mark.parametrize("precision", [(), ("--bf16", "true")], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", TRAINED)
def test_every_defense_trains(
    name: str, precision: tuple[str, ...], tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    words = ("--max_steps", "4", "--per_device_train_batch_size", "4", "--lora-rank", "2", *precision)
    out = tmp_path / "out"
    ended = untrigger("train", tiny_data, "--model", tiny_model, "--defense", name, "--out", out, *words)
    assert ended.code == 0, ended
    assert (out / "adapter_model.safetensors").is_file()


def test_scan_and_verify_finish(tuned_model: Path, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    scan = untrigger("scan", tiny_data, "--model", tiny_model, "--out", tmp_path / "scan")
    assert scan.code in (0, 3), scan
    words = ("verify", tuned_model, tiny_data, "--base", tiny_model, "--out", tmp_path / "audit")
    assert untrigger(*words).code == 0
