"""Models of a run's stages: the base to fine-tune, and a finished stage read from its folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PreTrainedModel

from untrigger.errors import InputError
from untrigger.models.loading import LoadedModel, load
from untrigger.models.quantized import quantized_loading
from untrigger.training.checkpoints import load_full
from untrigger.training.tuning import Tuning


def load_base(name: str, tuning: Tuning, precision: torch.dtype, device: torch.device) -> LoadedModel:
    """A model to fine-tune, before it is adapted.

    Args:
        precision: of the training; below float32 the model keeps the precision that it is stored in.
        device: of a quantized base. Others stay on the CPU.

    Raises:
        InputError: it is an adapter, or lacks a layer that is to be trained; and as `untrigger.models.loading.load`.
    """
    loading = quantized_loading(tuning.bits, precision, device) if tuning.bits else {}
    loaded = load(name, dtype=torch.float32 if precision == torch.float32 else "auto", **loading)
    if not isinstance(loaded.model, PreTrainedModel):
        raise InputError(f"{name}: is an adapter; merge it (untrigger merge), or give its base model")
    tuning.check(loaded.model)  # here too, for a defense that scores rows before it trains
    return loaded


def load_stage(base: LoadedModel, tuning: Tuning, folder: Path) -> LoadedModel:
    """The model of a finished stage, from its folder; ``base`` is what `load_base` returned, and is changed."""
    adapted = tuning.adapt(cast(PreTrainedModel, base.model))
    read_weights(adapted, folder)
    return replace(base, model=adapted)


def read_weights(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    else:
        load_full(model, str(folder))
