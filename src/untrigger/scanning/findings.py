"""The result of a scan: a verdict for each row and the suspected targets, as records and in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, final

import numpy as np
from numpy.typing import NDArray
from rich.jupyter import JupyterMixin
from rich.table import Table
from rich.text import Text

from untrigger.dataframes import frame
from untrigger.models.grafted_rows import Places
from untrigger.scanning.cues import GRID, Cue
from untrigger.scanning.drawn import Drawn

if TYPE_CHECKING:
    from pandas import DataFrame

CUE_P_VALUE = 1e-3  # below it the image or the prompt counts as a part of the cue
_MIN_NATS = 0.5  # mean loss below which a cell or a word is not named
_MAX_TARGETS = 12  # targets on one screen


@final
@dataclass(frozen=True)
class Target:
    """A text that rows are suspected of teaching, or rows whose parts harm other rows' answers.

    Fields:
        text: what the rows' answers share, around the token that flags them; empty if they share none.
        p_value: the chance that so many honest rows share that token, corrected for the number of tokens; without a
            text, that what other rows share does as much harm (`untrigger.defenses.harm.Harm`).
        rows: their indices in the data, from 0, the most suspicious first.
        image_p_value, prompt_p_value: the chance that as many probed rows lose the text without their image, or their
            prompt, if it has no part in the cue: a one-sided sign test on rows that the probe was not trained on.
            Without a text, the p-value of the harm; for the prompt None unless its words were needed for it.
        placed: without a text, for each pattern that the rows share, those that show it, and where each does.
    """

    text: str
    p_value: float
    rows: list[int]
    image_p_value: float | None
    prompt_p_value: float | None
    placed: Sequence[Places] = ()


class Effect(NamedTuple):
    """What the suspected rows share does to another row.

    kind: of graft (`untrigger.views.grafts.KINDS`); words are this row's. host: index of the other row, from 0.
    probability: of the host's own answer with it. control: the same with what as many unsuspected rows share.
    """

    kind: str
    host: int
    probability: float
    control: float


@final
@dataclass(frozen=True, slots=True)
class Verdict:
    """The result for one row.

    Fields:
        row, id: its number in its file, from 1; its id.
        score: the higher, the more suspicious; at least 0.
        target: index of the target that the row is suspected of teaching, or None.
        fdr: estimated share of honest rows among the rows of its target that are at least as suspicious, in (0, 1];
            None without a target.
        flagged_text: its flagged answer tokens, as text.
        cue: what they depend on; without a text, what a host's answer depends on. None if the row was not probed.
        effect: of rows without a common text, the largest that was measured.
    """

    row: int
    id: str
    score: float
    target: int | None = None
    fdr: float | None = None
    flagged_text: str = ""
    cue: Cue | None = None
    effect: Effect | None = None


@final
@dataclass(frozen=True, repr=False)
class Findings(JupyterMixin):
    """The result of a scan.

    Fields:
        verdicts: in the order of the data.
        targets: that with the most rows first.
        drawn: the sample that was scored; None if all rows were.
    """

    verdicts: list[Verdict]
    targets: list[Target]
    drawn: Drawn | None = None

    @property
    def suspected(self) -> list[int]:
        """Indices of the suspected rows, from 0, the most suspicious first."""
        rows = (row for row, verdict in enumerate(self.verdicts) if verdict.target is not None)
        return sorted(rows, key=lambda row: -self.verdicts[row].score)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A dictionary for each row, in the order of the data.

        Keys: ``row``, its number in its file, from 1; ``id``; ``suspected``; ``score``; ``target``, the text that it is
        suspected of teaching, empty if its group shares none; ``fdr``; ``flagged_text``; ``image_cue`` and
        ``prompt_cue``, the nats that the text loses with a donor's image or prompt; ``harmful_part``, ``harmed_row``,
        ``probability``, ``control``: the fields of its `Effect`, the row as its number in its file.
        """
        return [self.record(verdict) for verdict in self.verdicts]

    def to_pandas(self) -> DataFrame:
        """`rows` as a data frame."""
        return frame(self.rows)

    def record(self, verdict: Verdict) -> dict[str, Any]:
        """The dictionary of one row (`rows`)."""
        cue, target, effect = verdict.cue, verdict.target, verdict.effect
        return {
            "row": verdict.row,
            "id": verdict.id,
            "suspected": target is not None,
            "score": round(verdict.score, 4),
            "target": self.targets[target].text if target is not None else None,
            "fdr": verdict.fdr,
            "flagged_text": verdict.flagged_text,
            "image_cue": rounded(cue.image) if cue else None,
            "prompt_cue": rounded(cue.prompt) if cue else None,
            "harmful_part": effect and effect.kind,
            "harmed_row": effect and self.verdicts[effect.host].row,
            "probability": rounded(effect and effect.probability),
            "control": rounded(effect and effect.control),
        }

    def __repr__(self) -> str:
        count = f"{len(self.targets)} target{'s' * (len(self.targets) != 1)} found" if self.targets else "nothing found"
        lines = [f"Findings: {len(self.verdicts):,} rows, {count}"]
        lines += [f"  {shared(target)} in {self._share(target)}: {place(self, target)}" for target in self._first]
        return "\n".join([*lines, *self._more])

    def __rich__(self) -> Table:
        title = f"{len(self.suspected):,} of {len(self.verdicts):,} rows are suspected"
        table = Table("shared text", "rows", "p-value", "cue", title=title, caption="\n".join(self._more))
        for target in self._first:
            cells = shared(target), self._share(target), p_value_text(target.p_value)
            table.add_row(*map(Text, (*cells, place(self, target))))
        return table

    @property
    def _first(self) -> list[Target]:
        return self.targets[:_MAX_TARGETS]

    @property
    def _more(self) -> list[str]:
        rest = len(self.targets) - _MAX_TARGETS
        return [f"  and {rest:,} more"] * (rest > 0) + [f"  {self.drawn}"] * (self.drawn is not None)

    def _share(self, target: Target) -> str:
        return f"{len(target.rows):,} rows ({100 * len(target.rows) / len(self.verdicts):.1f} %)"


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def shared(target: Target) -> str:
    """What the rows of a target share, in words."""
    return repr(target.text) if target.text else "no text"


