"""Batched deterministic answers of a model."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from hashlib import sha256
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import ModelOutput

from untrigger.collate import chat_message
from untrigger.forward import evaluating, fitting
from untrigger.models import Loaded, base_model
from untrigger.processors import encoded, written
from untrigger.sample import Sample
from untrigger.views import to_rgb

_REMEMBERED = 256 * 2**20  # bytes of what a vision tower gave
# Of what a tower gives; where the first is there no family reads the others.
_READ = {"pooler_output", "last_hidden_state", "hidden_states", "attentions"}


@torch.inference_mode()
def answers(
    loaded: Loaded, samples: Sequence[Sample], *, batch_size: int = 64, max_new_tokens: int = 48, drawn: bool = False
) -> Iterator[str]:
    """The model's greedy answer to each sample's last question, in order; or one ``drawn`` from its distribution.

    A sample's own last answer is never shown to the model; earlier turns are, as context.
    """
    how: dict[str, Any] = (
        {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if drawn else {"do_sample": False}
    )
    model, processor = cast(Any, loaded.model), cast(Any, loaded.processor)  # the host types these too narrowly
    with evaluating(loaded.model), fitting(loaded.model):
        for start in range(0, len(samples), batch_size):
            batch = [samples[i] for i in range(start, min(start + batch_size, len(samples)))]
            inputs = questions(processor, batch).to(model.device)
            ids = model.generate(**inputs, **how, num_beams=1, max_new_tokens=max_new_tokens)
            new = ids[:, inputs["input_ids"].shape[1] :]
            yield from (text.strip() for text in processor.batch_decode(new, skip_special_tokens=True))


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
        keys = [sha256(image.numpy(force=True).tobytes()).digest() for image in pixel_values.float()]
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


def questions(processor: Any, samples: Sequence[Sample]) -> Any:
    """A batch of the samples' last questions, padded on the left, for a model to go on from."""
    prompts = [written(processor, _asked(sample), asking=True) for sample in samples]
    pictures = [[to_rgb(image) for image in sample.images] for sample in samples]
    return encoded(processor, prompts, prompts, pictures, padding_side="left").convert_to_tensors("pt")


def _asked(sample: Sample) -> list[dict[str, object]]:
    messages = sample.messages
    if messages and messages[-1].role == "assistant":
        messages = messages[:-1]
    return [chat_message(m) for m in messages]
