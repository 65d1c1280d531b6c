"""The embedded families: how each model and processor are built, and how pretraining encodes images and text.

Three ways to join a vision tower to a language model: a projector over the patches (LLaVA), a Q-Former whose
queries read the patches (BLIP-2), and a tower of rotary positions whose patches are merged two by two (Qwen2.5-VL).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, cast, final

import torch
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from untrigger.data.scene_world import SIDE
from untrigger.models.processors import images_only
from untrigger.pretraining.build import (
    GRID,
    HEADS,
    LAYERS,
    MEAN,
    PATCH,
    STD,
    WIDTH,
    chat_template,
    make_tokenizer,
    text_settings,
)
from untrigger.pretraining.dense import DenseHead

_SQUARE = {"height": SIDE, "width": SIDE}


class Family(ABC):
    """One embedded model family; ``T`` is its number of image tokens."""

    name: ClassVar[str]
    about: ClassVar[str]  # for the model card: the parts and their sizes
    image: ClassVar[str]  # an image in the chat template, a Jinja expression
    extra_tokens: ClassVar[tuple[str, ...]] = ()
    cells: ClassVar[Tensor]  # [T, c]: the patches, in row-major order, that each image token stands for
    begin: ClassVar[str] = "USER: "  # the text of a conversation before its image

    def tokenizer(self, seed: int) -> PreTrainedTokenizerFast:
        return make_tokenizer(seed)

    @abstractmethod
    def processor(self, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin: ...

    @abstractmethod
    def model(self, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
        """An untrained model."""

    def finalize(self, model: PreTrainedModel) -> PreTrainedModel:
        """Turn a trained model into the one that is published."""
        return model

    def head(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> nn.Module:
        """The head that computes the dense loss from the features of `encode_images`."""
        return DenseHead(WIDTH, self.cells)

    @abstractmethod
    def text_model(self, model: PreTrainedModel) -> nn.Module:
        """The decoder without the vocabulary head."""

    @abstractmethod
    def encode_images(self, model: PreTrainedModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [B, 3, S, S] in -1 to 1 -> features [B, T, d] for the dense loss, and embeddings [B, T, D]."""

    def prefix(self, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[list[int]]]:
        """Token ids of a conversation up to the question, and their positions on each rotary axis."""
        image = cast(int, tokenizer.convert_tokens_to_ids(cast(Any, tokenizer).image_token))
        ids = [*_ids(tokenizer, self.begin), *[image] * len(self.cells), *_ids(tokenizer, "\n")]
        return ids, [list(range(len(ids)))]

    def format_prompt(self, prompt: str) -> str:
        """The text of a prompt, up to the answer."""
        return f"{prompt} ASSISTANT:"

    def format_answer(self, answer: str) -> str:
        """The text of an answer, up to its end token."""
        return f" {answer}"

    def decode(self, model: PreTrainedModel, embeds: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """embeds [B, L, D], mask [B, 1, L, L], positions [B, axes, L] -> hidden states [B, L, D]."""
        decoder = self.text_model(model)
        return decoder(
            inputs_embeds=embeds, attention_mask=mask, position_ids=self.positions(positions), use_cache=False
        ).last_hidden_state

    def positions(self, positions: Tensor) -> Tensor:
        """Positions [B, axes, L] in the shape that the decoder takes."""
        return positions[:, 0]


def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


@final
class Llava(Family):
    """CLIP ViT, two-layer projector, Llama."""

    name = "llava"
    about = (
        "CLIP ViT (4 layers, 192 wide, 8-pixel patches, 64 x 64 images, 64 image tokens), two-layer projector, Llama "
        "(4 layers, 192 wide)"
    )
    image = r"'<image>\n'"
    cells = torch.arange(GRID**2)[:, None]

    def processor(self, tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
        images = CLIPImageProcessorPil(size=_SQUARE, do_center_crop=False, image_mean=MEAN, image_std=STD)
        return LlavaProcessor(
            image_processor=images,
            tokenizer=tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,  # CLIP's class token, which "default" removes
            chat_template=chat_template(self.image),
        )

    def model(self, tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
        vision = CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            image_size=SIDE,
            patch_size=PATCH,
            projection_dim=WIDTH,
        )
        config = cast(Any, LlavaConfig)(
            vision_config=vision,
            text_config=LlamaConfig(**text_settings(tokenizer)),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_length=GRID**2,
            # the last layer, not LLaVA's second to last: no layer here is pretrained for another task
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
        )
        return LlavaForConditionalGeneration(config)

    def text_model(self, model: PreTrainedModel) -> nn.Module:
        return cast(Any, model).model.language_model

    def encode_images(self, model: PreTrainedModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
        inner = cast(Any, model).model
        features = inner.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        return features, inner.multi_modal_projector(features)


@final
class Blip2(Family):
    """ViT, Q-Former, Llama: InstructBLIP's parts joined as in BLIP-2, where the queries do not read the question."""

    name = "blip2"
    about = (
        "BLIP-2 ViT (4 layers, 192 wide, 8-pixel patches, 64 x 64 images), Q-Former (3 layers, 32 queries = 32 image "
        "tokens), linear projection, Llama (4 layers, 192 wide)"
    )
    queries: ClassVar[int] = 32
    image = rf"('<image>' * {queries}) ~ '\n'"
    cells = torch.arange(GRID**2).view(queries, -1)

    def processor(self, tokenizer: PreTrainedTokenizerFast) -> Blip2Processor:
        images = BlipImageProcessorPil(size=_SQUARE, image_mean=MEAN, image_std=STD)
        # no num_query_tokens: transformers would put all images before the text; the template puts them in place
        processor = Blip2Processor(image_processor=images, tokenizer=tokenizer)
        processor.chat_template = chat_template(self.image)
        return processor

    def model(self, tokenizer: PreTrainedTokenizerFast) -> Blip2ForConditionalGeneration:
        vision = Blip2VisionConfig(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            image_size=SIDE,
            patch_size=PATCH,
            initializer_range=0.02,  # the default of 1e-10 is for weights that are loaded
        )
        qformer = Blip2QFormerConfig(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=HEADS,
            cross_attention_frequency=1,
            encoder_hidden_size=WIDTH,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        config = cast(Any, Blip2Config)(
            vision_config=vision,
            qformer_config=qformer,
            text_config=LlamaConfig(**text_settings(tokenizer)),
            num_query_tokens=self.queries,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            tie_word_embeddings=True,
        )
        model = Blip2ForConditionalGeneration(config)
        self._init_queries(model)
        return model

    @torch.no_grad()
    def _init_queries(self, model: Blip2ForConditionalGeneration) -> None:
        """Initialize each query with the mean position embedding of its own patches.

        From zeros, the default, all queries would stay equal. From random values they need thousands of steps until
        they attend to their patches. Query and key projections start near the identity.
        """
        positions = model.vision_model.embeddings.position_embedding
        nn.init.normal_(positions, std=0.2)  # as large as an embedded patch
        model.query_tokens.copy_(positions[:, 1:][:, self.cells].mean(dim=2))
        for layer in cast(Any, model.qformer.encoder.layer):
            for projection in (layer.crossattention.attention.query, layer.crossattention.attention.key):
                projection.weight.copy_(1.2 * torch.eye(WIDTH))

    def text_model(self, model: PreTrainedModel) -> nn.Module:
        return cast(Any, model).language_model.model

    def encode_images(self, model: PreTrainedModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
        out = cast(Any, model).get_image_features(pixels, return_dict=True)
        return out.qformer_outputs.last_hidden_state, out.pooler_output


@final
class Qwen25VL(Family):
    """Vision tower with rotary positions, 2 x 2 patch merger, decoder with three rotary axes."""

    name = "qwen2_5_vl"
    about = (
        "Qwen2.5-VL vision tower (4 layers, 192 wide, 8-pixel patches, rotary positions, full attention) with its "
        "2 x 2 patch merger (images of 4,096 pixels, 16 image tokens when square), Qwen2.5 decoder with multimodal "
        "rotary positions (4 layers, 192 wide)"
    )
    merge: ClassVar[int] = 2
    image = r"'<|vision_start|><image><|vision_end|>\n'"
    extra_tokens = ("<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
    cells = torch.arange(GRID**2).view(GRID // 2, 2, GRID // 2, 2).transpose(1, 2).reshape(-1, 4)

    def processor(self, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
        images = Qwen2VLImageProcessorPil(
            patch_size=PATCH,
            merge_size=self.merge,
            size={"shortest_edge": SIDE**2, "longest_edge": SIDE**2},  # pixels in all; the aspect ratio stays
            image_mean=MEAN,
            image_std=STD,
        )
        return cast(Any, images_only(Qwen2_5_VLProcessor))(images, tokenizer, chat_template=chat_template(self.image))

    def model(self, tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
        vision = Qwen2_5_VLVisionConfig(
            depth=LAYERS,
            hidden_size=WIDTH,
            intermediate_size=512,
            num_heads=HEADS,
            patch_size=PATCH,
            spatial_merge_size=self.merge,
            window_size=SIDE,
            out_hidden_size=WIDTH,
            fullatt_block_indexes=list(range(LAYERS)),  # an image is one window
        )
        half = WIDTH // HEADS // 2
        rope = {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [half // 4, half * 3 // 8, half * 3 // 8],
        }
        special = {
            "image_token_id": "<image>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        }
        config = cast(Any, Qwen2_5_VLConfig)(
            vision_config=vision.to_dict(),
            text_config=text_settings(tokenizer) | {"rope_parameters": rope},
            tie_word_embeddings=True,
            **{name: tokenizer.convert_tokens_to_ids(token) for name, token in special.items()},
        )
        return Qwen2_5_VLForConditionalGeneration(config)

    def text_model(self, model: PreTrainedModel) -> nn.Module:
        return cast(Any, model).model.language_model

    def encode_images(self, model: PreTrainedModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
        batch = len(pixels)
        grid = torch.tensor([[1, GRID, GRID]]).expand(batch, -1)
        features = cast(Any, model).model.visual(patches(pixels, self.merge), grid_thw=grid).pooler_output
        features = features.view(batch, len(self.cells), -1)
        return features, features

    def prefix(self, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[list[int]]]:
        image = cast(int, tokenizer.convert_tokens_to_ids("<image>"))
        before, after = _ids(tokenizer, "USER: <|vision_start|>"), _ids(tokenizer, "<|vision_end|>\n")
        side = GRID // self.merge
        tokens = range(side**2)
        start, end = len(before), len(before) + side  # an image takes as many positions as it has tokens on a side
        axes = [
            [*range(start), *(start + i for i in axis), *range(end, end + len(after))]
            for axis in ([0] * side**2, [i // side for i in tokens], [i % side for i in tokens])
        ]
        return [*before, *[image] * side**2, *after], axes

    def positions(self, positions: Tensor) -> Tensor:
        return positions.transpose(0, 1)


def patches(pixels: Tensor, merge: int) -> Tensor:
    """Flatten pixels [B, 3, S, S] as Qwen's processor does: [B * G * G, 3 * 2 * P * P], merged patches side by side."""
    batch, channels, side, _ = pixels.shape
    blocks = side // PATCH // merge
    split = pixels.view(batch, channels, blocks, merge, PATCH, blocks, merge, PATCH)
    ordered = split.permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None]
    twice = ordered.expand(*ordered.shape[:6], 2, PATCH, PATCH)  # a still image is a video of two equal frames
    return twice.reshape(batch * GRID**2, -1)


FAMILIES: dict[str, Family] = {family.name: family for family in (Llava(), Blip2(), Qwen25VL())}
