"""Results as pandas data frames; pandas is an optional extra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from untrigger.errors import InputError

if TYPE_CHECKING:
    from pandas import DataFrame


def frame(rows: Sequence[Mapping[str, object]]) -> DataFrame:
    """Return a data frame with one row per mapping and one column per key.

    Raises:
        InputError: pandas is not installed.
    """
    try:
        from pandas import DataFrame
    except ImportError as error:
        raise InputError("a data frame needs pandas; run: pip install 'untrigger[pandas]'") from error
    return DataFrame(rows)
