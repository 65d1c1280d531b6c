"""Tiny random models of many families, each a folder as its users have it: weights, processor, tokenizer, template.

Made from configuration alone. The chat templates are in the style of the families' own. They differ in the same way in
who ends a turn, where the beginning of a text is marked and where images stand.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as host
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from untrigger.models.lite_tower import LiteConfig, LiteTower
from untrigger.models.loading import embedded_model_path, load_processor
from untrigger.models.processors import images_only
from untrigger.pretraining.smol_family import Smol
from untrigger.pretraining.smol_parts import Parts

Made = tuple[Any, Any]  # configuration and processor
WIDTH, SIDE, PATCH = 16, 32, 16  # width of every layer; image size and patch size in pixels
SQUARE = {"height": SIDE, "width": SIDE}
GRID = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]]  # resolutions that LLaVA-NeXT and -OneVision cut into tiles


# --- tokenizers and templates ------------------------------------------------------------------------


def tokenizer(begins: bool = True, extra: list[str] | None = None, **named: str) -> Any:
    """The embedded tokenizer with further special tokens; with ``begins`` it adds its own at the start of a text."""
    backend = load_processor(str(embedded_model_path("llava"))).tokenizer.backend_tokenizer
    if begins:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>" if begins else None,
        eos_token=named.pop("eos_token", "</s>"),
        extra_special_tokens=named,
        clean_up_tokenization_spaces=False,
    )
    made.add_tokens(extra or [], special_tokens=True)
    return made


def template(turn: str, reply: str, prompt: str, image: str = "<image>", before: str = "") -> str:
    """Jinja of one style: a user's turn and the assistant's, with CONTENT in each; and the generation prompt."""
    content = (
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}" + image + "{% endif %}{% endfor %}"
        "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    )
    user, assistant = (text.replace("CONTENT", content) for text in (turn, reply))
    return (
        before + "{% for message in messages %}{% if message['role'] == 'user' %}" + user + "{% else %}" + assistant
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}" + prompt + "{% endif %}"
    )  # fmt: skip


VICUNA = template("USER: CONTENT ", "ASSISTANT: CONTENT ", "ASSISTANT:", "<image>\n")  # never ends a reply
INSTRUCT = template("[INST] CONTENT [/INST]", " CONTENT{{ eos_token }}", "", "<image>\n")
IDEFICS = template(
    "User:CONTENT<end_of_utterance>\n", "Assistant: CONTENT<end_of_utterance>\n", "Assistant:", before="{{ bos_token }}"
)
GEMMA = template(
    "<start>user\nCONTENT<end>\n", "<start>model\nCONTENT<end>\n", "<start>model\n", "<boi>", "{{ bos_token }}"
)


def chat(image: str, before: str = "") -> str:
    start, end = "<|im_start|>", "<|im_end|>\n"
    return template(
        f"{start}user\nCONTENT{end}", f"{start}assistant\nCONTENT{end}", f"{start}assistant\n", image, before
    )


def chat_tokens(**named: str) -> Any:
    return tokenizer(False, ["<|im_start|>"], eos_token="<|im_end|>", **named)


# --- what the families share -------------------------------------------------------------------------

LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH}


def text(tokens: Any, **further: Any) -> dict[str, Any]:
    special = {name: getattr(tokens, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return LAYERS | special | {"vocab_size": len(tokens), "num_key_value_heads": 1, "head_dim": 8} | further


def tower(**further: Any) -> dict[str, Any]:
    return LAYERS | {"image_size": SIDE, "patch_size": PATCH} | further


def token_id(tokens: Any, *names: str) -> Any:
    return tokens.convert_tokens_to_ids(list(names) if len(names) > 1 else names[0])


# --- the families ------------------------------------------------------------------------------------


def llava() -> Made:
    tokens = tokenizer(image_token="<image>")
    config = host.LlavaConfig(
        vision_config=host.CLIPVisionConfig(**tower()),
        text_config=host.LlamaConfig(**text(tokens)),
        image_token_id=tokens.image_token_id,
        image_seq_length=4,
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE)
    processor = host.LlavaProcessor(
        images, tokens, PATCH, "default", num_additional_image_tokens=1, chat_template=VICUNA
    )
    return config, processor


def llava_next() -> Made:
    tokens = tokenizer(image_token="<image>")
    config = host.LlavaNextConfig(
        vision_config=host.CLIPVisionConfig(**tower()),
        text_config=host.MistralConfig(**text(tokens)),
        image_token_id=tokens.image_token_id,
        image_grid_pinpoints=GRID,
        image_seq_length=4,
    )
    images = LlavaNextImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=GRID)
    processor = host.LlavaNextProcessor(
        images, tokens, PATCH, "default", num_additional_image_tokens=1, chat_template=INSTRUCT
    )
    return config, processor


def llava_onevision() -> Made:
    tokens = chat_tokens(image_token="<image>", video_token="<video>")
    config = host.LlavaOnevisionConfig(
        vision_config=host.SiglipVisionConfig(**tower(vision_use_head=False)),
        text_config=host.Qwen2Config(**text(tokens)),
        image_token_id=tokens.image_token_id,
        video_token_id=tokens.video_token_id,
        image_grid_pinpoints=GRID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    images = LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=GRID)
    processor = images_only(host.LlavaOnevisionProcessor)(
        images, tokens, None, num_image_tokens=4, vision_feature_select_strategy="full", chat_template=chat("<image>")
    )
    return config, processor


def qwen(name: str) -> Made:
    tokens = chat_tokens(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )
    vision: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2}
    if name == "Qwen2VL":
        vision |= {"embed_dim": WIDTH, "hidden_size": WIDTH}
    else:
        vision |= {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "out_hidden_size": WIDTH}
    if name == "Qwen2_5_VL":
        vision |= {"window_size": SIDE, "fullatt_block_indexes": [1]}
    if name == "Qwen3VL":
        vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    rope |= {"mrope_interleaved": True} if name == "Qwen3VL" else {}
    config = getattr(host, f"{name}Config")(
        vision_config=vision,
        text_config=text(tokens, rope_parameters=rope),
        image_token_id=tokens.image_token_id,
        video_token_id=tokens.video_token_id,
        vision_start_token_id=tokens.vision_start_token_id,
        vision_end_token_id=tokens.vision_end_token_id,
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    )
    system = "<|im_start|>system\nYou answer.<|im_end|>\n"
    processor = images_only(getattr(host, f"{name}Processor"))(
        images, tokens, None, chat_template=chat("<|vision_start|><|image_pad|><|vision_end|>", system)
    )
    return config, processor


def internvl() -> Made:
    tokens = chat_tokens(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    vision = tower(num_hidden_layers=1, patch_size=[8, 8], image_size=[SIDE, SIDE])
    config = host.InternVLConfig(
        vision_config=vision,
        text_config=host.Qwen2Config(**text(tokens)),
        image_token_id=tokens.context_image_token_id,
        image_seq_length=4,
    )
    images = GotOcr2ImageProcessorPil(size=SQUARE, max_patches=2)
    processor = images_only(host.InternVLProcessor)(
        images, tokens, None, image_seq_length=4, chat_template=chat("<IMG_CONTEXT>\n")
    )
    return config, processor


def _idefics(kind: str, images: Any) -> Made:
    places = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    marks = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *places]
    tokens = tokenizer(True, marks, eos_token="<end_of_utterance>", image_token="<image>")
    config = getattr(host, f"{kind}Config")(
        vision_config=tower(patch_size=8),
        text_config=host.LlamaConfig(**text(tokens)),
        image_token_id=tokens.image_token_id,
        scale_factor=2,
        pad_token_id=tokens.pad_token_id,
    )
    further = {"image_seq_len": 4, "chat_template": IDEFICS}
    if kind == "SmolVLM":
        return config, images_only(host.SmolVLMProcessor)(images, tokens, None, **further)
    return config, host.Idefics3Processor(images, tokens, **further)


def idefics3() -> Made:
    sizes = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    return _idefics("Idefics3", Idefics3ImageProcessorPil(**sizes))


def smolvlm() -> Made:
    sizes = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    return _idefics("SmolVLM", SmolVLMImageProcessorPil(**sizes))


def paligemma() -> Made:
    tokens = tokenizer(image_token="<image>")
    config = host.PaliGemmaConfig(
        vision_config=host.SiglipVisionConfig(**tower(vision_use_head=False)),
        text_config=host.Gemma2Config(**text(tokens)),  # PaliGemma 2's
        image_token_id=tokens.image_token_id,
        projection_dim=WIDTH,
    )
    images = SiglipImageProcessorPil(size=SQUARE)
    images.image_seq_length = 4
    return config, host.PaliGemmaProcessor(images, tokens)


def gemma3() -> Made:
    tokens = tokenizer(True, ["<start>", "<end>"], image_token="<img>", boi_token="<boi>", eoi_token="<eoi>")
    config = host.Gemma3Config(
        vision_config=host.SiglipVisionConfig(**tower(vision_use_head=False)),
        text_config=host.Gemma3TextConfig(**text(tokens), layer_types=["sliding_attention", "full_attention"]),
        mm_tokens_per_image=4,
        image_token_id=tokens.image_token_id,
        boi_token_id=tokens.boi_token_id,
        eoi_token_id=tokens.eoi_token_id,
    )
    images = Gemma3ImageProcessorPil(size=SQUARE)
    return config, host.Gemma3Processor(images, tokens, chat_template=GEMMA, image_seq_length=4)


def _blip(kind: str, decoder: Callable[..., Any], *tokenizers: Any) -> Made:
    tokens = tokenizers[0]
    images = BlipImageProcessorPil(size=SQUARE)
    processor = getattr(host, f"{kind}Processor")(images, *tokenizers, num_query_tokens=4)  # adds <image>
    config = getattr(host, f"{kind}Config")(
        vision_config=getattr(host, f"{kind}VisionConfig")(**tower(initializer_range=0.02)).to_dict(),
        qformer_config=LAYERS
        | {
            "vocab_size": len(tokens),
            "encoder_hidden_size": WIDTH,
            "cross_attention_frequency": 1,
            "max_position_embeddings": 256,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        text_config=decoder(tokens).to_dict(),
        num_query_tokens=4,
        image_token_index=token_id(tokens, "<image>"),
    )
    return config, processor


def blip2() -> Made:
    def opt(tokens: Any) -> Any:
        return host.OPTConfig(
            **text(tokens), word_embed_proj_dim=WIDTH, ffn_dim=2 * WIDTH, max_position_embeddings=256, dropout=0.0
        )

    return _blip("Blip2", opt, tokenizer())


def instructblip() -> Made:
    qformer = tokenizer(False)  # the Q-Former's
    qformer.return_token_type_ids = False
    return _blip("InstructBlip", lambda tokens: host.LlamaConfig(**text(tokens)), tokenizer(), qformer)


def smol_parts() -> Parts:
    """As small as possible, with every kind of stride, kernel and block that the real parts have."""
    tokens = tokenizer(False, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<empty_output>"])
    stages = ((3, 1, 1, 4, 1), (3, 2, 2, 6, 2), (5, 2, 2, 6, 1), (3, 2, 2, 8, 1), (5, 1, 2, 8, 1), (5, 2, 2, 8, 1))
    tower = LiteTower(LiteConfig(stem=8, stages=stages, head=16))
    return Parts(tokens, host.LlamaForCausalLM(host.LlamaConfig(**text(tokens, tie_word_embeddings=True))), tower)


def smol() -> Made:
    family = Smol(smol_parts())
    tokens = family.tokenizer(0)
    return family.model(tokens).config, family.processor(tokens)


FAMILIES: dict[str, Callable[[], Made]] = {
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen2_vl": lambda: qwen("Qwen2VL"),
    "qwen2_5_vl": lambda: qwen("Qwen2_5_VL"),
    "qwen3_vl": lambda: qwen("Qwen3VL"),
    "internvl": internvl,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "paligemma": paligemma,
    "gemma3": gemma3,
    "instructblip": instructblip,
    "blip2": blip2,
    "smol": smol,
}


def make(name: str, folder: Path) -> Path:
    """Make the family's model folder."""
    torch.manual_seed(0)
    config, processor = FAMILIES[name]()
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():  # Gemma 3's projector, BLIP-2's queries
                parameter.normal_(std=0.02)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
