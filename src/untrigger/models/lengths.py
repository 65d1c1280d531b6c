"""Length check: refuse rows with more tokens than the model reads, while the data is read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from PIL import Image
from transformers import ProcessorMixin

from untrigger.errors import InputError
from untrigger.models.collators import ChatCollator, chat_message
from untrigger.models.generate import prompt_messages
from untrigger.models.processors import check_length, max_tokens, render_chat, text_tokens, tokenize
from untrigger.rows.images import quote
from untrigger.rows.sample import IMAGE_TAG, Message, Role, Sample, Size

_MAX_IMAGE_TOKENS = 2**14  # no family's default processor makes more tokens of an image
_SEAM = 4  # tokens by which a turn's text may differ when tokenized next to other turns
_MAX_SIZES = 64  # image sizes to count exactly; from then on their maximum is the bound for any other size


class Lengths:
    """Refuse rows with more tokens than the model reads, given their text and the sizes of their images.

    A row is refused only if the processor itself, given blank images of those sizes, makes too many tokens of it. Most
    rows pass by a cheap upper bound: a text has no more tokens than bytes. The bound can be too low where a late image
    size needs more tokens than all sizes before it. Such a row is refused when it is encoded
    (`untrigger.models.processors.encode`).

    Args:
        prompts_only: count the prompt without the last answer, as for generation; by default whole rows, as for
            training.
    """

    def __init__(self, processor: ProcessorMixin, *, prompts_only: bool = False) -> None:
        self._processor, self._prompts_only, self._collate = processor, prompts_only, ChatCollator(processor)
        self._limit, self._image_bound = max_tokens(processor), _MAX_IMAGE_TOKENS
        self._image_tokens: dict[Size, int] = {}  # of an image of this size
        self._template_tokens = lru_cache(1024)(self._count_template_tokens)

    def __call__(self, row: Sample, sizes: Sequence[Size]) -> None:
        """Check a row, from the cheapest bound to the exact count.

        Raises:
            InputError: the row is too long, or the chat template rejects its turns.
        """
        turns = tuple((turn.role, turn.text.count(IMAGE_TAG)) for turn in row.messages)
        images = sum(self._image_tokens.get(size, self._image_bound) for size in sizes)
        without_text = self._template_tokens(turns) + images + _SEAM * len(turns)
        joined = "\n".join(turn.text for turn in row.messages)
        if without_text + len(joined.encode(errors="replace")) <= self._limit:
            return
        # tokenizing the joined text is cheaper than rendering the conversation
        if without_text + text_tokens(self._processor, joined) <= self._limit:
            return
        text = self._render(row)
        rendered = text_tokens(self._processor, text)
        if rendered + images <= self._limit or rendered + sum(map(self._count_image, sizes)) <= self._limit:
            return
        check_length(self._processor, self._count(text, sizes), f"id {quote(row.id)}")

    def _count_template_tokens(self, turns: tuple[tuple[Role, int], ...]) -> int:
        """Tokens that the chat template adds around the texts of such turns."""
        messages = tuple(Message(role, IMAGE_TAG * images + "x") for role, images in turns)
        return text_tokens(self._processor, self._render(Sample("", (), messages)))

    def _render(self, row: Sample) -> str:
        if self._prompts_only:
            return render_chat(self._processor, prompt_messages(row), add_generation_prompt=True)
        return self._collate.render([chat_message(turn) for turn in row.messages])[0]

    def _count_image(self, size: Size) -> int:
        """Tokens of an image of this size."""
        if size not in self._image_tokens:
            message = chat_message(Message("user", f"{IMAGE_TAG}\nx"))
            text = render_chat(self._processor, [message], add_generation_prompt=True)
            self._image_tokens[size] = self._count(text, [size]) - text_tokens(self._processor, text)
            if len(self._image_tokens) >= _MAX_SIZES:
                self._image_bound = max(self._image_tokens.values())
        return self._image_tokens[size]

    def _count(self, text: str, sizes: Sequence[Size]) -> int:
        """Tokens of a rendered text with blank images of these sizes."""
        blank = [Image.new("RGB", size) for size in sizes]
        try:
            return len(tokenize(self._processor, [text], [blank])["input_ids"][0])
        except ValueError as error:  # some families reject extreme aspect ratios
            shapes = ", ".join(f"{width} x {height}" for width, height in sizes)
            reason = str(error).strip().partition("\n")[0]
            raise InputError(
                f"the model's processor rejects images of {shapes} pixels ({reason}); remove them"
            ) from None
