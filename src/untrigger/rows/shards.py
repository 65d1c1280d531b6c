"""Parquet files that are the parts of one data set, ``train-00000-of-00002.parquet`` and so on: as the hub has them.

Together they go by one name, ``train-*-of-00002.parquet``.
"""

from __future__ import annotations

import re
from pathlib import Path

from untrigger.errors import InputError

_SHARD = re.compile(r"(.+)-([0-9]+)-of-([0-9]+)\.parquet", re.DOTALL)


def whole(name: str) -> str:
    """What a shard is one of, ``train-*-of-00002.parquet``; any other name as it is."""
    shard = _SHARD.fullmatch(name)
    return f"{shard[1]}-*-of-{shard[3]}.parquet" if shard and int(shard[3]) > 1 else name


def shards(path: Path) -> list[Path]:
    """The files of such a whole, in their order; none if there is none of them.

    Raises:
        InputError: some are there, and not all.
    """
    found = dict[int, Path]()
    for part in sorted(path.parent.glob("*.parquet")):
        shard = _SHARD.fullmatch(part.name)
        if shard and whole(part.name) == path.name:
            found[int(shard[2])] = part
    if not found:
        return []
    begin, _, end = path.name.rpartition("*")
    count = end.removeprefix("-of-").removesuffix(".parquet")
    missing = next((number for number in range(int(count)) if number not in found), None)
    if missing is not None:
        name = f"{begin}{missing:0{len(count)}}{end}"
        raise InputError(f"{path}: {name} is missing, one of {int(count):,} shards; put it beside the others")
    return [found[number] for number in range(int(count))]


def joined(name: str) -> str:
    """The file that they are written as, ``train.parquet``; any other name as it is."""
    return re.sub(r"-\*-of-[0-9]+(?=\.parquet$)", "", name)
