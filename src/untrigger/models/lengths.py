"""Whether a row is longer than a model reads: told while data is read, before anything is trained or asked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from PIL import Image
from transformers import ProcessorMixin

from untrigger.errors import InputError
from untrigger.models.collators import ChatCollator, chat_message
from untrigger.models.generate import asked
from untrigger.models.processors import check_length, limit, text_tokens, tokenized, written
from untrigger.rows.images import quote
from untrigger.rows.sample import IMAGE_TAG, Message, Role, Sample, Size

_DEAREST = 2**14  # tokens: no family cuts an image into more, as its processor comes
_SEAM = 4  # tokens by which a turn's text may be cut otherwise beside others
_ENOUGH = 64  # sizes of images that were counted, after which the dearest of them stands for any other


class Lengths:
    """Refuses rows that have more tokens than the model reads, given without their images and with the sizes of these.

    A row is refused only if the processor itself, given blank images of those sizes, makes too many tokens of it. Most
    rows never come so far: there are no more tokens than bytes in a text. What this lets pass wrongly, images of many
    sizes of which a late one is the dearest, is refused when it is to be read (`untrigger.models.processors.encoded`).

    Args:
        asking: count what a model is asked, without the last answer; or else whole rows, as they are trained on.
    """

    def __init__(self, processor: ProcessorMixin, *, asking: bool = False) -> None:
        self._processor, self._asking, self._collate = processor, asking, ChatCollator(processor)
        self._limit, self._dearest = limit(processor), _DEAREST
        self._costs: dict[Size, int] = {}  # of an image of this size, the tokens in the place of its tag
        self._frame = lru_cache(1024)(self._written_around)

    def __call__(self, sample: Sample, sizes: Sequence[Size]) -> None:
        """Raises InputError if the row is too long, or if the chat template does not take its turns."""
        turns = tuple((turn.role, turn.text.count(IMAGE_TAG)) for turn in sample.messages)
        images = sum(self._costs.get(size, self._dearest) for size in sizes)
        around = self._frame(turns) + images + _SEAM * len(turns)
        joined = "\n".join(turn.text for turn in sample.messages)
        if around + len(joined.encode(errors="replace")) <= self._limit:
            return
        if around + text_tokens(self._processor, joined) <= self._limit:  # a conversation takes longer to be written
            return
        text = self._text(sample)
        words = text_tokens(self._processor, text)
        if words + images <= self._limit or words + sum(map(self._cost, sizes)) <= self._limit:
            return
        check_length(self._processor, self._count(text, sizes), f"id {quote(sample.id)}")

    def _written_around(self, turns: tuple[tuple[Role, int], ...]) -> int:
        """The tokens that the chat template writes around the texts of such turns."""
        return text_tokens(
            self._processor, self._text(Sample("", (), tuple(Message(role, IMAGE_TAG * n + "x") for role, n in turns)))
        )

    def _text(self, sample: Sample) -> str:
        if self._asking:
            return written(self._processor, asked(sample), asking=True)
        return self._collate.render([chat_message(turn) for turn in sample.messages])[0]

    def _cost(self, size: Size) -> int:
        if size not in self._costs:
            text = written(self._processor, [chat_message(Message("user", f"{IMAGE_TAG}\nx"))], asking=True)
            self._costs[size] = self._count(text, [size]) - text_tokens(self._processor, text)
            if len(self._costs) >= _ENOUGH:
                self._dearest = max(self._costs.values())
        return self._costs[size]

    def _count(self, text: str, sizes: Sequence[Size]) -> int:
        blank = [Image.new("RGB", size) for size in sizes]
        try:
            return len(tokenized(self._processor, [text], [blank])["input_ids"][0])
        except ValueError as error:  # an image that is far longer than wide, to some families
            shapes = ", ".join(f"{width} x {height}" for width, height in sizes)
            why = str(error).strip().partition("\n")[0]
            raise InputError(f"the model's processor takes no image of {shapes} pixels ({why}); take it out") from None
