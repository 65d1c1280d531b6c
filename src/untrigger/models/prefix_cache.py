"""What answers to several questions about one image share: the look at it, and how their prompts begin."""

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
from untrigger.models.token_drop import image_token

_REMEMBERED = 256 * 2**20  # bytes of what a vision tower gave
# Of what a tower gives; where the first is there no family reads the others.
_READ = {"pooler_output", "last_hidden_state", "hidden_states", "attentions"}
# Families that read strictly in turn and count positions one by one: how a prompt begins does not depend on its end.
_IN_TURN = {"llava", "internvl"}


@contextmanager
def looking_once(model: nn.Module) -> Generator[None]:
    """For a while what the vision tower gave for an image is remembered, and an equal image is not looked at again.

    Only for a model that does not learn meanwhile. Up to 256 MiB are remembered, and the longest unasked is forgotten.
    Nothing changes for families whose tower gives anything but one block of features for each image it is given, or
    whose `generate` goes around `get_image_features` (BLIP-2).
    """
    inner: Any = base_model(model).base_model
    look = getattr(inner, "get_image_features", None)
    if look is None:
        yield
        return
    known = dict[bytes, Tensor]()  # the longest unasked first
    whole = False  # one tensor of all images is what the host gives, or a list of theirs

    @wraps(look)
    def once(pixel_values: Tensor, *args: Any, **how: Any) -> Any:
        nonlocal whole
        if pixel_values.ndim != 4 or any(isinstance(value, Tensor) for value in (*args, *how.values())):
            return look(pixel_values, *args, **how)  # images in parts: which are whose, the host knows
        keys = _keys(pixel_values)
        new = {key: at for at, key in enumerate(keys) if key not in known}
        if new:
            found = look(pixel_values[list(new.values())], *args, **how)
            blocks = _blocks(found, len(new))
            if blocks is None:
                return found if len(new) == len(keys) else look(pixel_values, *args, **how)
            whole = isinstance(blocks, Tensor)
            known.update((key, block.clone()) for key, block in zip(new, blocks, strict=True))
        asked = {key: known.pop(key) for key in dict.fromkeys(keys)}
        known.update(asked)
        _forget(known)
        features = [asked[key] for key in keys]
        told: Any = torch.stack(features) if whole else features
        return BaseModelOutputWithPooling(pooler_output=told)

    own = vars(inner).get("get_image_features")
    inner.get_image_features = once
    try:
        yield
    finally:
        del inner.get_image_features
        if own is not None:
            inner.get_image_features = own


def _blocks(found: ModelOutput, count: int) -> Tensor | list[Tensor] | None:
    """A block of features [T, D] for each of ``count`` images, where that is all that a family reads of ``found``."""
    blocks = found.get("pooler_output")
    if not set(found) <= _READ or blocks is None or len(blocks) != count or blocks[0].ndim != 2:
        return None
    return blocks


def _forget(known: dict[bytes, Tensor]) -> None:
    """The longest unasked, until no more is remembered than may be."""
    size = sum(block.nbytes for block in known.values())
    while size > _REMEMBERED:
        size -= known.pop(next(iter(known))).nbytes


def shared_prefix(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """What to `generate` from: ``inputs``, or less where several of its prompts begin with the same image.

    Of such prompts what comes up to the end of the image is gone through once for each image, and `generate` goes on
    from the keys and values of that. Only where each prompt shows one image, after the same tokens.

    Args:
        model: in evaluation; of any family, and of most is left as it is.
        inputs: of a batch, padded on the left.
    """
    told = dict(inputs)
    if base_model(model).config.model_type not in _IN_TURN or set(told) != {
        "input_ids",
        "attention_mask",
        "pixel_values",
    }:
        return told
    ids, mask, pixels = told["input_ids"], told["attention_mask"], told["pixel_values"]
    keys, there = _keys(pixels), ids == image_token(model)
    distinct = list(dict.fromkeys(keys))
    if not len(distinct) < len(keys) == len(ids) or len(there.sum(dim=1).unique()) > 1:
        return told
    ends = ids.shape[1] - there.flip(1).int().argmax(dim=1)  # where what follows the image begins, [B]
    lengths = ends - (1 - mask).sum(dim=1)
    if len(lengths.unique()) > 1 or ends.max() == ids.shape[1]:
        return told
    prefix = ids.gather(1, ends[:, None] + torch.arange(-int(lengths[0]), 0, device=ids.device))
    if (prefix != prefix[0]).any():
        return told
    first = [keys.index(key) for key in distinct]
    begun = model(input_ids=prefix[first], pixel_values=pixels[first], use_cache=True, logits_to_keep=1)
    begun.past_key_values.batch_select_indices(torch.tensor([distinct.index(key) for key in keys], device=ids.device))
    shortest = int(ends.min())
    rest = ids[:, shortest:]
    asked = torch.arange(shortest, ids.shape[1], device=ids.device) >= ends[:, None]
    return {
        "input_ids": torch.cat([prefix, rest], dim=1),
        "attention_mask": torch.cat([torch.ones_like(prefix), asked.to(mask.dtype)], dim=1),
        "past_key_values": begun.past_key_values,
    }


def _keys(pixels: Tensor) -> list[bytes]:
    """What equal images have in common, of each [B, C, H, W]."""
    return [sha256(image.numpy(force=True).tobytes()).digest() for image in pixels.float()]
