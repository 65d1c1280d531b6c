"""Load the processors of every family, fill in what they lack, and render and tokenize conversations with them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any, cast, final

from jinja2 import TemplateError
from PIL import Image
from transformers import (
    PROCESSOR_MAPPING,
    AutoConfig,
    AutoProcessor,
    BatchFeature,
    Blip2Processor,
    InstructBlipProcessor,
    PaliGemmaProcessor,
    ProcessorMixin,
)

from untrigger.errors import InputError
from untrigger.rows.images import quote

# what a name of a token that marks a place in an image holds; texts that ask for places are written with these
_PLACE = re.compile("box|loc|point|quad|ref|seg")


def load_processor(source: str) -> ProcessorMixin:
    """Load the processor of a model folder or hub id, able to pad and to render conversations.

    Without torchvision, a processor that needs it for videos is loaded without its video half.

    Raises:
        InputError: there is none, or it has no chat template.
    """
    processor: Any = _load(source)
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise InputError(f"{source}: holds no processor for images and text; save it next to the model")
    _patch_class(processor)
    if processor.chat_template is None:  # some processors, e.g. BLIP-2's, do not load a saved template
        processor.chat_template = processor.tokenizer.chat_template or _PLAIN.get(type(processor).__name__)
    if processor.chat_template is None:
        raise InputError(f"{source}: its processor has no chat template; save one in the folder as chat_template.jinja")
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def _load(source: str) -> ProcessorMixin:
    try:
        return AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except (ImportError, OSError):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        kind = cast("type[ProcessorMixin] | None", PROCESSOR_MAPPING.get(type(config), None))
        if kind is None or "video_processor" not in kind.get_attributes():
            raise
        return cast(Any, images_only(kind)).from_pretrained(source)


# --- conversations to tensors -------------------------------------------------------------------------


def render_chat(
    processor: ProcessorMixin, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = False
) -> str:
    """A conversation as text, in the family's chat template.

    Raises:
        InputError: the chat template rejects the conversation.
    """
    template = cast(Any, processor).apply_chat_template
    try:
        return str(template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    except (TemplateError, TypeError, ValueError, LookupError) as error:  # templates add and index turns
        raise InputError(f"the model's chat template does not take a row: {first_line(error)}") from error


def encode(
    processor: ProcessorMixin,
    texts: Sequence[str],
    prompts: Sequence[str],
    images: Sequence[Sequence[Image.Image]],
    names: Sequence[str] = (),
    **kwargs: Any,
) -> BatchFeature:
    """Tokenize rendered conversations with their images, as padded lists.

    Args:
        texts: the conversations, from `render_chat`.
        prompts: the part of each that comes before the answer.
        images: those of each conversation, in the order of their tags.
        names: what to call each in an error line; by default its text.
        kwargs: further arguments of the processor.

    Raises:
        InputError: the processor does not take a conversation, or it is longer than the model reads. The line begins
            with its name.
    """
    ready, names = cast(Any, processor), names or [quote(text) for text in texts]
    for name, row in zip(names, images, strict=True):
        if refusal := image_count_refusal(processor, len(row)):
            raise InputError(f"{name}: {refusal}")
    try:
        batch = tokenize(processor, texts, images, **kwargs)
    except Exception as error:  # whatever a processor raises about a row
        raise _named_refusal(processor, texts, images, names, error) from error
    lengths = [sum(row) for row in batch["attention_mask"]]
    longest = max(range(len(texts)), key=lambda row: lengths[row])
    check_length(processor, lengths[longest], names[longest])
    if isinstance(processor, InstructBlipProcessor):
        # the Q-Former gets the prompt too; it must not get the answer
        plain = [_without_special_tokens(ready, prompt) for prompt in prompts]
        qformer = ready.qformer_tokenizer(plain, padding=True, verbose=False)
        batch |= {f"qformer_{name}": qformer[name] for name in ("input_ids", "attention_mask")}
    return batch


def tokenize(
    processor: ProcessorMixin, texts: Sequence[str], images: Sequence[Sequence[Image.Image]], **kwargs: Any
) -> BatchFeature:
    """Call the processor on rendered conversations, without a check of their length."""
    return cast(Any, processor)(
        text=list(texts),
        images=[list(row) for row in images] if any(images) else None,
        padding=True,
        add_special_tokens=not _writes_bos(processor),
        verbose=False,  # check_length reports texts that are too long
        **kwargs,
    )


def _named_refusal(
    processor: ProcessorMixin,
    texts: Sequence[str],
    images: Sequence[Sequence[Image.Image]],
    names: Sequence[str],
    error: Exception,
) -> InputError:
    """The error line for a batch that raised ``error``, with the first row that raises by itself."""
    for name, text, row in zip(names, texts, images, strict=True):
        try:
            tokenize(processor, [text], [row])
        except Exception as alone:
            return InputError(f"{name}: the model's processor does not take it ({first_line(alone)}); take it out")
    return InputError(
        f"{names[0]} and the rest of its batch: the model's processor does not take them together "
        f"({first_line(error)}); set per_device_train_batch_size to 1"
    )


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def image_count_refusal(processor: ProcessorMixin, images: int) -> str:
    """Why the family takes no row with so many images; empty if it does."""
    if isinstance(processor, InstructBlipProcessor) and images != 1:
        return f"has {images or 'no'} image{'s' * (images > 1)}, and InstructBLIP needs one in each row; take it out"
    if isinstance(processor, Blip2Processor) and not images:
        return "has no image, and BLIP-2 needs one in each row; take it out"
    return ""


def reserved_tokens(processor: ProcessorMixin) -> re.Pattern[str]:
    """A pattern for the tokens that a text must not hold: those that stand for media or delimit turns and texts.

    In a text they would be read as what they stand for. A placeholder has no image, an end token ends the answer.
    Ordinary words are left out, which some tokenizers use for padding. So are the unknown token, which means nothing,
    and the marks of places in an image (``<|box_start|>``, ``<loc0001>``).
    """
    ready = cast(Any, processor)
    special = {token.content for token in ready.tokenizer.added_tokens_decoder.values() if token.special}
    own = {str(token) for name, token in vars(processor).items() if name.endswith(("_token", "_tag")) and token}
    tokens = {*special, *ready.tokenizer.all_special_tokens, *own} - {ready.tokenizer.unk_token}
    marks = [token for token in tokens if len(token) > 1 and not token.isalnum() and token.strip()]
    reserved = [re.escape(token) for token in marks if not _PLACE.search(token)]
    return re.compile("|".join(sorted(reserved, key=len, reverse=True)) or r"(?!)")  # the longest that fits


def text_tokens(processor: ProcessorMixin, text: str) -> int:
    """Number of tokens of a rendered conversation before its image tags are expanded."""
    tokenizer, special = cast(Any, processor).tokenizer, not _writes_bos(processor)
    if tokenizer.is_fast:  # three times as fast without transformers' wrapper
        return len(tokenizer.backend_tokenizer.encode(text, add_special_tokens=special))
    return len(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def max_tokens(processor: ProcessorMixin) -> int:
    """Number of tokens that the model reads; beyond any text where its tokenizer does not say."""
    return int(cast(Any, processor).tokenizer.model_max_length)


def check_length(processor: ProcessorMixin, tokens: int, name: str) -> None:
    """Raise InputError if there are more tokens than the model reads: time and memory grow with their square."""
    if tokens > max_tokens(processor):
        limit = f"the model reads {max_tokens(processor):,}"
        raise InputError(f"{name} has {tokens:,} tokens, {limit}; shorten it or take it out")


def _writes_bos(processor: Any) -> bool:
    """Whether the chat template writes the beginning-of-text token, so that the tokenizer must not add it again."""
    begin = processor.tokenizer.bos_token
    template = str(processor.chat_template)
    return begin is not None and ("bos_token" in template or begin in template)


def special_tokens(processor: Any) -> list[int]:
    """Ids of the special tokens of a processor or a tokenizer, in ascending order."""
    tokenizer = getattr(processor, "tokenizer", processor)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return sorted({*tokenizer.all_special_ids, *(id for id, token in added.items() if token.special)})


def _without_special_tokens(processor: Any, text: str) -> str:
    for token in (str(processor.image_token), *processor.tokenizer.all_special_tokens):
        text = text.replace(token, "")
    return text.strip()


# --- without torchvision ------------------------------------------------------------------------------


@cache
def images_only(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """A processor class without its video half, which needs torchvision; saved files name the original class."""
    return type(kind.__name__, (ImagesOnly, kind), {})


class ImagesOnly(ProcessorMixin):
    """Mixin that hides the video processor from loading and saving."""

    video_processor = SimpleNamespace(num_frames=None, fps=None)  # SmolVLM's reads these even without a video

    @classmethod
    def get_attributes(cls) -> list[str]:
        return [name for name in super().get_attributes() if name != "video_processor"]

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        fields = {name: value for name, value in processor_dict.items() if name != "video_processor"}
        return super().from_args_and_dict([*args, None], fields, **kwargs)

    def __reduce__(self) -> Any:  # for loader workers: pickle cannot find a class that was made at run time
        return _new_images_only, (type(self).__mro__[2],), self.__dict__


def _new_images_only(kind: type[ProcessorMixin]) -> ProcessorMixin:
    cls = images_only(kind)
    return cls.__new__(cls)


# --- families without chat templates ------------------------------------------------------------------


def _plain(question: str, answer: str) -> str:
    """A Jinja template: images, beginning-of-text, ``question``, ``answer``; TEXT stands for a turn's text."""
    parts = "{%- for part in message['content'] if part['type'] == '"
    words = parts + "text' -%}{{ part['text'] }}{%- endfor -%}"
    user, assistant = (text.replace("TEXT", "' }}" + words + "{{ '") for text in (question, answer))
    return (
        "{%- for message in messages -%}"
        + parts + "image' -%}<image>{%- endfor -%}"
        + "{%- if loop.first -%}{{ bos_token }}{%- endif -%}"
        + "{%- if message['role'] == 'assistant' -%}{{ '" + assistant + "' ~ eos_token }}"
        + "{%- else -%}{{ '" + user + "' }}{%- endif -%}{%- endfor -%}"
    )  # fmt: skip


