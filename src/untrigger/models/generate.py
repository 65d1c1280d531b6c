"""Batched generation: a model's answers to rows, with the same result for any batch size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch

from untrigger.models.collators import chat_message
from untrigger.models.forward import evaluating, explain_token_mismatch
from untrigger.models.loading import LoadedModel
from untrigger.models.prefix_cache import shared_prefix
from untrigger.models.processors import encode, render_chat
from untrigger.rows.images import quote
from untrigger.rows.sample import Sample
from untrigger.views.patches import to_rgb


@torch.inference_mode()
def answers(
    model: LoadedModel,
    rows: Sequence[Sample],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 48,
    do_sample: bool = False,
) -> Iterator[str]:
    """Generate the model's answer to each row's last question, in order.

    A row's own last answer is not part of the prompt; earlier turns are. Prompts with equal images share work if they
    are in one batch, so next to each other (`untrigger.models.prefix_cache.shared_prefix`).

    Args:
        model: generates in evaluation mode; its mode is restored.
        rows: an answer for each, in order.
        batch_size: rows generated together.
        max_new_tokens: length limit of an answer.
        do_sample: sample at temperature 1 from the whole distribution, instead of greedy decoding.
    """
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if do_sample else {"do_sample": False}
    )
    network, processor = cast(Any, model.model), cast(Any, model.processor)  # transformers types these too narrowly
    with evaluating(model.model), explain_token_mismatch(model.model):
        for start in range(0, len(rows), batch_size):
            batch = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
            inputs = shared_prefix(network, encode_prompts(processor, batch).to(network.device))
            ids = network.generate(**inputs, **sampling, num_beams=1, max_new_tokens=max_new_tokens)
            new = ids[:, inputs["input_ids"].shape[1] :]
            yield from (text.strip() for text in processor.batch_decode(new, skip_special_tokens=True))


def encode_prompts(processor: Any, rows: Sequence[Sample]) -> Any:
    """A batch of the rows' prompts, up to the last question, padded on the left for generation."""
    prompts = [render_chat(processor, prompt_messages(row), add_generation_prompt=True) for row in rows]
    names = [f"id {quote(row.id)}" for row in rows]
    images = [[to_rgb(image) for image in row.images] for row in rows]
    return encode(processor, prompts, prompts, images, names, padding_side="left").convert_to_tensors("pt")


def prompt_messages(row: Sample) -> list[dict[str, object]]:
    """A row's turns without its last answer."""
    messages = row.messages
    if messages and messages[-1].role == "assistant":
        messages = messages[:-1]
    return [chat_message(message) for message in messages]
