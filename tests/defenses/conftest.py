"""What tests of the baselines share: a model with enough layers, exact arithmetic, rows of every kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import set_seed
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dry import Dry
from untrigger.models.loading import LoadedModel, add_lora, load
from untrigger.rows.sample import Message, Sample


@pytest.fixture(scope="session")
def deep_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny LLaVA with four layers of language model."""
    from transformers import LlavaForConditionalGeneration

    loaded = load(tiny_model)
    config = loaded.model.config
    config.text_config.num_hidden_layers = 4
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "deep"
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    return folder


@pytest.fixture
def exact(deep_model: Path, sharp: Callable[..., LoadedModel]) -> LoadedModel:
    """It in float64, where a wrong formula cannot hide behind rounding, and looking hard at its images."""
    loaded = sharp(deep_model)
    for module in loaded.model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = partial(_norm, module)
    return loaded


def _norm(norm: LlamaRMSNorm, hidden: Tensor) -> Tensor:
    """The host's own goes through fp32, whatever the model is in."""
    mean = hidden.square().mean(-1, keepdim=True)
    return norm.weight * hidden * torch.rsqrt(mean + norm.variance_epsilon)


@pytest.fixture
def loaded(tiny_model: Path) -> LoadedModel:
    """Under LoRA that has learned something: B is not zero."""
    set_seed(0)
    plain = load(tiny_model, dtype=torch.float32)
    model = add_lora(plain.model, rank=2)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return replace(plain, model=model)


@pytest.fixture(scope="session")
def mixed(samples: list[Sample]) -> list[Sample]:
    """Rows with one image, none and two, and of one and two turns."""
    ask, tell = (lambda text: Message("user", text)), (lambda text: Message("assistant", text))
    first, second, third = (sample.images[0] for sample in samples[:3])
    return [
        *samples[:2],
        Sample("text", (), (ask("hello"), tell("hello there, you"))),
        Sample("turns", (first,), (ask("<image>\nwhat?"), tell("red"), ask("and now?"), tell("a blue star"))),
        Sample("two", (second, third), (ask("<image> <image>\nare they the same?"), tell("no"))),
    ]


@pytest.fixture
def dry(exact: LoadedModel, samples: list[Sample]) -> Dry:
    return Dry(exact, samples[:4])
