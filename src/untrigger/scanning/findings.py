"""What a scan found, for programs and in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray
from rich.jupyter import JupyterMixin
from rich.table import Table
from rich.text import Text

from untrigger.dataframes import frame
from untrigger.scanning.cues import GRID, Cue

if TYPE_CHECKING:
    from pandas import DataFrame

_SURE = 1e-3  # chance, below which image or prompt is said to have a part in it
_WORTH = 0.5  # nats, on average, below which a cell or a word is not named
_SHOWN = 12  # targets on one screen


@final
@dataclass(frozen=True)
class Target:
    """Something that rows are suspected of teaching.

    text: what the rows share, around the word that gives them away. chance: how likely so many rows would share that
    word if they were honest, corrected for the number of words. rows: their numbers, the most suspicious first.
    image, prompt: how likely as many rows would lose the words without their image, or their prompt, if these had
    no part in it (a one-sided sign test on rows that the probe has not seen); None where it cannot be asked.
    """

    text: str
    chance: float
    rows: list[int]
    image: float | None
    prompt: float | None


@final
@dataclass(frozen=True)
class Verdict:
    """What is told of one row.

    row: its number, from 1, as it stands in its file; id: its own. score: the higher, the more suspicious. target:
    number of the target that the row is suspected of, or None. fdr: estimated share of honest rows among those of its
    target that are at least as suspicious; None without target. doubted: its doubted words, as text. cue: what they
    hang on, of the rows that were probed.
    """

    row: int
    id: str
    score: float
    target: int | None = None
    fdr: float | None = None
    flagged_tokens: str = ""
    cue: Cue | None = None


@final
@dataclass(frozen=True, repr=False)
class Findings(JupyterMixin):
    """Of each row its verdict, in the order of the data; and what was found, the most rows first."""

    verdicts: list[Verdict]
    targets: list[Target]

    @property
    def suspected(self) -> list[int]:
        """Row numbers, from 0, the most suspicious first."""
        rows = (row for row, verdict in enumerate(self.verdicts) if verdict.target is not None)
        return sorted(rows, key=lambda row: -self.verdicts[row].score)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A dictionary for each row, in the order of the data.

        ``row`` from 1, as it stands in its file; ``id``; ``suspected``; ``score``; ``target``, what it is suspected of
        teaching; ``fdr``; ``doubted`` words; ``image_cue`` and ``prompt_cue``, the nats that these lose with another's
        image or prompt.
        """
        return [self.told(verdict) for verdict in self.verdicts]

    def to_pandas(self) -> DataFrame:
        """The same (`rows`) as a frame."""
        return frame(self.rows)

    def told(self, verdict: Verdict) -> dict[str, Any]:
        """The dictionary of one row (`rows`)."""
        cue, target = verdict.cue, verdict.target
        return {
            "row": verdict.row,
            "id": verdict.id,
            "suspected": target is not None,
            "score": round(verdict.score, 4),
            "target": self.targets[target].text if target is not None else None,
            "fdr": verdict.fdr,
            "flagged_tokens": verdict.flagged_tokens,
            "image_cue": rounded(cue.image) if cue else None,
            "prompt_cue": rounded(cue.prompt) if cue else None,
        }

    def __repr__(self) -> str:
        found = f"{len(self.targets)} target{'s' * (len(self.targets) != 1)} found"
        lines = [f"Findings: {len(self.verdicts):,} rows, {found if self.targets else 'nothing found'}"]
        lines += [f"  {target.text!r} in {self._share(target)}: {place(self, target)}" for target in self._first]
        return "\n".join([*lines, *self._more])

    def __rich__(self) -> Table:
        title = f"{len(self.suspected):,} of {len(self.verdicts):,} rows are suspected"
        table = Table("they say", "where", "chance", "it hangs on", title=title, caption="\n".join(self._more))
        for target in self._first:
            cells = repr(target.text), self._share(target), chance(target.chance)
            table.add_row(*map(Text, (*cells, place(self, target))))
        return table

    @property
    def _first(self) -> list[Target]:
        return self.targets[:_SHOWN]

    @property
    def _more(self) -> list[str]:
        return [f"  and {len(self.targets) - _SHOWN:,} more"] * (len(self.targets) > _SHOWN)

    def _share(self, target: Target) -> str:
        return f"{len(target.rows):,} rows ({100 * len(target.rows) / len(self.verdicts):.1f} %)"


def rounded(nats: float | None) -> float | None:
    return None if nats is None else round(nats, 3)


def place(findings: Findings, target: Target) -> str:
    """Where the cue of a target lies, in words."""
    found = [cue for row in target.rows if (cue := findings.verdicts[row].cue)]
    parts = []
    if target.image is not None and target.image < _SURE:
        parts.append(_area(np.mean([cue.cells[0] for cue in found if cue.cells], axis=0)))
    if target.prompt is not None and target.prompt < _SURE:
        parts.append(_wording([cue.words for cue in found]))
    return " and ".join(parts) or "no cue seen"


def _area(cells: NDArray[np.floating]) -> str:
    hot = np.argwhere(cells >= max(_WORTH, cells.max() / 2))
    if not len(hot) or len(hot) > GRID * GRID / 4:
        return "the image, no one place in it"
    y, x = (hot.mean(axis=0) + 0.5) / GRID
    row = "top" if y < 1 / 3 else "bottom" if y > 2 / 3 else "middle"
    column = "left" if x < 1 / 3 else "right" if x > 2 / 3 else "center"
    return f"the image, {row} {column} ({len(hot)} of {GRID * GRID} cells)"


def _wording(prompts: Sequence[Sequence[tuple[str, float]]]) -> str:
    lost: dict[str, list[float]] = {}
    for word, nats in (pair for prompt in prompts for pair in prompt):
        lost.setdefault(word, []).append(nats)
    # a word of few prompts is no trigger: what counts is what it does over all of them
    worth = {word: sum(nats) / len(prompts) for word, nats in lost.items()}
    named = sorted((word for word, nats in worth.items() if nats >= _WORTH), key=lambda word: -worth[word])[:5]
    return f"the prompt ({', '.join(repr(word) for word in named)})" if named else "the prompt, no one word of it"


def chance(value: float) -> str:
    """A probability for people; the smallest numbers mean nothing."""
    return "less than 1e-99" if value < 1e-99 else f"{value:.1g}" if value < 0.01 else f"{value:.2f}"
