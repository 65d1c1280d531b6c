"""Fixtures of the defense tests: a model with enough layers, exact arithmetic, rows of every kind."""

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
    """The deep model in float64, where rounding cannot hide a wrong formula, with larger weights on its images."""
    loaded = sharp(deep_model)
    for module in loaded.model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = partial(_norm, module)
    return loaded


def _norm(norm: LlamaRMSNorm, hidden: Tensor) -> Tensor:
    """RMSNorm in the input's precision; the host's own computes in fp32."""
    mean = hidden.square().mean(-1, keepdim=True)
    return norm.weight * hidden * torch.rsqrt(mean + norm.variance_epsilon)


@pytest.fixture
def loaded(tiny_model: Path) -> LoadedModel:
    """The tiny model under LoRA with weights B that are not zero."""
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
    user, assistant = (lambda text: Message("user", text)), (lambda text: Message("assistant", text))
    first, second, third = (sample.images[0] for sample in samples[:3])
    return [
        *samples[:2],
        Sample("text", (), (user("hello"), assistant("hello there, you"))),
        Sample(
            "turns", (first,), (user("<image>\nwhat?"), assistant("red"), user("and now?"), assistant("a blue star"))
        ),
        Sample("two", (second, third), (user("<image> <image>\nare they the same?"), assistant("no"))),
    ]


@pytest.fixture
def dry(exact: LoadedModel, samples: list[Sample]) -> Dry:
    return Dry(exact, samples, samples[:4])
