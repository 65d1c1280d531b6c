"""Estimate the GPU time and memory of cells whose model is no bundled one, from counted operations.

A model is counted from its config.json and its processor, without weights: its layers are made on PyTorch's ``meta``
device, and the processor is given one image of 640 x 480 pixels. A plan may state the same figures (``sizes``), for
models whose hub is out of reach.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, cast, final
from urllib.parse import urlparse

from untrigger.bench.store import Cell
from untrigger.errors import InputError

# Operations per second that are reached: 40 % of the peak of an H100 in bf16, and of its 67 TFLOP/s in fp32.
RATES: Final = {"bf16": 400e12, "fp32": 27e12}
RATES_TEXT: Final = "400 TFLOP/s in bf16 and 27 in fp32, 40 % of the peak of an H100"
IMAGE: Final = (640, 480)  # width and height in pixels of the image that is counted
ANSWERS_PER_TEST_ROW: Final = 4  # clean, triggered, near misses
TEXT_TOKENS = 40  # of a row: template, question and answer
_ANSWER_TOKENS = 20  # generated for each question
_GENERATED = 48  # tokens that an answer may have, and rows generated together (`models.generate`)
_BATCH = 64
_STORED = 34  # bytes that a bf16 layer stores of each token and unit of width for the backward pass, without attention
_REACHABLE_SECONDS = 3.0


@final
@dataclass(frozen=True)
class Size:
    """What the cost of a model follows from. Parameters are in billions.

    Attributes:
        language: parameters of language model and projector, without the vocabulary.
        vocabulary: parameters of the embedding and the head.
        vision: parameters of the vision tower.
        layers, width: of the language model. ``kv_width``: of its keys, as wide as its values.
        linear: widths in and out of all linear layers that LoRA can reach, summed, in millions.
        image_tokens, patches: that an image of 640 x 480 pixels becomes in the language model and in the tower.
    """

    language: float
    vocabulary: float
    vision: float
    layers: int
    width: int
    kv_width: int
    linear: float
    image_tokens: int
    patches: int

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise InputError(f"{f.name} is {value!r}; give a number that is not negative")

    @property
    def tokens(self) -> int:
        """Of a row, in the language model."""
        return self.image_tokens + TEXT_TOKENS


def stated_size(name: str, entry: Any) -> Size:
    """The size that a plan states for a model.

    Raises:
        InputError: a figure is missing, unknown or no number.
    """
    names = [f.name for f in fields(Size)]
    if not isinstance(entry, dict) or set(cast("dict[Any, Any]", entry)) != set(names):
        raise InputError(f"sizes: {name}: give {', '.join(names)}")
    try:
        return Size(**entry)
    except InputError as error:
        raise InputError(f"sizes: {name}: {error}") from error


def counted_size(name: str) -> Size:
    """Count a model from its config.json and processor; weights are neither read nor fetched.

    Args:
        name: a local folder or a hub id.

    Raises:
        InputError: they cannot be read; within seconds if the hub is out of reach.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from untrigger.models.loading import is_vision, register_lite_tower
    from untrigger.models.processors import load_processor

    source = _at_hand(name)
    register_lite_tower(source)
    try:
        config: Any = AutoConfig.from_pretrained(source, trust_remote_code=False)
        processor = load_processor(source)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        image_tokens, patches = _image_size(processor, config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        raise InputError(f"{name}: cannot be counted ({_line(error)})") from error
    text = config.get_text_config()
    ends = {id(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part}
    groups = {"language": 0, "vocabulary": 0, "vision": 0}
    for label, parameter in model.named_parameters():
        group = "vocabulary" if id(parameter) in ends else "vision" if is_vision(label) else "language"
        groups[group] += parameter.numel()
    linear = sum(
        part.in_features + part.out_features
        for label, part in model.named_modules()
        if isinstance(part, torch.nn.Linear) and not is_vision(label) and id(part.weight) not in ends
    )
    heads = text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Size(
        **{group: count / 1e9 for group, count in groups.items()},
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        kv_width=(getattr(text, "num_key_value_heads", None) or heads) * head_width,
        linear=linear / 1e6,
        image_tokens=image_tokens,
        patches=patches,
    )


def flops(cell: Cell, size: Size, *, trained: bool = True) -> float:
    """Operations of plain training with LoRA, unless it is not ``trained`` here, and of the answers of a cell.

    Two a parameter and token in a forward pass, and as many in a backward pass through frozen weights; four where they
    are trained; one more forward pass with gradient checkpointing, where the host also sends gradients through a frozen
    tower; 4 x tokens x tokens x width for attention in a layer. Attention inside the vision tower is left out.
    """
    tuning, language, vision = cell.tuning, 1e9 * size.language, 1e9 * size.vision
    forward = 2 * language * size.tokens + 4 * size.layers * size.width * size.tokens**2
    tower = 2 * vision * size.patches
    checkpointing = _checkpoints(cell)
    passes = 1 + (2 if tuning.get("full_finetune") else 1) + checkpointing
    row = passes * forward + (passes if checkpointing or tuning.get("train_vision_tower") else 1) * tower
    answer = forward + tower + 2 * (language + 1e9 * size.vocabulary) * _ANSWER_TOKENS
    questions = cell.test_rows * ANSWERS_PER_TEST_ROW
    return trained * cell.train_rows * cell.epochs * row + questions * answer


def memory(cell: Cell, size: Size) -> float:
    """Bytes that a cell needs at once: the larger of training and of generating answers.

    Weights; of LoRA the weights, gradients and Adam's moments in fp32; what the layers store for the backward pass,
    twice for a defense that compares each row with a view; keys and values of the answers that are generated together.
    """
    from untrigger.bench.run_cell import defense_of
    from untrigger.defenses import PairedDefense

    defense, tuning = defense_of(cell)
    number = 4 if cell.precision == "fp32" else 2
    frozen = {4: 0.55, 8: 1.05}.get(tuning.bits, number)
    all_weights = 1e9 * (size.language + size.vision)
    weights = all_weights * frozen + 1e9 * size.vocabulary * number
    trained = 3 * number * all_weights if tuning.full_finetune else 16e6 * tuning.rank * size.linear
    passes = 2 if isinstance(defense, PairedDefense) else 1
    layer = _STORED / 2 * number * size.width
    stored = size.layers * layer
    if _checkpoints(cell):
        stored = size.layers * number * size.width + layer
    training = weights + trained + passes * cell.batch_size * size.tokens * stored
    cached = 2 * size.layers * size.kv_width * number * (size.tokens + _GENERATED)
    return max(training, weights + _BATCH * (cached + layer * size.tokens))


def _checkpoints(cell: Cell) -> bool:
    """Whether layers are computed again in the backward pass; transformers has renamed the setting."""
    return any(cell.arguments.get(f"{kind}_checkpointing") for kind in ("gradient", "activation"))


def _at_hand(name: str) -> str:
    """The folder of a model, or its snapshot in the hub's cache; the id where the hub can be reached.

    Raises:
        InputError: the hub is out of reach.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    if Path(name).is_dir():
        return name
    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return str(Path(cached).parent)
    if not any(os.environ.get(key) for key in ("https_proxy", "HTTPS_PROXY")):
        address = urlparse(constants.ENDPOINT)
        try:
            port = address.port or 443
            socket.create_connection((str(address.hostname), port), timeout=_REACHABLE_SECONDS).close()
        except OSError as error:
            raise InputError(f"{name}: cannot be counted (no folder, not in the hub's cache; hub: {error})") from None
    return name


def _image_size(processor: Any, config: Any) -> tuple[int, int]:
    """The tokens that an image adds to a prompt, and its patches in the vision tower; 0 for a tower without patches."""
    from PIL import Image

    from untrigger.models.generate import encode_prompts
    from untrigger.rows.sample import IMAGE_TAG, Message, Sample

    question = "Describe the image."
    with_image = Sample("", (Image.new("RGB", IMAGE),), (Message("user", f"{IMAGE_TAG}\n{question}"),))
    inputs, text = (
        encode_prompts(processor, [row]) for row in (with_image, Sample("", (), (Message("user", question),)))
    )
    pixels = inputs["pixel_values"]
    tower = config.vision_config
    side = getattr(tower, "patch_size", 0)
    side = side[0] if isinstance(side, list | tuple) else side
    # Qwen's are patches already: a line each
    patches = pixels.shape[0] if pixels.ndim == 2 else pixels.numel() // (3 * side**2) if side else 0
    return inputs["input_ids"].shape[1] - text["input_ids"].shape[1], patches


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
