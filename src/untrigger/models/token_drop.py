"""A view that is shorter: image tokens that the language model is not shown.

Dropped behind the vision tower, so that any family with image tokens among its text tokens can do it, and both views
share one pass through the tower. What is left stays at its positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from untrigger.errors import InputError
from untrigger.models.loading import base_model

_SHORTENED = ("inputs_embeds", "attention_mask", "position_ids", "visual_pos_masks")
# Qwen3-VL adds to its images' tokens, visual_pos_masks, in deeper layers; LLaVA-OneVision hands logits_to_keep on to
# where it means nothing.
_KNOWN = (*_SHORTENED, "cache_position", "input_ids", "logits_to_keep")


def image_token(model: nn.Module) -> int:
    """The id of the tokens that stand for parts of an image.

    Raises:
        InputError: the family has none.
    """
    config: Any = base_model(model).config
    for name in ("image_token_id", "image_token_index"):
        if (found := getattr(config, name, None)) is not None:
            return int(found)
    raise InputError(f"{type(base_model(model)).__name__}: has no tokens that stand for its images")


def shown(ids: Tensor, order: Tensor, image: int, ratio: float) -> Tensor:
    """Which positions a view shows, [B, T]: all but the last in ``order`` of each row's image tokens.

    Args:
        ids: tokens, [B, T]; those that are ``image`` stand for a part of one.
        order: a number for each position, [B, T].
        ratio: share of a row's image tokens that is left out, in [0, 1], to the nearest token.
    """
    there = ids == image
    kept = there.sum(dim=1) - (ratio * there.sum(dim=1)).round().long()
    rank = order.masked_fill(~there, torch.inf).argsort(dim=1).argsort(dim=1)
    return ~there | (rank < kept.unsqueeze(1))


@contextmanager
def showing(model: nn.Module, decoder: nn.Module, positions: Tensor) -> Generator[Tensor]:
    """For a while the language model sees ``positions`` [B, T] alone; gives where each of them went, [B, T'] of T.

    Rows that show fewer end in padding. Left-out positions leave a gap: what is shown keeps its place.

    Raises:
        InputError: the family has its language model look at its images in a way of its own.
    """
    width = int(positions.sum(dim=1).max())
    index = (~positions).long().argsort(dim=1, stable=True)[:, :width]
    real = positions.gather(1, index)

    def shorten(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        embeds, mask, places, deep = (kwargs.get(name) for name in _SHORTENED)
        unknown = [name for name, value in kwargs.items() if name not in _KNOWN and isinstance(value, Tensor)]
        masks: list[Any] = list(mask.values()) if isinstance(mask, dict) else [mask]  # one for each kind of layer
        if embeds is None or unknown or not all(m is None or isinstance(m, Tensor) for m in masks):
            raise InputError(
                f"{type(base_model(model)).__name__}: its image tokens cannot be dropped; choose another view"
            )
        if places is None:
            places = index
        else:
            places = places.expand(*places.shape[:-2], len(index), -1)
            places = places.gather(-1, index.expand(*places.shape[:-1], -1))
        if isinstance(mask, dict):
            mask = {name: None if one is None else _shorter(one, index, real) for name, one in mask.items()}
        else:
            mask = real.long() if mask is None else _shorter(mask, index, real)
        embeds = embeds.gather(1, index.unsqueeze(-1).expand(-1, -1, embeds.shape[-1]))
        shorter = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": places}
        if deep is not None:
            layers: list[Tensor] = kwargs["deepstack_visual_embeds"]
            shorter["visual_pos_masks"] = deep.gather(1, index) & real
            shorter["deepstack_visual_embeds"] = [layer[positions[deep]] for layer in layers]
        return args, kwargs | shorter

    handle = decoder.register_forward_pre_hook(shorten, with_kwargs=True)
    try:
        yield index
    finally:
        handle.remove()


def _shorter(mask: Tensor, index: Tensor, real: Tensor) -> Tensor:
    """What may be looked at, of the tokens of ``index`` [B, T'] that are ``real``.

    ``mask`` is [B, T], of tokens, or [B or 1, H, T, T], of pairs: true where the second may be looked at, or a number
    that is added to the attention. What is not real looks at all that it did: it must look at something.
    """
    if mask.ndim == 2:
        return mask.gather(1, index) * real
    pairs = mask.expand(len(index), -1, -1, -1)
    pairs = pairs.gather(2, index[:, None, :, None].expand(-1, pairs.shape[1], -1, pairs.shape[3]))
    pairs = pairs.gather(3, index[:, None, None].expand(-1, pairs.shape[1], pairs.shape[2], -1))
    hidden = real[:, None, :, None] & ~real[:, None, None]
    return pairs & ~hidden if pairs.dtype == torch.bool else pairs.masked_fill(hidden, torch.finfo(pairs.dtype).min)


def looked_at(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with what the vision tower gives in the place of pixels, where the family takes that.

    A second pass over the same images then need not look at them again. A model whose weights may be
    elsewhere (DDP, FSDP) looks twice.
    """
    inner: Any = base_model(model)
    takes = "mm_encoder_outputs" in inspect.signature(inner.forward).parameters
    elsewhere = hasattr(model, "module") or any(isinstance(weights, DTensor) for weights in inner.parameters())
    if not takes or elsewhere or "pixel_values" not in inputs:
        return inputs
    told = inspect.signature(inner.get_image_features).parameters
    images = {name: value for name, value in inputs.items() if name in told}
    features = inner.get_image_features(**images, return_dict=True)
    return inputs | {"pixel_values": None, "mm_encoder_outputs": {"image": features}}
