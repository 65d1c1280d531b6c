"""Counted operations and memory: against PyTorch's own counter, and for the models that plans/coco-7b.yaml states."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from torch.utils.flop_counter import FlopCounterMode

import published
from shell import refused, untrigger
from untrigger import load
from untrigger.bench.flops import TEXT_TOKENS, Size, counted_size, flops, memory
from untrigger.bench.plan import read_plan, read_sizes
from untrigger.bench.store import Cell
from untrigger.data import load as load_rows
from untrigger.errors import InputError
from untrigger.models.collators import ChatCollator, Rows
from untrigger.models.loading import add_lora, embedded_model_path

PLAN = Path(__file__).parents[2] / "plans" / "coco-7b.yaml"
SIZE = Size(6.5, 0.26, 0.3, 32, 4096, 4096, 2.5, 576, 576)
CELL = Cell("some/model", "easy-vqa", "badnets", "fixed", train_rows=1000, test_rows=100, epochs=1, precision="bf16")


@pytest.mark.parametrize("name", published.PUBLISHED)
def test_the_plan_states_what_is_counted(name: str, tmp_path: Path) -> None:
    counted = counted_size(str(published.make(name, tmp_path)))
    stated = read_sizes(PLAN)[name]
    for field, value in vars(counted).items():
        assert getattr(stated, field) == pytest.approx(value, rel=1e-3, abs=6e-4), field


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_step_has_the_counted_operations(name: str, checkpointing: bool) -> None:
    """Rough for small models: the first of few layers needs no gradient of its input, and the head is a large part."""
    model, processor = load(name)
    batch = ChatCollator(processor)(cast(Any, [Rows(load_rows("scenes-captions", rows=1))[0]]))
    model = cast(Any, add_lora(model, rank=1)).train()
    if checkpointing:  # as the host does it
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids", "labels")
    with FlopCounterMode(display=False) as counter:
        model(**{key: batch[key] for key in names if key in batch}).loss.backward()
    tokens, pixels = batch["input_ids"].shape[1], batch["pixel_values"]
    counted = counted_size(str(embedded_model_path(name)))
    patches = pixels.shape[0] if pixels.ndim == 2 else counted.patches  # this image is small
    size = replace(counted, image_tokens=tokens - TEXT_TOKENS, patches=patches)
    cell = replace(CELL, train_rows=1, test_rows=0, arguments={"gradient_checkpointing": True} if checkpointing else {})
    head = 2 * 2 * model.get_output_embeddings().weight.numel() * tokens  # which here reads every token
    assert counter.get_total_flops() == pytest.approx(flops(cell, size) + head, rel=0.2)


def test_what_is_trained_decides_the_operations() -> None:
    answers, towers = flops(CELL, SIZE, trained=False), 2 * 0.3e9 * 576 * 1000
    plain, stored = flops(CELL, SIZE) - answers, replace(CELL, arguments={"gradient_checkpointing": True})
    assert plain - towers == pytest.approx(2 * 1000 * (2 * 6.5e9 * 616 + 4 * 32 * 4096 * 616**2))
    one_more = 1.5 * (plain - towers)
    assert flops(stored, SIZE) - answers == pytest.approx(one_more + 3 * towers), "one more forward pass"
    full = replace(CELL, tuning={"full_finetune": True})
    assert flops(full, SIZE) - answers == pytest.approx(one_more + towers), "gradients of the weights"
    assert flops(replace(CELL, epochs=3), SIZE) - answers == pytest.approx(3 * plain)


def test_memory_follows_the_settings() -> None:
    weights = 2 * 7.06e9
    whole = memory(CELL, SIZE)
    assert whole > weights + 16 * 616 * 32 * 34 * 4096, "what every layer stores of a batch of 16"
    lean = memory(replace(CELL, arguments={"gradient_checkpointing": True}), SIZE)
    cached = 64 * 2 * 32 * 4096 * 2 * (616 + 48)
    assert weights + cached < lean < whole, "the answers' keys and values are left"
    grouped = replace(SIZE, kv_width=512)
    assert memory(replace(CELL, batch_size=1), grouped) < lean
    assert memory(replace(CELL, defense="paper"), SIZE) > 1.5 * whole, "a row and its view"
    assert memory(replace(CELL, tuning={"full_finetune": True}), SIZE) > whole + 2 * weights
    assert memory(replace(CELL, precision="fp32"), SIZE) > 1.9 * whole


def test_the_7b_plan_is_estimated_without_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network here")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.chdir(PLAN.parents[1])  # it names plans/program.py
    ended = untrigger("bench", PLAN, "--out", tmp_path / "runs", "--dry-run", "--jobs", 8)
    lines = ended.out.splitlines()
    cells = read_plan(PLAN)
    assert ended.code == 0 and lines[0].startswith(f"{len(cells)} cells, 0 of them done")
    (total,) = [line for line in lines if "GPU hours at 400 TFLOP/s" in line]
    assert "with 8 GPUs, a cell on each" in total and not (tmp_path / "runs").exists()
    for name in published.PUBLISHED:
        (line,) = [line for line in lines if line.startswith(f"  {name}: ")]
        assert "GiB of memory" in line
        assert float(line.split("GPU hours, ")[1].split(" GiB")[0]) < 80, "one H100 holds the largest cell"
    assert sum("no such file or folder" in line for line in lines) == 4, "its data is not here"
    refused(untrigger("bench", PLAN, "--out", tmp_path / "runs"), "data: coco/annotations/captions_train2014.json")


def test_a_model_out_of_reach_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network here")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    plan = "models: [some/model, llava]\ndata: [easy-vqa]\nattacks: [badnets]\ndefenses: [plain]\n"
    (tmp_path / "plan.yaml").write_text(plan)
    ended = untrigger("bench", tmp_path / "plan.yaml", "--out", tmp_path / "runs", "--dry-run")
    assert ended.code == 0 and "on one core" in ended.out and "GPU hours" not in ended.out
    assert [line for line in ended.out.splitlines() if line.startswith("not counted: ")] == [
        "not counted: some/model: cannot be counted (no folder, not in the hub's cache; hub: no network here)"
    ]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{language: 7}", "sizes: a: give language, vocabulary, vision, layers"),
        ("[7]", "sizes: a: give language"),
        (str({**vars(SIZE), "layers": -1}), "sizes: a: layers is -1; give a number"),
    ],
)
def test_a_wrong_size_is_one_line(tmp_path: Path, entry: str, message: str) -> None:
    (tmp_path / "plan.yaml").write_text(f"sizes:\n  a: {entry}\n")
    with pytest.raises(InputError, match=message):
        read_sizes(tmp_path / "plan.yaml")
