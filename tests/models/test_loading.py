"""Loading of valid models, one-line errors for the others, and which parameters LoRA and full fine-tuning train."""

from __future__ import annotations

import json
import logging
import shutil
import socket
from pathlib import Path
from typing import Any, cast

import huggingface_hub.constants
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from untrigger.errors import InputError
from untrigger.models.loading import (
    BASE_RECORD,
    add_lora,
    base_model,
    embedded_model_path,
    embedded_models,
    is_vision,
    load,
    processor_of,
    train_all,
    why_not_a_model,
)


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def error_of(name: str | Path) -> str:
    """The one-line error that ``load`` raises."""
    with pytest.raises(InputError) as caught:
        load(name)
    message = str(caught.value)
    assert "\n" not in message and "Traceback" not in message
    return message


def test_the_embedded_llava_is_a_complete_model_folder() -> None:
    assert "llava" in embedded_models()
    folder = embedded_model_path("llava")
    names = {p.name for p in folder.iterdir()}
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json"} <= names
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pth", ".py"))]
    loaded = load("llava")
    assert (type(loaded.model).__name__, loaded.name) == ("LlavaForConditionalGeneration", "llava")
    with pytest.raises(InputError, match="no such embedded model"):
        embedded_model_path("nonsense")


def test_an_embedded_name_takes_precedence_over_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llava").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load("llava").name == "llava"


def test_embedded_weights_with_a_wrong_digest_raise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(embedded_model_path().parent, tmp_path / "embedded", ignore=shutil.ignore_patterns("*.py"))
    monkeypatch.setattr("untrigger.models.loading.files", lambda _: tmp_path)
    assert load("llava").name == "llava"
    weights = tmp_path / "embedded" / "llava" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # one bit of one weight: it would still load and answer
    weights.write_bytes(content)
    assert "wrong SHA-256" in error_of("llava") and load(weights.parent).name, "in a folder of yours it is your model"


def test_pickled_weights_raise_and_are_never_opened(copy: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "exploded",))

    (copy / "model.safetensors").unlink()
    torch.save({"w": Bomb()}, copy / "pytorch_model.bin")
    assert ".safetensors" in error_of(copy)
    save_file({"nothing": torch.zeros(1)}, copy / "decoy.safetensors")
    error_of(copy)
    assert not (tmp_path / "exploded").exists()


def test_remote_code_is_never_run(copy: Path, tmp_path: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.M"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')\n")
    error_of(copy)
    assert not (tmp_path / "exploded").exists()


def test_a_folder_without_config_raises(copy: Path) -> None:
    (copy / "config.json").unlink()
    assert "config.json" in error_of(copy)


@pytest.mark.parametrize("damage", ["weights", "config", "tokenizer", "half the weights", "text model", "a kind"])
def test_damaged_folders_raise_one_line(copy: Path, damage: str) -> None:
    weights = copy / "model.safetensors"
    if damage == "weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "config":
        (copy / "config.json").write_text("{")
    elif damage == "tokenizer":
        (copy / "tokenizer.json").write_text("{")
    elif damage == "a kind":
        fields = json.loads((copy / "tokenizer_config.json").read_text())
        (copy / "tokenizer_config.json").write_text(json.dumps([fields]))
    elif damage == "half the weights":
        tensors = load_file(weights)
        save_file(dict(sorted(tensors.items())[::2]), weights, metadata={"format": "pt"})
    else:
        (copy / "config.json").write_text('{"model_type": "llama"}')
    message = error_of(copy)
    assert str(copy) in message
    if damage == "half the weights":  # transformers would initialize them at random
        assert "missing" in message


def test_offline_nothing_is_fetched_and_the_error_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*args: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", connect)
    assert "no-such-org/no-such-model" in error_of("no-such-org/no-such-model")
    assert "llama-nonsense" in error_of("llama-nonsense")
    assert "/no/such/folder" in error_of("/no/such/folder")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("lava", "did you mean llava?"),
        ("BLIP-2", "did you mean blip2?"),
        ("llama-nonsense", "a hub id is OWNER/NAME"),
        ("./nofolder", "a hub id is OWNER/NAME"),
        ("/nofolder", "a hub id is OWNER/NAME"),
        ("~/nofolder", "a hub id is OWNER/NAME"),
        ("my/model/folder", "a hub id is OWNER/NAME"),
    ],
)
def test_an_impossible_model_name_raises_without_asking_the_hub(
    name: str, hint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "untrigger.models.loading.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("the hub was asked")
    )
    available = ", ".join(embedded_models())
    assert error_of(name) == f"{name}: no such folder or embedded model (available: {available}); {hint}"


def test_a_possible_model_name_is_accepted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name in ("llava", "mine", "./mine", str(tmp_path / "mine"), "no-such-org/no-such-model"):
        assert why_not_a_model(name) is None, name
    assert why_not_a_model("gpt2") is not None
    repo = tmp_path / "hub" / "models--gpt2"
    for part, text in (("refs/main", "c0ffee"), ("snapshots/c0ffee/config.json", "{}")):
        (repo / part).parent.mkdir(parents=True)
        (repo / part).write_text(text)
    assert why_not_a_model("gpt2") is None, "an old hub id, in the hub's cache"


