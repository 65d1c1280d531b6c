"""Figures in words: how each is written on a page, and the headline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from untrigger.bench.report.figures import PLAIN, Report
from untrigger.bench.report.tables import Spread, Standing, View, standings
from untrigger.bench.store import ORACLE
from untrigger.bench.validity import FLOOR, IMPLANTED, LOST
from untrigger.data import Task
from untrigger.metrics.rates import Rate

GATES = (
    f"An attacked model counts where the undefended model's ASR is at least {100 * IMPLANTED:g} %, the oracle's at "
    f"most {100 * FLOOR:g} %, and the undefended model's quality at most {100 * LOST:g} % below the oracle's."
)
BY_DEFENSE = (
    "ASR and the share of the oracle's quality that is kept, medians over the cells that count with the range, and in "
    f"how many the ASR is at most {100 * FLOOR:g} %, as an oracle's must be:"
)
TERMS = {
    "ASR": "attack success rate: the share of triggered held-out inputs that are answered as the attacker wants. "
    "Inputs whose true answer is that already are left out.",
    "leak": "the same on clean inputs. Near misses carry a wrong key, or a part of the right one.",
    "plain": "the undefended model: fine-tuned on the poisoned rows as they are.",
    "oracle": "the same, with the poisoned rows taken out: what a perfect defense would reach.",
    "quality": "on clean held-out inputs: accuracy for VQA, CIDEr (0 to 10) for captions.",
    "intervals": "95 %. Where a row has several seeds the figure is over all their inputs together: its interval tells "
    "nothing of the spread between seeds, which is told beside it.",
}


class Headline(NamedTuple):
    """What the figures say in a sentence, of each defense, and what they do not say."""

    first: str
    defenses: Sequence[tuple[str, str]]
    notes: Sequence[str]


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def rate(of: Rate | None) -> str:
    """In percent with its interval."""
    return f"{percent(of.value)} ({percent(of.low)}-{percent(of.high)})" if of else "-"


def quality(of: Rate | None, task: Task) -> str:
    """Accuracy in percent, or CIDEr, with its interval."""
    return rate(of) if of is None or task == "vqa" else f"{of.value:.2f} ({of.low:.2f}-{of.high:.2f})"


def points(value: float | None) -> str:
    """A difference of two rates in percentage points."""
    return "-" if value is None else f"{round(100 * value, 1) or 0.0:+.1f}".replace("+0.0", "0.0")


def share(value: float | None) -> str:
    return "-" if value is None else percent(value)


def over(of: Spread | None) -> str:
    """In percent: the median with the range."""
    return _with_range(of, percent)


def points_over(of: Spread | None) -> str:
    return _with_range(of, points)


def times(of: Spread | None) -> str:
    return _with_range(of, "{:.2f}".format)


def seconds(of: Spread | None) -> str:
    return _with_range(of, "{:.0f}".format)


def area(of: Rate | None) -> str:
    """An AUROC with its interval."""
    return f"{of.value:.3f} ({of.low:.2f}-{of.high:.2f})" if of else "-"


def area_over(of: Spread | None) -> str:
    return _with_range(of, "{:.3f}".format)


def _with_range(of: Spread | None, form: Callable[[float], str]) -> str:
    if not of:
        return "-"
    return f"{form(of.median)} ({form(of.low)} to {form(of.high)})" if of.n > 1 else form(of.median)


def many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def headline(report: Report) -> Headline:
    """What the figures say, and what they do not."""
    told = {of.defense: of for of in standings(report.groups, report.defenses)}
    count = len(report.counted)
    first = f"{count:,} of {many(len(report.groups), 'attacked model')} {'counts' if count == 1 else 'count'}"
    if count:
        plain, oracle = told[PLAIN], told[ORACLE]
        first += (
            f": {_median(plain)} of triggered inputs are answered as the attacker wants without a defense, "
            f"{_median(oracle)} where the poisoned rows are taken out."
        )
    else:
        first += ": nothing can be said about a defense."
    ranked = sorted((of for name, of in told.items() if name not in (PLAIN, ORACLE)), key=lambda of: of.asr)
    return Headline(first, [(of.defense, _standing(of)) for of in ranked], _notes(report))


def reading(told: Sequence[View]) -> str:
    """Where the premise holds, over the cells that count."""
    counted = Counter(view.holds for view in told if view.group.valid)
    if not counted:
        return "No attacked model that counts was looked at."
    return (
        f"Over {many(counted.total(), 'view')} of attacked models that count, poisoned rows are the more invariant "
        f"ones in {counted[True]:,}, the less invariant ones in {counted[False]:,}, and neither for certain in "
        f"{counted[None]:,}."
    )


def _standing(of: Standing) -> str:
    text = f"ASR {over(of.asr)} %, at most {100 * FLOOR:g} % in {of.near:,} of {many(of.asr.n, 'cell')}"
    return text + (f"; quality {over(of.kept)} %." if of.kept else ".")


def _median(of: Standing) -> str:
    if of.asr.n == 1:
        return f"{percent(of.asr.median)} %"
    return f"{percent(of.asr.median)} % (median; {percent(of.asr.low)} to {percent(of.asr.high)})"


def _notes(report: Report) -> list[str]:
    reasons = Counter((group.valid, group.why) for group in report.groups if not group.valid)
    notes = [
        f"Not {'counted' if valid is False else 'checked'}: {many(count, 'attacked model')}, {why}."
        for (valid, why), count in sorted(reasons.items(), key=str)
    ]
    seeds = sorted({group.cell.seed for group in report.groups})
    if len(seeds) == 1:
        notes.append(f"There is one seed ({seeds[0]}): nothing is said about the spread between seeds.")
    if report.failures:
        notes.append(f"{many(len(report.failures), 'cell')} could not be run; they are listed below.")
    return notes
