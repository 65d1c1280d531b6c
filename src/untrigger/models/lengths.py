"""Check of rows while the data is read: what the model's processor refuses, and rows that are too long."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from PIL import Image
from transformers import ProcessorMixin

from untrigger.errors import InputError
from untrigger.models.collators import ChatCollator, chat_message
from untrigger.models.generate import prompt_messages
from untrigger.models.processors import (
    check_length,
    first_line,
    image_count_refusal,
    max_tokens,
    render_chat,
    reserved_tokens,
    text_tokens,
    tokenize,
)
from untrigger.rows.images import quote
from untrigger.rows.sample import IMAGE_TAG, Message, Role, Sample, Size

_MAX_IMAGE_TOKENS = 2**14  # no family's default processor makes more tokens of an image
_SEAM = 4  # tokens by which a turn's text may differ when tokenized next to other turns
_MAX_SIZES = 64  # image sizes to count exactly; from then on they give a bound for any other size

Turn = tuple[Role, int, bool]  # a turn's role, its number of images, and whether it has text


class Lengths:
    """Refuse rows that the model's processor does not take, given their text and the sizes of their images.

    Refused are rows with more tokens than the model reads, with a token of the model in a text, with turns that the
    chat template rejects, with a number of images that the family does not take, and with an image whose size the
    processor does not take.

    A row is too long only if the processor itself, given blank images of those sizes, makes too many tokens of it. Most
    rows pass by a cheap upper bound: a text has no more tokens than bytes, and an image of a size that was not counted
    has few more than the largest count. Where a family's counts jump by more, a row that is too long is refused only
    when it is encoded (`untrigger.models.processors.encode`).

    Args:
        prompts_only: check the prompt without the last answer, as for generation; by default whole rows, as for
            training.
    """

    def __init__(self, processor: ProcessorMixin, *, prompts_only: bool = False) -> None:
        self._processor, self._prompts_only, self._collate = processor, prompts_only, ChatCollator(processor)
        self._limit, self._image_bound = max_tokens(processor), _MAX_IMAGE_TOKENS
        self._reserved = reserved_tokens(processor)
        self._image_tokens: dict[Size, int] = {}  # of an image of this size
        self._refused: dict[Size, str] = {}  # why the processor does not take an image of this size
        self._hardest: list[Size] = []  # of the sizes that it takes, those that are no easier than another one
        self._largest = 0  # pixels of the largest image that it takes
        self._template_tokens = lru_cache(1024)(self._count_template_tokens)

    def __call__(self, row: Sample, sizes: Sequence[Size]) -> None:
        """Check a row, from the cheapest bound to the exact count.

        Raises:
            InputError: the processor does not take the row.
        """
        if refusal := image_count_refusal(self._processor, len(sizes)):
            raise InputError(refusal)
        messages = row.messages
        if self._prompts_only and messages and messages[-1].role == "assistant":
            messages = messages[:-1]
        for turn in messages:
            self._check_text(turn.text)
        for size in sizes:
            self._check_image(size)
        turns = tuple((turn.role, turn.text.count(IMAGE_TAG), bool(_words(turn.text))) for turn in messages)
        images = sum(self._image_tokens.get(size, self._image_bound) for size in sizes)
        without_text = self._template_tokens(turns) + images + _SEAM * len(turns)
        joined = "\n".join(turn.text for turn in messages)
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

    # --- texts ------------------------------------------------------------------------------------

    def _check_text(self, text: str) -> None:
        # without its tags, because a template may move the images and so join what stands around them
        if match := self._reserved.search(_words(text)):
            raise InputError(f"holds {quote(match[0])}, a token of the model; take it out")

    def _count_template_tokens(self, turns: tuple[Turn, ...]) -> int:
        """Tokens that the chat template adds around the texts of such turns."""
        messages = tuple(Message(role, IMAGE_TAG * images + "x" * has_text) for role, images, has_text in turns)
        return text_tokens(self._processor, self._render(Sample("", (), messages)))

    def _render(self, row: Sample) -> str:
        if self._prompts_only:
            return render_chat(self._processor, prompt_messages(row), add_generation_prompt=True)
        return self._collate.render([chat_message(turn) for turn in row.messages])[0]

    # --- images -----------------------------------------------------------------------------------

    def _check_image(self, size: Size) -> None:
        """Let the processor judge a size, unless it takes a harder one.

        Processors refuse an image for its shape (too narrow, as in the Qwen family), for a side that is too short, or
        for its area: each rule is a bound on one of these. So a size is taken if the processor takes one that is as
        narrow, with a short side as short, and if it takes one with as many pixels. Few sizes of a data set are harder
        than all before, so few are put to the processor, however many there are.
        """
        if size in self._refused:
            raise InputError(self._refused[size])
        if size in self._image_tokens or self._is_easy(size):
            return
        try:
            self._count_image(size)
        except InputError as error:
            self._refused[size] = str(error)
            raise

    def _is_easy(self, size: Size) -> bool:
        width, height = size
        return width * height <= self._largest and any(_is_easier(size, other) for other in self._hardest)

    def _count_image(self, size: Size) -> int:
        """Tokens of an image of this size."""
        if size not in self._image_tokens:
            message = chat_message(Message("user", f"{IMAGE_TAG}\nx"))
            text = render_chat(self._processor, [message], add_generation_prompt=True)
            self._image_tokens[size] = self._count(text, [size]) - text_tokens(self._processor, text)
            if not self._is_easy(size):
                self._hardest = [size, *(other for other in self._hardest if not _is_easier(other, size))]
                self._largest = max(self._largest, size[0] * size[1])
            if len(self._image_tokens) >= _MAX_SIZES:
                # where the counts differ, those of other sizes may be a little above them: sides are rounded, and a
                # shape between two others may get more tiles
                most, least = max(self._image_tokens.values()), min(self._image_tokens.values())
                self._image_bound = 2 * most - least
        return self._image_tokens[size]

    def _count(self, text: str, sizes: Sequence[Size]) -> int:
        """Tokens of a rendered text with blank images of these sizes."""
        blank = [Image.new("RGB", size) for size in sizes]
        try:
            return len(tokenize(self._processor, [text], [blank])["input_ids"][0])
        except Exception as error:  # whatever a processor raises about a size
            shapes = ", ".join(f"{width} x {height}" for width, height in sizes)
            what = f"image{'s' * (len(sizes) > 1)} of {shapes} pixels"
            raise InputError(f"the model's processor takes no {what} ({first_line(error)}); take the row out") from None


def _words(text: str) -> str:
    """A turn's text without its image tags, joined as `chat_message` cuts it."""
    return "".join(part.strip() for part in text.split(IMAGE_TAG))


def _is_easier(size: Size, other: Size) -> bool:
    """Whether an image is no narrower than the other, turned the same way, and its short side no shorter."""
    (width, height), (other_width, other_height) = size, other
    if width == height:
        return width >= min(other)
    if (width > height) != (other_width > other_height):
        return False
    return min(size) >= min(other) and max(size) * min(other) <= max(other) * min(size)
