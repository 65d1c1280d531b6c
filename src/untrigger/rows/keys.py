"""Which keys of a row are read, which are harmless, and which are refused.

A key that is silently ignored can hide a picture, a system prompt or a switch for the loss: the row would train as
something else. So every key is read, or is harmless, or is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from datetime import date, time, timedelta
from decimal import Decimal

from untrigger.errors import InputError
from untrigger.rows.images import quote

# Facts about a row that no tool learns from.
_HARMLESS = """
annotator answer_type author categories category class class_name cls comment config created created_at
data_source dataset dataset_name datasource date difficulty domain ds_name extra_info file generator hash idx
image_height image_id image_name image_size image_width index info key lang language level license link md5
meta metadata model model_name name note notes origin question_type quality ref seed sha1 sha256 source split
subset tag tags task task_name task_type timestamp title topic type uid url uuid version
"""
HARMLESS = frozenset(_HARMLESS.split())
_HARMLESS_END = re.compile(
    r"(?:.+_)?(?:date|hash|id|ids|idx|index|lang|language|license|score|source|split|time|version)$"
)

# Numbers and booleans that change what is learned or seen; the values listed change nothing (True is 1).
SWITCHES: Mapping[str, tuple[object, ...]] = {
    **dict.fromkeys(("loss", "loss_scale", "loss_weight", "sample_weight", "train", "weight", "weights"), (1,)),
    **dict.fromkeys(("desirable", "kto_tag"), (1,)),
    **dict.fromkeys(("loss_mask", "mask", "masked", "skip", "ignore"), (0,)),
    **dict.fromkeys(("max_pixels", "min_pixels", "resized_height", "resized_width", "do_resize", "fps", "nframes"), ()),
}
_NUMBER = re.compile(r"[-+]?\d{1,20}(?:\.\d{1,20})?", re.ASCII)
_MEDIA = re.compile(
    r"(?:^|[_-])(?:audios?|speech|videos?|movies?|frames?|voice|sounds?|mp4|avi|mov|mkv|webm|wav|mp3|flac|ogg)(?:$|[_-])"
)
_PICTURE = re.compile(r"image|img|picture|photo|(?:^|_)pics?(?:$|_)|screenshot|figure", re.IGNORECASE)
_MEDIA_FILE = re.compile(
    r"data:(?:image|video|audio)/|.*\.(?:png|jpe?g|webp|gif|bmp|tiff?|mp4|avi|mov|mkv|webm|wav|mp3|flac|ogg)(?:$|[?#])",
    re.IGNORECASE | re.DOTALL,
)


def _leaves(value: object) -> Iterator[object]:
    """The values inside lists and objects at any depth; untrusted data may be nested deeper than Python recurses."""
    stack = [value]
    while stack:
        part = stack.pop()
        if isinstance(part, dict):
            stack += part.values()
        elif isinstance(part, list | tuple):
            stack += part
        else:
            yield part


def is_empty(value: object) -> bool:
    """Whether a value holds nothing: null, or empty strings, lists and objects at any depth."""
    return all(leaf is None or (isinstance(leaf, str | bytes) and not leaf) for leaf in _leaves(value))


def check_keys(
    fields: Mapping[str, object],
    read: Collection[str],
    ignored: Collection[str],
    *,
    what: str = "",
    pictures: bool = True,
) -> None:
    """Check every key of a row, turn or part beside those that are ``read`` or that the user has ``ignored``.

    Args:
        what: names the object in the error line, such as ``"a turn"``; empty for the row itself.
        pictures: whether the row shows a picture. If not, a key that may name one is refused even if it is harmless.

    Raises:
        InputError: keys are not read and may matter; the message names them all.
    """
    unknown: list[str] = []
    label = f"{what} has" if what else "has"
    for name, value in fields.items():
        if name in read or name in ignored or is_empty(value):
            continue
        if name in SWITCHES or (name == "label" and value is False):  # a class may be 0, a bad answer is False
            if value not in SWITCHES.get(name, ()):
                raise InputError(
                    f"{label} {quote(name)} = {quote(str(value))[1:-1]}, which changes what is learned and is not "
                    "read; remove the key, or the row"
                )
        elif _MEDIA.search(name.lower()) and not _is_number(value):
            raise InputError(f"{label} {quote(name)}, and only images are read; remove the row")
        elif not pictures and ((_PICTURE.search(name) and not _is_number(value)) or _names_media(value)):
            raise InputError(f"{label} {quote(name)} but no image that is read; put its images into 'images'")
        elif not _is_number(value) and not (name.lower() in HARMLESS or _HARMLESS_END.match(name.lower())):
            unknown.append(name)
    if unknown:
        names, one = ", ".join(map(quote, unknown[:5])) + ", ..." * (len(unknown) > 5), len(unknown) == 1
        keys = quote(",".join(unknown))[1:-1]
        raise InputError(
            f"{label} {names}, which {'is' if one else 'are'} not read; rename or remove {'it' if one else 'them'}, "
            f"or add --ignore-keys {keys}"
        )


def _is_number(value: object) -> bool:
    """Whether a value is made of numbers, booleans and times alone, such as a box: it holds no text and no media."""
    kinds = (int, float, Decimal, date, time, timedelta)
    return all(
        leaf is None or isinstance(leaf, kinds)
        # in CSV and tar files numbers are texts
        or (isinstance(leaf, str) and bool(_NUMBER.fullmatch(leaf)))
        for leaf in _leaves(value)
    )  # fmt: skip


def _names_media(value: object) -> bool:
    return any(
        isinstance(leaf, bytes) or (isinstance(leaf, str) and len(leaf) < 10_000 and bool(_MEDIA_FILE.match(leaf)))
        for leaf in _leaves(value)
    )
