"""Reuse work between prompts about the same image: its vision features, and the keys and values of a shared prefix."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import wraps
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import ModelOutput

from untrigger.models.loading import base_model
from untrigger.models.token_drop import image_token_id

_CACHE_BYTES = 256 * 2**20  # of vision features
# Outputs of a vision tower; where the first exists, no family reads the others.
_TOWER_OUTPUTS = {"pooler_output", "last_hidden_state", "hidden_states", "attentions"}
# Families with strictly causal attention and consecutive positions: a prefix does not depend on what follows it.
_CAUSAL = {"llava", "internvl"}


@contextmanager
def cache_image_features(model: nn.Module) -> Generator[None]:
    """Cache the vision tower's features within the block, so that equal images pass through it once.

    Only for a model that is not trained meanwhile. The cache holds up to 256 MiB and evicts the least recently used
    image. It does nothing for families whose tower returns anything but one block of features for each image, or whose
    `generate` does not call `get_image_features` (BLIP-2).
    """
    inner: Any = base_model(model).base_model
    compute = getattr(inner, "get_image_features", None)
    if compute is None:
        yield
        return
    cache = dict[bytes, Tensor]()  # least recently used first
    is_stacked = False  # the host returns one tensor of all images; or else a list of theirs

    @wraps(compute)
    def cached(pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal is_stacked
        if pixel_values.ndim != 4 or any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
            return compute(pixel_values, *args, **kwargs)  # images in tiles: only the host knows which are whose
        keys = _keys(pixel_values)
        new = {key: at for at, key in enumerate(keys) if key not in cache}
        if new:
            output = compute(pixel_values[list(new.values())], *args, **kwargs)
            blocks = _blocks(output, len(new))
            if blocks is None:
                return output if len(new) == len(keys) else compute(pixel_values, *args, **kwargs)
            is_stacked = isinstance(blocks, Tensor)
            cache.update((key, block.clone()) for key, block in zip(new, blocks, strict=True))
        used = {key: cache.pop(key) for key in dict.fromkeys(keys)}
        cache.update(used)  # moved to the end
        _evict(cache)
        features = [used[key] for key in keys]
        pooled: Any = torch.stack(features) if is_stacked else features
        return BaseModelOutputWithPooling(pooler_output=pooled)

    own = vars(inner).get("get_image_features")
    inner.get_image_features = cached
    try:
        yield
    finally:
        del inner.get_image_features
        if own is not None:
            inner.get_image_features = own


def _blocks(output: ModelOutput, count: int) -> Tensor | list[Tensor] | None:
    """A block of features [T, D] for each of ``count`` images; None if a family reads more of ``output`` than that."""
    blocks = output.get("pooler_output")
    if not set(output) <= _TOWER_OUTPUTS or blocks is None or len(blocks) != count or blocks[0].ndim != 2:
        return None
    return blocks


def _evict(cache: dict[bytes, Tensor]) -> None:
    """Remove the least recently used features until the cache fits its limit."""
    size = sum(block.nbytes for block in cache.values())
    while size > _CACHE_BYTES:
        size -= cache.pop(next(iter(cache))).nbytes


def shared_prefix(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Inputs for `generate` that reuse the prefix of prompts which begin with the same image.

    The prefix runs up to the end of the image. It passes through the model once for each distinct image, and
    `generate` continues from its keys and values. This needs one image in each prompt, after the same tokens; other
    batches are returned unchanged.

    Args:
        model: in evaluation mode. Families other than LLaVA and InternVL are left unchanged.
        inputs: a batch of prompts, padded on the left.
    """
    unchanged = dict(inputs)
    names = {"input_ids", "attention_mask", "pixel_values"}
    if base_model(model).config.model_type not in _CAUSAL or set(unchanged) != names:
        return unchanged
    ids, mask, pixels = unchanged["input_ids"], unchanged["attention_mask"], unchanged["pixel_values"]
    keys, is_image = _keys(pixels), ids == image_token_id(model)
    distinct = list(dict.fromkeys(keys))
    if not len(distinct) < len(keys) == len(ids) or len(is_image.sum(dim=1).unique()) > 1:
        return unchanged
    ends = ids.shape[1] - is_image.flip(1).int().argmax(dim=1)  # first position after the image, [B]
    lengths = ends - (1 - mask).sum(dim=1)
    if len(lengths.unique()) > 1 or ends.max() == ids.shape[1]:
        return unchanged
    prefix = ids.gather(1, ends[:, None] + torch.arange(-int(lengths[0]), 0, device=ids.device))
    if (prefix != prefix[0]).any():
        return unchanged
    first = [keys.index(key) for key in distinct]
    output = model(input_ids=prefix[first], pixel_values=pixels[first], use_cache=True, logits_to_keep=1)
    output.past_key_values.batch_select_indices(torch.tensor([distinct.index(key) for key in keys], device=ids.device))
    shortest = int(ends.min())
    rest = ids[:, shortest:]
    is_rest = torch.arange(shortest, ids.shape[1], device=ids.device) >= ends[:, None]
    return {
        "input_ids": torch.cat([prefix, rest], dim=1),
        "attention_mask": torch.cat([torch.ones_like(prefix), is_rest.to(mask.dtype)], dim=1),
        "past_key_values": output.past_key_values,
    }


def _keys(pixels: Tensor) -> list[bytes]:
    """A digest of each image of [B, C, H, W]; equal images have equal ones."""
    return [sha256(image.numpy(force=True).tobytes()).digest() for image in pixels.float()]
