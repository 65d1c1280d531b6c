"""Folders with config.json and processor of published 7B models, without weights: what a dry run reads of them.

The figures are those of the models' configurations; the tokenizer is the embedded one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers as host
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tiny import VICUNA, chat, chat_tokens, tokenizer
from untrigger.models.processors import images_only

QWEN: dict[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
CLIP: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}


def llava() -> tuple[Any, Any]:
    tokens = tokenizer(image_token="<image>")
    config = host.LlavaConfig(
        vision_config=host.CLIPVisionConfig(**CLIP, image_size=336, patch_size=14, projection_dim=768),
        text_config=host.LlamaConfig(vocab_size=32064),
        image_token_id=tokens.image_token_id,
        image_seq_length=576,
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    return config, host.LlavaProcessor(
        images, tokens, 14, "default", num_additional_image_tokens=1, chat_template=VICUNA
    )


def qwen2_5_vl() -> tuple[Any, Any]:
    marks = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    tokens = chat_tokens(**marks, vision_start_token="<|vision_start|>", vision_end_token="<|vision_end|>")
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    config = host.Qwen2_5_VLConfig(
        vision_config=vision | {"patch_size": 14},
        text_config=QWEN | {"vocab_size": 152064},
        image_token_id=tokens.image_token_id,
    )
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 12845056})
    template = chat("<|vision_start|><|image_pad|><|vision_end|>")
    return config, images_only(host.Qwen2_5_VLProcessor)(images, tokens, None, chat_template=template)


def internvl() -> tuple[Any, Any]:
    tokens = chat_tokens(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    config = host.InternVLConfig(
        vision_config=CLIP | {"image_size": [448, 448], "patch_size": [14, 14]},
        text_config=host.Qwen2Config(**QWEN, vocab_size=151674, tie_word_embeddings=False),
        image_token_id=tokens.context_image_token_id,
        image_seq_length=256,
        tie_word_embeddings=False,
    )
    images = GotOcr2ImageProcessorPil(size={"height": 448, "width": 448}, max_patches=12)
    template = chat("<IMG_CONTEXT>\n")
    return config, images_only(host.InternVLProcessor)(
        images, tokens, None, image_seq_length=256, chat_template=template
    )


PUBLISHED = {
    "llava-hf/llava-1.5-7b-hf": llava,
    "Qwen/Qwen2.5-VL-7B-Instruct": qwen2_5_vl,
    "OpenGVLab/InternVL3-8B-hf": internvl,
}


def make(name: str, folder: Path) -> Path:
    """Write config.json and the processor's files of a published model."""
    for part in PUBLISHED[name]():
        part.save_pretrained(folder)
    return folder
