"""A shorter view: some image tokens are dropped before the language model.

They are dropped behind the vision tower, so that any family with image tokens among its text tokens can do it, and
both views share one pass through the tower. The remaining tokens keep their positions.
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
# Qwen3-VL adds features to its image tokens (visual_pos_masks) in deeper layers. LLaVA-OneVision passes logits_to_keep
# on to the language model, where it has no effect.
_KNOWN = (*_SHORTENED, "cache_position", "input_ids", "logits_to_keep")


def image_token_id(model: nn.Module) -> int:
    """The id of the tokens that stand for parts of an image.

    Raises:
        InputError: the family has none.
    """
    config: Any = base_model(model).config
    for name in ("image_token_id", "image_token_index"):
        if (token := getattr(config, name, None)) is not None:
            return int(token)
    raise InputError(f"{type(base_model(model)).__name__}: its config has no image_token_id; use another family")


def positions_after_drop(ids: Tensor, order: Tensor, image_id: int, ratio: float) -> Tensor:
    """Mask [B, T] of the positions that remain: all but the last in ``order`` of each row's image tokens.

    Args:
        ids: token ids, [B, T]; ``image_id`` marks those that stand for a part of an image.
        order: a sort key for each position, [B, T].
        ratio: share of a row's image tokens to drop, in [0, 1], rounded to the nearest token.
    """
    is_image = ids == image_id
    remaining = is_image.sum(dim=1) - (ratio * is_image.sum(dim=1)).round().long()
    rank = order.masked_fill(~is_image, torch.inf).argsort(dim=1).argsort(dim=1)
    return ~is_image | (rank < remaining.unsqueeze(1))


@contextmanager
def keep_positions(model: nn.Module, decoder: nn.Module, positions: Tensor) -> Generator[Tensor]:
    """Within the block the language model gets only the ``positions`` [B, T]; yields their index into T, [B, T'].

    Rows with fewer positions than T' end in padding. The remaining tokens keep their position ids, with gaps.

    Raises:
        InputError: the family passes its images to the language model in a way that cannot be shortened.
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
            mask = {name: None if one is None else _shorten_mask(one, index, real) for name, one in mask.items()}
        else:
            mask = real.long() if mask is None else _shorten_mask(mask, index, real)
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


def _shorten_mask(mask: Tensor, index: Tensor, real: Tensor) -> Tensor:
    """The attention mask for the tokens of ``index`` [B, T'], of which those that are not ``real`` are padding.

    ``mask`` is [B, T], of tokens, or [B or 1, H, T, T], of (query, key) pairs: true where attention is allowed, or a
    number that is added to the attention scores. A padding query keeps the keys that it had, because
    every query must attend to something.
    """
    if mask.ndim == 2:
        return mask.gather(1, index) * real
    pairs = mask.expand(len(index), -1, -1, -1)
    pairs = pairs.gather(2, index[:, None, :, None].expand(-1, pairs.shape[1], -1, pairs.shape[3]))
    pairs = pairs.gather(3, index[:, None, None].expand(-1, pairs.shape[1], pairs.shape[2], -1))
    hidden = real[:, None, :, None] & ~real[:, None, None]
    return pairs & ~hidden if pairs.dtype == torch.bool else pairs.masked_fill(hidden, torch.finfo(pairs.dtype).min)


def with_image_features(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with the vision tower's features in the place of pixels, where the family accepts them.

    A second pass over the same images then skips the vision tower. The inputs stay as they are for a model whose
    weights may be sharded or wrapped (DDP, FSDP): it runs the tower in both passes.
    """
    inner: Any = base_model(model)
    accepts_features = "mm_encoder_outputs" in inspect.signature(inner.forward).parameters
    is_distributed = hasattr(model, "module") or any(isinstance(weights, DTensor) for weights in inner.parameters())
    if not accepts_features or is_distributed or "pixel_values" not in inputs:
        return inputs
    parameters = inspect.signature(inner.get_image_features).parameters
    images = {name: value for name, value in inputs.items() if name in parameters}
    features = inner.get_image_features(**images, return_dict=True)
    return inputs | {"pixel_values": None, "mm_encoder_outputs": {"image": features}}