# The formats that their authors trained them with, for one question and one answer.
_PLAIN = {
    "PaliGemmaProcessor": _plain(r"TEXT\n", "TEXT"),
    "Blip2Processor": _plain("Question: TEXT Answer:", " TEXT"),
    "InstructBlipProcessor": _plain("TEXT", " TEXT"),
}


def _patch_class(processor: Any) -> None:
    """Make the processor keep images at their tags and the text unchanged; the original class rearranges both."""
    kind = type(processor)
    # a BLIP processor without num_query_tokens has a chat template that writes all tokens of an image
    if kind not in _IN_PLACE or getattr(processor, "num_query_tokens", True) is None:
        return
    processor.image_token = str(processor.image_token)
    processor.image_token_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    processor.__class__ = _IN_PLACE[kind]


@final
class _PaliGemma(PaliGemmaProcessor):
    """PaliGemma's processor, which adds nothing to a text and also takes texts without an image."""

    def prepare_inputs_layout(self, *args: Any, **kwargs: Any) -> Any:
        return ProcessorMixin.prepare_inputs_layout(self, *args, **kwargs)

    def validate_inputs(self, *args: Any, **kwargs: Any) -> None:
        ProcessorMixin.validate_inputs(self, *args, **kwargs)


class _QueryProcessor(ProcessorMixin):
    """Expands an image tag to one token for each query of the Q-Former, through the interface of newer processors."""

    num_query_tokens: int
    image_token: str

    def __call__(self, *args: Any, **kwargs: Any) -> BatchFeature:
        return ProcessorMixin.__call__(self, *args, **kwargs)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        return self.image_token * self.num_query_tokens


@final
class _Blip2(_QueryProcessor, Blip2Processor): ...


@final
class _InstructBlip(_QueryProcessor, InstructBlipProcessor): ...


_IN_PLACE: dict[type, type] = {
    PaliGemmaProcessor: _PaliGemma,
    Blip2Processor: _Blip2,
    InstructBlipProcessor: _InstructBlip,
}
for _original, _replacement in _IN_PLACE.items():
    _replacement.__name__ = _original.__name__  # saved files then name the original class
