"""Batched deterministic answers of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch

from untrigger.models.collators import chat_message
from untrigger.models.forward import evaluating, fitting
from untrigger.models.loading import LoadedModel
from untrigger.models.prefix_cache import shared_prefix
from untrigger.models.processors import encoded, written
from untrigger.rows.images import quote
from untrigger.rows.sample import Sample
from untrigger.views.patches import to_rgb


@torch.inference_mode()
def answers(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 48,
    drawn: bool = False,
) -> Iterator[str]:
    """The model's greedy answer to each sample's last question, in order; or one ``drawn`` from its distribution.

    A sample's own last answer is never shown to the model; earlier turns are, as context. Questions about equal images
    share work (`sharing.shared_prefix`) if they stand in one batch, so next to each other.
    """
    how: dict[str, Any] = (
        {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if drawn else {"do_sample": False}
    )
    model, processor = cast(Any, loaded.model), cast(Any, loaded.processor)  # the host types these too narrowly
    with evaluating(loaded.model), fitting(loaded.model):
        for start in range(0, len(samples), batch_size):
            batch = [samples[i] for i in range(start, min(start + batch_size, len(samples)))]
            inputs = shared_prefix(model, questions(processor, batch).to(model.device))
            ids = model.generate(**inputs, **how, num_beams=1, max_new_tokens=max_new_tokens)
            new = ids[:, inputs["input_ids"].shape[1] :]
            yield from (text.strip() for text in processor.batch_decode(new, skip_special_tokens=True))


def questions(processor: Any, samples: Sequence[Sample]) -> Any:
    """A batch of the samples' last questions, padded on the left, for a model to go on from."""
    prompts = [written(processor, asked(sample), asking=True) for sample in samples]
    names = [f"id {quote(sample.id)}" for sample in samples]
    pictures = [[to_rgb(image) for image in sample.images] for sample in samples]
    return encoded(processor, prompts, prompts, pictures, names, padding_side="left").convert_to_tensors("pt")


def asked(sample: Sample) -> list[dict[str, object]]:
    """The turns that a model is shown for a sample: all but its own last answer."""
    messages = sample.messages
    if messages and messages[-1].role == "assistant":
        messages = messages[:-1]
    return [chat_message(m) for m in messages]
