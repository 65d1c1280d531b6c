"""Sharded data sets: parquet as on the Hugging Face hub, ``train-00000-of-00002.parquet``, and numbered tar files.

All shards of a split are addressed by one pattern, ``train-*-of-00002.parquet`` or ``train-*.tar``.
"""

from __future__ import annotations

import re
from pathlib import Path

from untrigger.errors import InputError

_SHARD = re.compile(r"(.+)-([0-9]+)-of-([0-9]+)\.parquet", re.DOTALL)
_TAR = re.compile(r"(.*?)([0-9]+)\.tar", re.DOTALL)


def shard_pattern(name: str) -> str:
    """Return the pattern of a shard's split, ``train-*-of-00002.parquet``; return any other name unchanged."""
    shard = _SHARD.fullmatch(name)
    if tar := _TAR.fullmatch(name):
        return f"{tar[1]}*.tar"
    return f"{shard[1]}-*-of-{shard[3]}.parquet" if shard and int(shard[3]) > 1 else name


def shards(path: Path) -> list[Path]:
    """Return the files that match a shard pattern, or another pattern, in order; an empty list if no file matches.

    Raises:
        InputError: some shards are there but not all.
    """
    if path.suffix == ".tar":
        numbered = ((_TAR.fullmatch(part.name), part) for part in path.parent.glob("*.tar"))
        parts = [part for _, part in sorted((int(m[2]), p) for m, p in numbered if m and f"{m[1]}*.tar" == path.name)]
        return parts or sorted(path.parent.glob(path.name))
    parts = dict[int, Path]()
    for part in sorted(path.parent.glob("*.parquet")):
        shard = _SHARD.fullmatch(part.name)
        if shard and shard_pattern(part.name) == path.name:
            parts[int(shard[2])] = part
    if not parts:  # no shards, but files of any names
        return sorted(path.parent.glob(path.name)) if path.suffix == ".parquet" else []
    begin, _, end = path.name.rpartition("*")
    count = end.removeprefix("-of-").removesuffix(".parquet")
    missing = next((number for number in range(int(count)) if number not in parts), None)
    if missing is not None:
        name = f"{begin}{missing:0{len(count)}}{end}"
        raise InputError(f"{path}: {name} is missing, one of {int(count):,} shards; add it to the folder")
    return [parts[number] for number in range(int(count))]


def merged_name(name: str) -> str:
    """Return the single file that a pattern is written as, ``train.parquet``; other names stay unchanged."""
    if name.endswith("*.tar"):
        return f"{name.removesuffix('*.tar').rstrip('-_') or 'data'}.tar"
    name = re.sub(r"-\*-of-[0-9]+(?=\.parquet$)", "", name)
    return "data.parquet" if "*" in name else name