def test_hub_retry_warnings_are_hidden(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 8s [Retry 5/5].")
        raise OSError("no such thing\non the hub")

    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    monkeypatch.setattr(hub, "propagate", True)
    monkeypatch.setattr("untrigger.models.loading.AutoConfig.from_pretrained", fail)
    assert error_of("no-such-org/no-such-model").endswith(": no such thing")
    assert caplog.records == [] and hub.level == level


# --- adapters ---------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    """Folder of an adapter with nonzero weights that names its base."""
    model = add_lora(load(tiny_model, dtype=torch.float32).model, rank=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / BASE_RECORD).write_text(json.dumps({"base": str(tiny_model)}))
    return tmp_path / "adapter"


def test_an_adapter_loads_onto_its_base(adapter: Path, tiny_model: Path) -> None:
    loaded = load(adapter)
    assert isinstance(loaded.model, PeftModel)
    assert loaded.name == str(adapter)
    saved = load_file(adapter / "adapter_model.safetensors")
    state = loaded.model.state_dict()
    assert saved and all(
        torch.equal(state[k.replace("lora_A", "lora_A.default").replace("lora_B", "lora_B.default")], v)
        for k, v in saved.items()
    )
    base = load(tiny_model).model.state_dict()
    inside = base_model(loaded.model).state_dict()
    assert torch.equal(inside["lm_head.weight"], base["lm_head.weight"])


def test_an_adapter_without_our_record_loads_by_pefts_record(adapter: Path) -> None:
    (adapter / BASE_RECORD).unlink()
    assert isinstance(load(adapter).model, PeftModel)


def test_broken_adapters_raise_one_line(adapter: Path) -> None:
    record, weights = adapter / BASE_RECORD, adapter / "adapter_model.safetensors"
    whole = record.read_text()
    record.write_text('{"base": "/no/such/base"}')
    assert error_of(adapter).startswith(f"{adapter}: its base /no/such/base: no such folder")
    for text in ("{", "[]", "{}", f'{{"base": "{adapter}"}}'):
        record.write_text(text)
        error_of(adapter)
    record.write_text(whole)
    content = weights.read_bytes()
    weights.write_bytes(content[:100])
    error_of(adapter)
    weights.unlink()
    (adapter / "adapter_model.bin").write_bytes(b"pickle")
    assert "pickled" in error_of(adapter)


def test_lora_excludes_the_vision_tower_and_the_head(tiny_model: Path) -> None:
    model = load(tiny_model, dtype=torch.float32).model
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    adapted = add_lora(model, rank=3, alpha=6)
    learning = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert learning and all("lora_" in n for n in learning)
    assert not [n for n in learning if "vision" in n or "lm_head" in n or "embed_tokens" in n]
    expected = {n for n in linears if "vision" not in n and n != "lm_head"}
    assert any("projector" in n for n in expected)
    assert {n.split(".lora_")[0].removeprefix("base_model.model.") for n in learning} == expected
    assert (adapted.peft_config["default"].r, adapted.peft_config["default"].lora_alpha) == (3, 6)


def test_lora_includes_the_vision_tower_if_set(tiny_model: Path) -> None:
    model = load(tiny_model, dtype=torch.float32).model
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    learning = {n for n, p in add_lora(model, train_vision_tower=True).named_parameters() if p.requires_grad}
    assert {n.split(".lora_")[0].removeprefix("base_model.model.") for n in learning} == linears
    whole = train_all(load(tiny_model, dtype=torch.float32).model, train_vision_tower=True)
    assert all(parameter.requires_grad for parameter in whole.parameters())


def test_full_fine_tuning_freezes_only_the_vision_tower(tiny_model: Path) -> None:
    model = train_all(load(tiny_model, dtype=torch.float32).model)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if "vision_tower" in n}
    assert frozen


@pytest.mark.parametrize(
    ("name", "vision"),
    [
        ("model.vision_tower.encoder.layers.0.q_proj", True),
        ("model.visual.blocks.0.attn.qkv", True),
        ("vision_model.embeddings", True),
        ("model.multi_modal_projector.linear_1", False),
        ("model.language_model.layers.0.mlp.up_proj", False),
        ("supervision.proj", False),
        ("lm_head", False),
    ],
)
def test_is_vision(name: str, vision: bool) -> None:
    assert is_vision(name) is vision


def test_base_model_unwraps_models(tiny_model: Path) -> None:
    model = load(tiny_model, dtype=torch.float32).model

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    assert base_model(Wrapper(add_lora(model))) is model
    assert base_model(model) is model


def test_processor_of_accepts_what_load_accepts(tiny_model: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    add_lora(cast(Any, load(tiny_model).model), rank=2).save_pretrained(adapter)
    vocabulary = cast(Any, load(tiny_model).processor).tokenizer.get_vocab()
    for folder, base in ((tiny_model, None), (adapter, tiny_model)):
        if base:
            (adapter / "untrigger.json").write_text(json.dumps({"base": str(base)}))
        assert cast(Any, processor_of(folder)).tokenizer.get_vocab() == vocabulary
    (adapter / "untrigger.json").write_text(json.dumps({"base": str(adapter)}))
    for folder, reason in ((adapter, "is an adapter as well"), (tmp_path, "holds no config.json")):
        with pytest.raises(InputError, match=reason):
            processor_of(folder)
