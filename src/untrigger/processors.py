"""Qwen's processors without their video half, which needs torchvision."""

from __future__ import annotations

from typing import Any, cast, final

from transformers import ProcessorMixin, Qwen2_5_VLProcessor


@final
class ImageQwenProcessor(Qwen2_5_VLProcessor):
    """A Qwen2-VL or Qwen2.5-VL processor for images and text alone; it works without torchvision.

    The host finds a processor's parts in the arguments of ``__init__``: one that does not ask for a video
    processor is loaded and saved without it.
    """

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **_: Any
    ) -> None:
        self.image_token = getattr(tokenizer, "image_token", "<|image_pad|>")
        self.video_token = getattr(tokenizer, "video_token", "<|video_pad|>")
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(cast(Any, self), image_processor, tokenizer, chat_template=chat_template)


# under the host's name in saved files, as the rest of a model's folder has it
ImageQwenProcessor.__name__ = Qwen2_5_VLProcessor.__name__
