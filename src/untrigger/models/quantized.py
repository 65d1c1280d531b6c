"""Models whose weights bitsandbytes holds in 4 or 8 bits (QLoRA): how they are loaded, and how they stay trainable."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from untrigger.errors import InputError


def require_bitsandbytes() -> None:
    """Raise an InputError if bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise InputError("load_in_4bit, load_in_8bit: bitsandbytes is missing; pip install 'untrigger[quantized]'")


def quantized_loading(bits: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` that hold linear layers in 4 or 8 bits on ``device``, as QLoRA does.

    dtype: of the computations, in which 4-bit weights are unpacked.
    """
    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": str(device)}}


def is_quantized(model: Any) -> bool:
    """Whether a transformers model was loaded with quantized weights; it moves to no other device or dtype."""
    return getattr(model, "quantization_method", None) is not None


def keep_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew in evaluation.

    On CPUs with AVX512-BF16 it does so at the first evaluation, and then cannot train on them.
    """
    for part in model.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):
            cast(Any, part).support_avx512bf16_for_cpu = False
