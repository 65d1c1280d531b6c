"""Data sets of the Hugging Face hub, fetched by the ``datasets`` library, whose version 4 runs no code of theirs."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from untrigger.errors import InputError
from untrigger.files import cache_folder, new_folder
from untrigger.rows.images import quote

_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?", re.ASCII)


def hub_id(path: Path) -> tuple[str, str | None] | None:
    """``OWNER/NAME`` and the split of ``OWNER/NAME[:SPLIT]``; None where it may be a local path with a typing error."""
    match = _ID.fullmatch(path.as_posix())
    return (match[1], match[2]) if match and not path.parent.exists() else None


def hub_folder(name: str, split: str | None) -> Path:
    """Fetch a split once and return its folder in the cache; without ``split`` the data set must have a single one.

    Raises:
        InputError: ``datasets`` is not installed, the data set cannot be fetched, or has several splits.
    """
    label = f"{name}:{split}" if split else name
    folder = cache_folder() / "hub" / label.replace("/", "--").replace(":", "--")
    if folder.is_dir():
        return folder
    if find_spec("datasets") is None:
        raise InputError(
            f"{label}: no such file or folder; to read it from the Hugging Face hub, pip install 'untrigger[datasets]'"
        )
    import datasets

    try:
        loaded = datasets.load_dataset(name, split=split)
    except Exception as error:  # of the network, the hub, its files: each library below has its own kinds
        reason = quote(str(error).partition("\n")[0])[1:-1] or type(error).__name__
        raise InputError(
            f"{label}: cannot be fetched from the hub ({reason}); check the name and the network"
        ) from None
    if not isinstance(loaded, datasets.Dataset):
        splits = [*map(str, loaded)]
        if len(splits) > 1:
            raise InputError(f"{label}: has the splits {', '.join(splits)}; name one, as {name}:{splits[0]}")
        loaded = loaded[splits[0]]
    with new_folder(folder) as place:
        loaded.save_to_disk(place)  # with the bytes of images, wherever they lay
    return folder