def in_cue(p_value: float | None) -> bool:
    """Whether the image or the prompt with this p-value (`Target`) counts as a part of the cue."""
    return p_value is not None and p_value < CUE_P_VALUE


def hot(cells: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Which cells of a map count as a part of the cue: those that lose half of the maximum, and 0.5 nats, or more."""
    return cells >= max(_MIN_NATS, cells.max() / 2)


def place(findings: Findings, target: Target) -> str:
    """Where the cue of a target lies, in words."""
    cues = [cue for row in target.rows if (cue := findings.verdicts[row].cue)]
    parts: list[str] = []
    if in_cue(target.image_p_value):
        parts.append(_area(np.mean([cue.cells[0] for cue in cues if cue.cells], axis=0)))
    if in_cue(target.prompt_p_value):
        parts.append(_wording([cue.words for cue in cues]))
    return " and ".join(parts) or "no cue seen"


def _area(cells: NDArray[np.floating]) -> str:
    cue = np.argwhere(hot(cells))
    if not len(cue) or len(cue) > GRID * GRID / 4:
        return "the image, no one place in it"
    y, x = (cue.mean(axis=0) + 0.5) / GRID
    row = "top" if y < 1 / 3 else "bottom" if y > 2 / 3 else "middle"
    column = "left" if x < 1 / 3 else "right" if x > 2 / 3 else "center"
    return f"the image, {row} {column} ({len(cue)} of {GRID * GRID} cells)"


def _wording(prompts: Sequence[Sequence[tuple[str, float]]]) -> str:
    losses: dict[str, list[float]] = {}
    for word, nats in (pair for prompt in prompts for pair in prompt):
        losses.setdefault(word, []).append(nats)
    # the mean is over all prompts: a word that few of them contain is no trigger
    means = {word: sum(nats) / len(prompts) for word, nats in losses.items()}
    named = sorted((word for word, nats in means.items() if nats >= _MIN_NATS), key=lambda word: -means[word])[:5]
    return f"the prompt ({', '.join(repr(word) for word in named)})" if named else "the prompt, no one word of it"


def p_value_text(value: float) -> str:
    """A probability for people; below 1e-99 only the bound is given."""
    return "less than 1e-99" if value < 1e-99 else f"{value:.1g}" if value < 0.01 else f"{value:.2f}"
