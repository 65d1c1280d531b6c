"""An adapter that is merged answers as it did beside its base, and what cannot be merged is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn

from shell import refused, untrigger
from tiny import make
from untrigger.errors import InputError
from untrigger.models.collators import ChatCollator, Rows
from untrigger.models.loading import LoadedModel, add_lora, load
from untrigger.models.merging import merge
from untrigger.rows.sample import Sample

EMBEDDED = ("llava", "blip2", "qwen2_5_vl")


def save_adapter(base: Path, folder: Path, config: Any = None) -> Path:
    """An adapter with random weights on the model in ``base``, by default as ``train`` makes it."""
    torch.manual_seed(1)
    model = cast(Any, load(base).model)
    adapted = add_lora(model, rank=2) if config is None else get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(str(folder))
    return folder


@torch.no_grad()
def logits(loaded: LoadedModel, rows: Sequence[Sample]) -> Tensor:
    batch = ChatCollator(loaded.processor)([Rows(rows)[at] for at in range(2)])
    return cast(nn.Module, loaded.model).eval()(**batch).logits


def layout(folder: Path) -> dict[str, tuple[list[int], str]]:
    """Name, shape and dtype of each tensor on the disk."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (part.get_shape(), part.get_dtype()) for name, part in parts.items()}


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", EMBEDDED)
def test_a_merged_model_has_the_adapters_logits(
    family: str, use_dora: bool, samples: list[Sample], tmp_path: Path
) -> None:
    base = make(family, tmp_path / "base")
    config = LoraConfig(r=2, target_modules="all-linear", use_dora=True) if use_dora else None
    adapter = save_adapter(base, tmp_path / "adapter", config)
    returned = merge(adapter, tmp_path / "merged")
    adapted, merged = logits(load(adapter), samples), logits(load(tmp_path / "merged"), samples)
    assert torch.equal(logits(returned, samples), merged), "what is returned is what was written"
    assert (merged - adapted).abs().max() < 1e-5
    assert (merged - logits(load(base), samples)).abs().max() > 0.01, "the adapter changes the logits"
    assert layout(tmp_path / "merged") == layout(base)


def test_the_folder_is_a_whole_model_without_an_adapter(tiny_model: Path, tmp_path: Path) -> None:
    adapter, out = save_adapter(tiny_model, tmp_path / "adapter"), tmp_path / "merged"
    ended = untrigger("merge", adapter, "--out", out)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == f"{out}: {adapter} merged into its base model, with processor and model card\n"
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "README.md"} <= names
    assert not [name for name in names if "adapter" in name or name.endswith(".bin")]
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlavaForConditionalGeneration"]
    assert f"base_model: {tiny_model}\nlibrary_name: transformers\n" in (out / "README.md").read_text()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "no temporary folder stays"


def test_a_base_in_half_precision_stays_so(tiny_model: Path, tmp_path: Path) -> None:
    loaded = load(tiny_model, dtype=torch.bfloat16)
    cast(Any, loaded.model).save_pretrained(tmp_path / "base")
    cast(Any, loaded.processor).save_pretrained(tmp_path / "base")
    merge(save_adapter(tmp_path / "base", tmp_path / "adapter"), tmp_path / "merged")
    assert layout(tmp_path / "merged") == layout(tmp_path / "base")
    assert {dtype for _, dtype in layout(tmp_path / "merged").values()} == {"BF16"}


def test_what_is_no_adapter_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    for name in (tiny_model, "llava", tmp_path / "gone"):
        message = f"{name}: is not an adapter; name a folder that holds adapter_config.json"
        refused(untrigger("merge", name, "--out", tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_refused_before_the_model_is_loaded(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = save_adapter(tiny_model, tmp_path / "adapter")
    monkeypatch.setattr("untrigger.models.merging.load", lambda _: pytest.fail("it was loaded"))
    refused(untrigger("merge", adapter, "--out", adapter), f"{adapter}: exists and is not an empty folder")


def test_a_failed_write_leaves_nothing(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    adapter = save_adapter(tiny_model, tmp_path / "adapter")
    monkeypatch.setattr("transformers.LlavaProcessor.save_pretrained", fail)
    with pytest.raises(InputError, match="No space left on device"):
        merge(adapter, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.filterwarnings("ignore")  # peft warns of what is refused here
@pytest.mark.parametrize("part", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("how", ["target_modules", "modules_to_save"])
def test_a_change_of_shared_vocabulary_weights_is_refused(
    part: str, how: str, tiny_model: Path, tmp_path: Path
) -> None:
    parts: dict[str, Any] = {"target_modules": ["q_proj"]} | {how: [part]}
    adapter = save_adapter(tiny_model, tmp_path / "adapter", LoraConfig(r=2, **parts))
    with pytest.raises(InputError, match=r"share their weights in its base.*; serve the adapter itself$"):
        merge(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_is_not_finite_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    model = add_lora(cast(Any, load(tiny_model).model), rank=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(torch.nan)
    model.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(InputError, match=r"adapter cannot be merged .*NaN"):
        merge(tmp_path / "adapter", tmp_path / "out")


def test_other_kinds_of_adapters_are_merged_too(tiny_model: Path, samples: list[Sample], tmp_path: Path) -> None:
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    adapter = save_adapter(tiny_model, tmp_path / "adapter", config)
    merged = merge(adapter, tmp_path / "merged")
    assert torch.allclose(logits(merged, samples), logits(load(adapter), samples), atol=1e-5)
