"""Processors of every family, ready for conversations about images: loaded, given what they lack, and asked."""

from __future__ import annotations

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


def load_processor(source: str) -> ProcessorMixin:
    """The processor of a model folder or hub id, able to pad and to write conversations.

    Where torchvision is missing, a processor that needs it for videos is loaded without its video half.

    Raises:
        InputError: there is none, or it has no chat template.
    """
    processor: Any = _loaded(source)
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise InputError(f"{source}: holds no processor of images and text; save it beside the model")
    _write_in_place(processor)
    if processor.chat_template is None:  # some processors, BLIP-2's for one, forget what was saved with them
        processor.chat_template = processor.tokenizer.chat_template or _PLAIN.get(type(processor).__name__)
    if processor.chat_template is None:
        raise InputError(f"{source}: its processor has no chat template; save one in it as chat_template.jinja")
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def _loaded(source: str) -> ProcessorMixin:
    try:
        return AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except (ImportError, OSError):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        kind = cast("type[ProcessorMixin] | None", PROCESSOR_MAPPING.get(type(config), None))
        if kind is None or "video_processor" not in kind.get_attributes():
            raise
        return cast(Any, images_only(kind)).from_pretrained(source)


# --- conversations to tensors -------------------------------------------------------------------------


def written(processor: ProcessorMixin, messages: Sequence[dict[str, Any]], *, asking: bool = False) -> str:
    """A conversation as the family writes it; ``asking`` for the next reply, or as far as it goes.

    Raises:
        InputError: the family's chat template does not take such a conversation.
    """
    try:
        return str(cast(Any, processor).apply_chat_template(messages, tokenize=False, add_generation_prompt=asking))
    except TemplateError as error:
        raise InputError(f"the model's chat template does not take a row: {error}") from error


def encoded(
    processor: ProcessorMixin,
    texts: Sequence[str],
    asked: Sequence[str],
    images: Sequence[Sequence[Image.Image]],
    names: Sequence[str] = (),
    **how: Any,
) -> BatchFeature:
    """Padded lists of tokens of written conversations, and their images.

    Args:
        texts: the conversations, by `written`.
        asked: the part of each that comes before what the model is to say.
        images: those of each conversation, in the order in which they are written in it.
        names: what each is called where it is too long; by default its text.
        how: further arguments of the processor.

    Raises:
        InputError: the family does not take so many images, or a conversation is longer than the model can read.
    """
    ready = cast(Any, processor)
    batch = tokenized(processor, texts, images, **how)
    lengths = [sum(row) for row in batch["attention_mask"]]
    longest = max(range(len(texts)), key=lambda row: lengths[row])
    check_length(processor, lengths[longest], (names or [quote(text) for text in texts])[longest])
    if isinstance(
        processor, InstructBlipProcessor
    ):  # its Q-Former reads what is asked, too: it must not read the answer
        if any(len(row) != 1 for row in images):
            raise InputError("InstructBLIP takes rows with one image; leave out those with none, or with more")
        read = ready.qformer_tokenizer([_words(ready, text) for text in asked], padding=True, verbose=False)
        batch |= {f"qformer_{name}": read[name] for name in ("input_ids", "attention_mask")}
    return batch


def tokenized(
    processor: ProcessorMixin, texts: Sequence[str], images: Sequence[Sequence[Image.Image]], **how: Any
) -> BatchFeature:
    """The same as the host makes it, however long it is."""
    if isinstance(processor, Blip2Processor) and not any(images):
        raise InputError("BLIP-2 takes no batch without an image; leave out the rows that have none")
    return cast(Any, processor)(
        text=list(texts),
        images=[list(row) for row in images] if any(images) else None,
        padding=True,
        add_special_tokens=not _writes_beginning(processor),
        verbose=False,  # what is too long is told below, in a line
        **how,
    )


