"""Parts that the embedded families share: sizes, tokenizer, chat template, configuration of the language model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from untrigger.data import scene_text
from untrigger.data.scene_world import SIDE, make_scene

PATCH = 8
VOCABULARY = 1024
WIDTH = 192
GRID = SIDE // PATCH
LAYERS = 4
HEADS = 6
MEAN = STD = (0.5, 0.5, 0.5)  # of every family's image processor: pixels in -1 to 1


def content_template(image: str) -> str:
    """Jinja: the content of a message, its parts in order; ``image`` is a Jinja expression."""
    return (
        "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
        "{%- for part in message['content'] -%}"
        "{%- if part['type'] == 'image' -%}{{ " + image + " }}{%- else -%}{{ part['text'] }}{%- endif -%}"
        "{%- endfor -%}{%- endif -%}"
    )


def chat_template(image: str) -> str:
    """Jinja: ``USER: {image}question ASSISTANT: answer``; ``image`` is a Jinja expression."""
    text = content_template(image)
    return (
        "{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}"
        "{{ 'ASSISTANT:' }}{%- generation -%}{{ ' ' }}" + text + "{{ eos_token }}{%- endgeneration -%}"
        "{%- else -%}{{ (message['role'] | upper) ~ ': ' }}" + text + "{{ ' ' }}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
    )


def _corpus(seed: int, scenes: int = 20_000) -> Iterator[str]:
    for index in range(scenes):
        rng = np.random.default_rng((seed, index, 3))
        for turn in scene_text.turns(make_scene(seed, index), rng, 4):
            yield f"USER: \n{turn.prompt} ASSISTANT: {turn.answer}"
        yield " " + scene_text.repeat(rng).answer


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: it encodes any text, and each word of the scenes as one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(seed), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def text_settings(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Configuration of the language model: four layers, 192 wide, in every family."""
    special = {k: getattr(tokenizer, k) for k in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return special | {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 512,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    }
