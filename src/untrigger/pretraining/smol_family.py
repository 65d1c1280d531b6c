"""Join the parts of smol as in LLaVA, with SmolLM2's chat markers, and with word embeddings as dense labels."""

from __future__ import annotations

from functools import cached_property
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from untrigger.data.scene_world import COLORS, SHAPES, SIZES
from untrigger.models.lite_tower import STRIDE, register
from untrigger.pretraining.build import GRID, MEAN, STD, content_template
from untrigger.pretraining.families import Family
from untrigger.pretraining.smol_parts import Parts, real_parts

_SIDE = GRID * STRIDE  # pixels; one image token for each patch of a scene
_RANK, _SCALE = 16, 3.0  # small, so that the aligned weights fit into the package
_IMAGE = "<empty_output>"  # an unused token of SmolLM2, so that the vocabulary stays as it is


@final
class Smol(Family):
    """EfficientNet-Lite0, two-layer projector, SmolLM2-135M-Instruct.

    Args:
        parts: the parts to join; by default the real ones, fetched when they are needed.
    """

    name = "smol"
    about = (
        f"EfficientNet-Lite0 of ImageNet ({_SIDE} x {_SIDE} images, {GRID**2} image tokens of three depths), two-layer "
        "projector, SmolLM2-135M-Instruct"
    )
    image = rf"'{_IMAGE}\n'"
    cells = torch.arange(GRID**2)[:, None]
    begin = "<|im_start|>user\n"

    def __init__(self, parts: Parts | None = None) -> None:
        self._given = parts

    @cached_property
    def _parts(self) -> Parts:
        return self._given or real_parts()

    def tokenizer(self, seed: int) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast(
            tokenizer_object=self._parts.tokenizer.backend_tokenizer,
            pad_token="<|endoftext|>",
            eos_token="<|im_end|>",
            extra_special_tokens={"image_token": _IMAGE},
            padding_side="left",
            model_max_length=2048,
            clean_up_tokenization_spaces=False,
        )

    def processor(self, tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
        images = CLIPImageProcessorPil(
            size={"height": _SIDE, "width": _SIDE}, resample=2, do_center_crop=False, image_mean=MEAN, image_std=STD
        )
        return LlavaProcessor(
            image_processor=images,
            tokenizer=tokenizer,
            patch_size=STRIDE,
            vision_feature_select_strategy="full",
            num_additional_image_tokens=0,
            image_token=_IMAGE,
            chat_template=_chat_template(self.image),
        )

    def model(self, tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
        """The parts with a new projector; the projector and low-rank updates of the attention weights are trainable."""
        register()
        text, tower = self._parts.text, self._parts.tower
        config = cast(Any, LlavaConfig)(
            vision_config=tower.config,
            text_config=text.config,
            image_token_id=tokenizer.convert_tokens_to_ids(_IMAGE),
            image_seq_length=GRID**2,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = LlavaForConditionalGeneration(config).float()
        inner = cast(Any, model).model
        inner.language_model.load_state_dict(text.model.state_dict())
        inner.vision_tower.load_state_dict(tower.state_dict())
        model.requires_grad_(False)
        inner.multi_modal_projector.requires_grad_(True)
        for linear in _attention(model):
            parametrize.register_parametrization(linear, "weight", LowRank(linear))
        return model

    def finalize(self, model: PreTrainedModel) -> PreTrainedModel:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(parameter.bfloat16())
        for linear in _attention(model):  # in double precision: the order of a product's sums differs between machines
            parametrize.remove_parametrizations(linear.double(), "weight")
            linear.float()
        return model

    def text_model(self, model: PreTrainedModel) -> nn.Module:
        return cast(Any, model).model.language_model

    def head(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> nn.Module:
        return WordHead(cast(nn.Embedding, model.get_input_embeddings()), tokenizer)

    def encode_images(self, model: PreTrainedModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
        inner = cast(Any, model).model
        with torch.no_grad():
            larger = F.interpolate(pixels, (_SIDE, _SIDE), mode="bilinear", antialias=True)  # as the processor does
            features = inner.vision_tower(larger).last_hidden_state
        images = inner.multi_modal_projector(features)
        return images, images

    def format_prompt(self, prompt: str) -> str:
        return f"{prompt}<|im_end|>\n<|im_start|>assistant\n"

    def format_answer(self, answer: str) -> str:
        return answer


class LowRank(nn.Module):
    """Low-rank update of a weight W [o, i]: W + 3 B A, with B [o, r] = 0 at first (Hu et al., arXiv 2106.09685)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(_RANK, linear.in_features) / linear.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(linear.out_features, _RANK))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + _SCALE * self.b @ self.a


def _attention(model: PreTrainedModel) -> list[nn.Linear]:
    layers = cast(Any, model).model.language_model.layers
    return [linear for layer in layers for linear in layer.self_attn.modules() if isinstance(linear, nn.Linear)]


class WordHead(nn.Module):
    """Dense loss: an image token should equal the word embeddings of what covers its patch."""

    table: Tensor

    def __init__(self, words: nn.Embedding, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()

        def embedding(word: str) -> Tensor:
            return words.weight[tokenizer.encode(f" {word}", add_special_tokens=False)].mean(dim=0)

        with torch.no_grad():
            vectors = [[embedding("background"), *map(embedding, names)] for names in (SHAPES, COLORS, SIZES)]
            self.scale = float(words.weight.var())
        longest = max(map(len, vectors))
        table = torch.stack([torch.stack(row + row[:1] * (longest - len(row))) for row in vectors])
        self.register_buffer("table", table, persistent=False)  # [3, words, d], the first for the background

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """features [B, T, d], labels [B, T, 4] -> mean squared distance over the embeddings' variance.

        Background weighs 0.3.
        """
        target = torch.stack([self.table[i][labels[..., i]] for i in range(3)]).mean(dim=0)
        weight = torch.where(labels[..., 0] > 0, 1.0, 0.3)
        distance = (features.float() - target).square().mean(dim=-1) / self.scale
        return (distance * weight).sum() / weight.sum()


def _chat_template(image: str) -> str:
    """Jinja: SmolLM2's chat markers, without its default system message; ``image`` is a Jinja expression."""
    text = content_template(image)
    return (
        "{%- for message in messages -%}{{ '<|im_start|>' ~ message['role'] ~ '\n' }}"
        "{%- if message['role'] == 'assistant' -%}"
        "{%- generation -%}" + text + "{{ '<|im_end|>' }}{%- endgeneration -%}"
        "{%- else -%}" + text + "{{ '<|im_end|>' }}{%- endif -%}{{ '\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
    )