def text_tokens(processor: ProcessorMixin, text: str) -> int:
    """How many tokens a written conversation has before its images are put into it."""
    tokenizer, special = cast(Any, processor).tokenizer, not _writes_beginning(processor)
    if tokenizer.is_fast:  # three times as fast without the host's wrapping
        return len(tokenizer.backend_tokenizer.encode(text, add_special_tokens=special))
    return len(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def limit(processor: ProcessorMixin) -> int:
    """How many tokens the model reads; a number beyond all texts where its tokenizer does not say."""
    return int(cast(Any, processor).tokenizer.model_max_length)


def check_length(processor: ProcessorMixin, tokens: int, name: str) -> None:
    """Raises InputError if that is more than the model reads: time and memory grow with the square of it."""
    if tokens > limit(processor):
        reads = f"the model reads {limit(processor):,}"
        raise InputError(f"{name} has {tokens:,} tokens, {reads}; shorten it or take it out")


def _writes_beginning(processor: Any) -> bool:
    """Whether the chat template marks the beginning of a text, so that the tokenizer must not do it again."""
    begin = processor.tokenizer.bos_token
    template = str(processor.chat_template)
    return begin is not None and ("bos_token" in template or begin in template)


def _words(processor: Any, text: str) -> str:
    """A text without special tokens."""
    for token in (str(processor.image_token), *processor.tokenizer.all_special_tokens):
        text = text.replace(token, "")
    return text.strip()


# --- without torchvision ------------------------------------------------------------------------------


@cache
def images_only(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """A class of processors without its video half, which needs torchvision; in saved files it has the host's name."""
    return type(kind.__name__, (ImagesOnly, kind), {})


class ImagesOnly(ProcessorMixin):
    video_processor = SimpleNamespace(num_frames=None, fps=None)  # SmolVLM's asks for these where there is no video

    @classmethod
    def get_attributes(cls) -> list[str]:
        return [name for name in super().get_attributes() if name != "video_processor"]

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        fields = {name: value for name, value in processor_dict.items() if name != "video_processor"}
        return super().from_args_and_dict([*args, None], fields, **kwargs)

    def __reduce__(self) -> Any:  # a loader's workers are sent it; its class has no name that they could find
        return _unfilled, (type(self).__mro__[2],), self.__dict__


def _unfilled(kind: type[ProcessorMixin]) -> ProcessorMixin:
    made = images_only(kind)
    return made.__new__(made)


# --- families from before chat templates --------------------------------------------------------------


def _plain(question: str, answer: str) -> str:
    """Jinja: images, the beginning of the text, ``question``, ``answer``; TEXT stands for a turn's words."""
    parts = "{%- for part in message['content'] if part['type'] == '"
    words = parts + "text' -%}{{ part['text'] }}{%- endfor -%}"
    asked, said = (text.replace("TEXT", "' }}" + words + "{{ '") for text in (question, answer))
    return (
        "{%- for message in messages -%}"
        + parts + "image' -%}<image>{%- endfor -%}"
        + "{%- if loop.first -%}{{ bos_token }}{%- endif -%}"
        + "{%- if message['role'] == 'assistant' -%}{{ '" + said + "' ~ eos_token }}"
        + "{%- else -%}{{ '" + asked + "' }}{%- endif -%}{%- endfor -%}"
    )  # fmt: skip


# As their authors trained them, for questions with one answer.
_PLAIN = {
    "PaliGemmaProcessor": _plain(r"TEXT\n", "TEXT"),
    "Blip2Processor": _plain("Question: TEXT Answer:", " TEXT"),
    "InstructBlipProcessor": _plain("TEXT", " TEXT"),
}


def _write_in_place(processor: Any) -> None:
    """Have images where the text has them, and the text as it was written; the host would rearrange both."""
    kind = type(processor)
    # a BLIP's without a number of queries has a chat template that writes all tokens of an image
    if kind not in _IN_PLACE or getattr(processor, "num_query_tokens", True) is None:
        return
    processor.image_token = str(processor.image_token)
    processor.image_token_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    processor.__class__ = _IN_PLACE[kind]


@final
class _PaliGemma(PaliGemmaProcessor):
    """PaliGemma's, without what it adds to a text, and for texts without an image as well."""

    def prepare_inputs_layout(self, *args: Any, **kwargs: Any) -> Any:
        return ProcessorMixin.prepare_inputs_layout(self, *args, **kwargs)

    def validate_inputs(self, *args: Any, **kwargs: Any) -> None:
        ProcessorMixin.validate_inputs(self, *args, **kwargs)


class _Queried(ProcessorMixin):
    """One whose images are as many tokens as there are queries, called as newer processors are."""

    num_query_tokens: int
    image_token: str

    def __call__(self, *args: Any, **kwargs: Any) -> BatchFeature:
        return ProcessorMixin.__call__(self, *args, **kwargs)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        return self.image_token * self.num_query_tokens


@final
class _Blip2(_Queried, Blip2Processor): ...


@final
class _InstructBlip(_Queried, InstructBlipProcessor): ...


_IN_PLACE: dict[type, type] = {
    PaliGemmaProcessor: _PaliGemma,
    Blip2Processor: _Blip2,
    InstructBlipProcessor: _InstructBlip,
}
for _host, _ours in _IN_PLACE.items():
    _ours.__name__ = _host.__name__  # what saved files name
