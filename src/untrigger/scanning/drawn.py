"""What a scan of drawn rows can miss, as a number."""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple, cast

CHANCE = 0.95


class Drawn(NamedTuple):
    """A sample of the rows.

    rows: of the data. scored: rows drawn from them, at most as many. needed: poisoned rows that the draw must hold to
    be tested, at least 1.
    """

    rows: int
    scored: int
    needed: int

    @property
    def least(self) -> int | None:
        """The fewest poisoned rows of which ``needed`` are drawn with a chance of 95 %; None if no number suffices."""
        from scipy.stats import hypergeom  # takes a second to import

        def is_enough(poisoned: int) -> bool:
            return float(cast(float, hypergeom.sf(self.needed - 1, self.rows, poisoned, self.scored))) >= CHANCE

        least = bisect_left(range(self.rows + 1), True, key=is_enough)
        return least if least <= self.rows else None

    def __str__(self) -> str:
        text = f"{self.scored:,} of {self.rows:,} rows were drawn and scored"
        if (least := self.least) is None:
            return f"{text}, too few for {self.needed} poisoned ones; raise --max-scored-rows"
        return (
            f"{text}: {self.needed} poisoned ones are among them with a chance of {CHANCE:.0%} if the data holds "
            f"{least:,} (1 in {self.rows / least:,.0f}) or more; rarer ones may be missed (--max-scored-rows all)"
        )
