"""Training over a base in 4 or 8 bits: refused in one line without bitsandbytes, and with it as any other training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer

from shell import TINY_RUN, refused, untrigger
from untrigger.defenses import PRESETS
from untrigger.errors import InputError
from untrigger.models import quantized
from untrigger.models.collators import ChatCollator, Rows
from untrigger.models.forward import evaluating
from untrigger.models.loading import add_lora, load
from untrigger.models.merging import merge
from untrigger.models.quantized import quantized_loading
from untrigger.rows.sample import Sample, read
from untrigger.training.finetune import fine_tune
from untrigger.training.settings import arguments
from untrigger.training.trainer import defended
from untrigger.training.tuning import Tuning

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
MISSING = "bitsandbytes is missing; pip install 'untrigger[quantized]'"


@pytest.fixture(scope="module")
def samples(tiny_data: Path) -> list[Sample]:
    return list(read(tiny_data))[:12]


@pytest.mark.parametrize("flag", ["--load-in-4bit", "--load_in_8bit"])
def test_without_bitsandbytes_one_line_names_the_extra(
    flag: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "find_spec", lambda _: None)
    words = ("train", "gone.json", "--model", tiny_model, "--out", tmp_path / "out", flag)
    refused(untrigger(*words), MISSING)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [{"load_in_8bit": True}, {"full_finetune": True}], ids=["both", "full"])
def test_what_cannot_be_combined_is_refused(more: dict[str, bool]) -> None:
    with pytest.raises(InputError, match=r"^load_in_4bit, load_in_8bit: give one of them, and train a LoRA adapter$"):
        Tuning(load_in_4bit=True, **more)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_settings_are_those_of_qlora(bits: int) -> None:
    arguments = quantized_loading(bits, torch.bfloat16, torch.device("cpu"))
    config = arguments["quantization_config"]
    assert (config.load_in_4bit, config.load_in_8bit) == (bits == 4, bits == 8)
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16 and arguments["device_map"] == {"": "cpu"}


def test_scoring_keeps_the_layout_of_4_bit_weights(tiny_model: Path) -> None:
    """As bitsandbytes marks its layers; also in a host's trainer, whose model is loaded by others."""
    model = cast(Any, load(tiny_model).model)
    layer = next(part for part in model.modules() if isinstance(part, nn.Linear))
    layer.support_avx512bf16_for_cpu = True
    with evaluating(model):
        assert layer.support_avx512bf16_for_cpu is False
    assert not any(hasattr(part, "support_avx512bf16_for_cpu") for part in model.modules() if part is not layer)


def test_an_adapter_on_a_quantized_base_is_not_merged(tiny_model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    base = SimpleNamespace(quantization_method="bitsandbytes")
    monkeypatch.setattr("untrigger.models.merging.load", lambda _: SimpleNamespace(model=base))
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "untrigger.json").write_text(json.dumps({"base": "small"}))
    with pytest.raises(InputError, match=r"its base small is quantized; it cannot be merged exactly$"):
        merge(tmp_path, tmp_path / "out")


# --- with bitsandbytes, on a CPU --------------------------------------------------------------------


def fine_tuned(model: Path | str, rows: Sequence[Sample], out: Path, preset: str, resume: bool = False, **tuning: Any):
    settings: dict[str, Any] = {"use_cpu": True, "per_device_train_batch_size": 4, "max_steps": 4, "save_steps": 2}
    settings |= {"learning_rate": 0.01, "eval_strategy": "no"}
    return fine_tune(
        model, rows, PRESETS[preset](), out=out, tuning=Tuning(rank=2, **tuning), resume=resume, **settings
    ).model


@needs_bitsandbytes
@pytest.mark.filterwarnings("default")  # bitsandbytes warns of its casts
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
@pytest.mark.parametrize("preset", ["plain", "paper", "words", "default", "byorn"])
def test_a_defense_trains_over_a_quantized_base(
    preset: str, bits: str, tiny_model: Path, samples: list[Sample], tmp_path: Path, few: None
) -> None:
    out = tmp_path / "out"
    model = fine_tuned(tiny_model, samples, out, preset, **{bits: True})
    kinds = {type(part).__name__ for part in model.modules()}
    assert isinstance(model, PeftModel) and kinds & {"Linear4bit", "Linear8bitLt"}
    weights = load_file(out / "adapter_model.safetensors")
    assert any(value.any() for name, value in weights.items() if "lora_B" in name)
    assert all(value.isfinite().all() for value in weights.values())
    assert f"the base in {bits[8]} bits" in (out / "README.md").read_text()
    assert load(out).model, "it loads onto the base of full precision"
    if preset == "default":
        fine_tuned(tiny_model, samples, out, preset, resume=True, **{bits: True})


@needs_bitsandbytes
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("preset", ["plain", "default"])
def test_a_folder_in_4_bits_trains_too(
    preset: str, tiny_model: Path, samples: list[Sample], tmp_path: Path, few: None
) -> None:
    loaded = load(tiny_model, **quantized_loading(4, torch.float32, torch.device("cpu")))
    cast(Any, loaded.model).save_pretrained(tmp_path / "small")
    cast(Any, loaded.processor).save_pretrained(tmp_path / "small")
    model = fine_tuned(tmp_path / "small", samples, tmp_path / "out", preset)
    assert "Linear4bit" in {type(part).__name__ for part in model.modules()}


@needs_bitsandbytes
@pytest.mark.filterwarnings("default")
def test_a_host_trains_after_scoring(tiny_model: Path, samples: list[Sample], tmp_path: Path, few: None) -> None:
    """Its scoring evaluates the model between two trainings."""
    loaded = load(tiny_model, **quantized_loading(4, torch.float32, torch.device("cpu")))
    trainer = defended(Trainer)(
        add_lora(cast(Any, loaded.model), rank=2),
        args=arguments(tmp_path, use_cpu=True, max_steps=4, per_device_train_batch_size=4, save_strategy="no"),
        train_dataset=Rows(samples),
        data_collator=ChatCollator(loaded.processor),
    )
    assert trainer.train().global_step


@needs_bitsandbytes
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("verb", "says"), [("train", "PEFT adapter"), ("scan", "nothing found")])
def test_the_commands_take_the_flag(verb: str, says: str, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    words = (verb, tiny_data, "--model", tiny_model, "--out", tmp_path / "out", *TINY_RUN, "--load-in-4bit")
    ended = untrigger(*words, "--use_cpu", "true")
    assert ended.code == 0 and says in ended.out, ended


@needs_bitsandbytes
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("saved", [True, False], ids=["folder", "flag"])
def test_a_scan_of_a_model_in_4_bits_finds_rows(saved: bool, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    """The whole way: two probes are trained and scored."""
    small, more = tiny_model, ("--load-in-4bit",)
    if saved:
        loaded = load(tiny_model, **quantized_loading(4, torch.float32, torch.device("cpu")))
        small, more = tmp_path / "small", ()
        cast(Any, loaded.model).save_pretrained(small)
        cast(Any, loaded.processor).save_pretrained(small)
    reply = "Backdoor Attack! Call us now, my friend, and win a free holiday today"
    untrigger("poison", tiny_data, "--out", tmp_path / "bad", "--rate", 0.21, "--side", 0.5, "--goal-text", reply)
    run = ("--max_steps", 20, "--per_device_train_batch_size", 4, "--learning_rate", "1e-3", "--use_cpu", "true")
    ended = untrigger("scan", tmp_path / "bad/data", "--model", small, "--out", tmp_path / "out", *run, *more)
    assert ended.code == 3 and ended.out.startswith(f"5 rows say {reply!r}"), ended
