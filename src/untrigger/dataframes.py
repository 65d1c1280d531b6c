"""Rows of results as pandas frames; pandas is an extra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from untrigger.errors import InputError

if TYPE_CHECKING:
    from pandas import DataFrame


def frame(rows: Sequence[Mapping[str, object]]) -> DataFrame:
    """A frame with a column for each name.

    Raises:
        InputError: pandas is not installed.
    """
    try:
        from pandas import DataFrame
    except ImportError as error:
        raise InputError("a frame needs pandas: pip install 'untrigger[pandas]'") from error
    return DataFrame(rows)
