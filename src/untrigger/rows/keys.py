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
annotator answer_type area author categories category channel class class_name cls comment config created created_at
data_source dataset dataset_name datasource date difficulty domain ds_name error_message exif extra_info file
generator hash height idx image_height image_id image_name image_size image_width index info key lang language level
license link md5 meta metadata model model_name name note notes origin question_type quality ref seed sha1 sha256
size source split status subset tag tags task task_name task_type timestamp title topic type uid url uuid version
width
"""
HARMLESS = frozenset(_HARMLESS.split())
_HARMLESS_END = re.compile(
    r"(?:.+_)?(?:date|hash|id|ids|idx|index|lang|language|license|score|source|split|time|version)$"
)

# Numbers and booleans that change what is learned or seen; the values listed change nothing (True is 1).
LOSS_SWITCHES: Mapping[str, tuple[object, ...]] = {
    **dict.fromkeys(("loss", "loss_scale", "loss_weight", "sample_weight", "train", "weight", "weights"), (1,)),
    **dict.fromkeys(("desirable", "kto_tag"), (1,)),
    **dict.fromkeys(("loss_mask", "mask", "masked", "skip", "ignore"), (0,)),
}
_SIGHT_SWITCHES = ("max_pixels", "min_pixels", "resized_height", "resized_width", "do_resize", "fps", "nframes")
SWITCHES: Mapping[str, tuple[object, ...]] = {**LOSS_SWITCHES, **dict.fromkeys(_SIGHT_SWITCHES, ())}
# Keys under which tools look for what is learned: even a number there is an answer.
_LEARNED_TEXT = """
answer answers caption captions choices chosen completion context conversation conversations ground_truth history input
input_ids instruction messages options output prompt query question rejected rejected_response response solution system
system_prompt text texts
"""
_LEARNED = frozenset(_LEARNED_TEXT.split())
_MEDIA = re.compile(
    r"(?:^|[_-])(?:audios?|speech|videos?|movies?|frames?|voice|sounds?|mp4|avi|mov|mkv|webm|wav|mp3|flac|ogg)(?:$|[_-])"
)
_PICTURE = re.compile(r"image|img|picture|photo|(?:^|_)pics?(?:$|_)|screenshot|figure")
_ARRAY = re.compile(r"pixel|(?:^|_)(?:array|tensor|depth|point_?cloud)s?(?:$|_)")
_SWITCH = re.compile(r"(?:^|_)(?:loss|losses|weights?|masks?|masked)(?:$|_)|^(?:train|learn)_on_")
_SOUND_FILE = re.compile(r".*\.(?:mp4|avi|mov|mkv|webm|wav|mp3|flac|ogg)(?:$|[?#])", re.IGNORECASE | re.DOTALL)
_MEDIA_FILE = re.compile(
    r"data:(?:image|video|audio)/|(?:image|video|audio)/(?:png|jpe?g|webp|gif|bmp|tiff|mp4|webm|wav|mpeg)$"
    r"|.*\.(?:png|jpe?g|webp|gif|bmp|tiff?|mp4|avi|mov|mkv|webm|wav|mp3|flac|ogg)(?:$|[?#])",
    re.IGNORECASE | re.DOTALL,
)


def leaves(value: object) -> Iterator[object]:
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
    if not value:  # most values are single ones, and rows are many
        return value is None or isinstance(value, str | bytes | dict | list | tuple)
    if isinstance(value, str | int | float):
        return False
    return all(leaf is None or (isinstance(leaf, str | bytes) and not leaf) for leaf in leaves(value))


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
        low, number = name.lower(), _is_number(value)
        about_picture = number and low in HARMLESS  # its size, and not its pixels
        one_number = number and not isinstance(value, dict | list | tuple)  # several may be a sound or a picture
        if low in SWITCHES or (low == "label" and value is False):  # a class may be 0, a bad answer is False
            if value not in SWITCHES.get(low, ()):
                raise InputError(
                    f"{label} {quote(name)} = {quote(str(value))[1:-1]}, which changes what is learned and is not "
                    "read; remove the key, or the row"
                )
        elif _MEDIA.search(low) and not one_number:
            raise InputError(f"{label} {quote(name)}, and only images are read; remove the row")
        elif not pictures and (_names_media(value) or (_PICTURE.search(low) and not (one_number or about_picture))):
            raise InputError(f"{label} {quote(name)} but no image that is read; put its images into 'images'")
        elif number and not (low in _LEARNED or _SWITCH.search(low) or (_ARRAY.search(low) and not one_number)):
            continue
        elif number or _holds_media(value) or not (low in HARMLESS or _HARMLESS_END.match(low)):
            unknown.append(name)
    if unknown:
        names, one = ", ".join(map(quote, unknown[:5])) + ", ..." * (len(unknown) > 5), len(unknown) == 1
        keys = quote(",".join(unknown))[1:-1]
        raise InputError(
            f"{label} {names}, which {'is' if one else 'are'} not read; rename or remove {'it' if one else 'them'}, "
            f"or add --ignore-keys {keys}"
        )


def is_about_numbers(name: str) -> bool:
    """Whether numbers under a key of a row are harmless whatever they are, so that they need not be read."""
    low = name.lower()
    patterns = (_MEDIA, _PICTURE, _ARRAY, _SWITCH)
    return not (low == "label" or low in _LEARNED or low in SWITCHES or any(each.search(low) for each in patterns))


def _is_number(value: object) -> bool:
    """Whether a value is made of numbers, booleans and times alone, such as a box; a text of digits is a text."""
    kinds = (int, float, Decimal, date, time, timedelta)
    return all(leaf is None or isinstance(leaf, kinds) for leaf in leaves(value))


def _names_media(value: object) -> bool:
    return any(
        isinstance(leaf, bytes) or (isinstance(leaf, str) and len(leaf) < 10_000 and bool(_MEDIA_FILE.match(leaf)))
        for leaf in leaves(value)
    )


def _holds_media(value: object) -> bool:
    """Whether a value holds bytes, a data URI or a video's name; an image's name may tell where the row's is from."""
    return any(
        isinstance(leaf, bytes)
        or (isinstance(leaf, str) and (leaf[:5].lower() == "data:" or bool(_SOUND_FILE.match(leaf[-300:]))))
        for leaf in leaves(value)
    )
