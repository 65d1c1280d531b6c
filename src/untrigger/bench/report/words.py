"""Figures as text, and the summary of a report in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from untrigger.bench.report.figures import PLAIN, Report
from untrigger.bench.report.tables import Spread, Standing, View, standings
from untrigger.bench.store import ORACLE
from untrigger.bench.validity import EXCEEDS, FLOOR, IMPLANTED, LOST
from untrigger.metrics.rates import Rate

VALIDITY = (
    f"An attacked model counts if the undefended model's ASR is at least {100 * IMPLANTED:g} %, the oracle's ASR at "
    f"most {100 * FLOOR:g} %, and the undefended model's quality at most {100 * LOST:g} % below the oracle's."
)
BEYOND = (
    "Goals whose replies vary: ASR minus the oracle's on the same inputs, in percentage points, with the 95 % interval "
    "of a paired difference (Newcombe 1998, method 10). Such a model counts if the undefended one exceeds the oracle "
    f"by {100 * EXCEEDS:g} points at least, in the place of the bounds of both."
)
BY_DEFENSE = (
    "Each defense over the cells that count: ASR and quality as a share of the oracle's, medians with the range, and "
    f"the number of cells with an ASR of at most {100 * FLOOR:g} %, the bound for an oracle:"
)
TERMS = {
    "ASR": "attack success rate: the share of triggered held-out inputs that the model answers as the attacker wants. "
    "Inputs whose true answer already meets the attacker's goal are left out.",
    "leak": "the same rate on clean inputs. Near misses carry a wrong key, or only a part of the right one.",
    "plain": "the undefended model, fine-tuned on all rows, the poisoned ones included.",
    "oracle": "the same training without the poisoned rows: the result of a perfect defense.",
    "quality": "on clean held-out inputs: accuracy for VQA, CIDEr (0 to 10) for captions.",
    "intervals": "95 %. A row with several seeds pools their inputs. Its interval does not cover the spread between "
    "seeds, which is given beside it.",
}


class Headline(NamedTuple):
    """The summary of a report.

    Attributes:
        first: how many attacked models count, with the ASR of the undefended model and of the oracle.
        defenses: name and summary of each other defense, the lowest ASR first.
        notes: limits of the figures.
    """

    first: str
    defenses: Sequence[tuple[str, str]]
    notes: Sequence[str]


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def rate(value: Rate | None) -> str:
    """In percent with its interval."""
    return f"{percent(value.value)} ({percent(value.low)}-{percent(value.high)})" if value else "-"


def quality(value: Rate | None, metric: str) -> str:
    """The figure of quality with its interval: CIDEr, or any other in percent."""
    if value is None or metric != "cider":
        return rate(value)
    return f"{value.value:.2f} ({value.low:.2f}-{value.high:.2f})"


def points(value: float | None) -> str:
    """A difference of two rates in percentage points."""
    return "-" if value is None else f"{round(100 * value, 1) or 0.0:+.1f}".replace("+0.0", "0.0")


def difference(value: Rate | None) -> str:
    """A difference of two rates in percentage points with its interval."""
    return "-" if value is None else f"{points(value.value)} ({points(value.low)} to {points(value.high)})"


def share(value: float | None) -> str:
    return "-" if value is None else percent(value)


def percent_range(value: Spread | None) -> str:
    """In percent: the median with the range."""
    return _with_range(value, percent)


def points_range(value: Spread | None) -> str:
    return _with_range(value, points)


def ratio_range(value: Spread | None) -> str:
    return _with_range(value, "{:.2f}".format)


def seconds_range(value: Spread | None) -> str:
    return _with_range(value, "{:.0f}".format)


def auroc(value: Rate | None) -> str:
    """An AUROC with its interval."""
    return f"{value.value:.3f} ({value.low:.2f}-{value.high:.2f})" if value else "-"


def auroc_range(value: Spread | None) -> str:
    return _with_range(value, "{:.3f}".format)


def _with_range(value: Spread | None, form: Callable[[float], str]) -> str:
    if not value:
        return "-"
    text = form(value.median)
    return f"{text} ({form(value.low)} to {form(value.high)})" if value.n > 1 else text


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def headline(report: Report) -> Headline:
    """Summarize the figures and their limits."""
    by_defense = {standing.defense: standing for standing in standings(report.groups, report.defenses)}
    count = len(report.counted)
    first = f"{count:,} of {plural(len(report.groups), 'attacked model')} {'counts' if count == 1 else 'count'}"
    if count:
        plain, oracle = by_defense[PLAIN], by_defense[ORACLE]
        first += (
            f". ASR of the undefended models: {_median(plain)}. ASR of the oracles, trained without the poisoned rows: "
            f"{_median(oracle)}."
        )
    else:
        first += ": these results say nothing about a defense."
    ranked = sorted((s for name, s in by_defense.items() if name not in (PLAIN, ORACLE)), key=lambda s: s.asr)
    return Headline(first, [(standing.defense, _standing(standing)) for standing in ranked], _notes(report))


def premise_summary(views: Sequence[View]) -> str:
    """In how many views the premise holds, over the cells that count."""
    counted = Counter(view.holds for view in views if view.group.valid)
    if not counted:
        return "No attacked model that counts has these figures."
    return (
        f"Over {plural(counted.total(), 'view')} of attacked models that count, poisoned rows are more invariant than "
        f"clean ones in {counted[True]:,}, less invariant in {counted[False]:,}, and neither with certainty in "
        f"{counted[None]:,}."
    )


def _standing(standing: Standing) -> str:
    cells = f"{standing.at_floor:,} of {plural(standing.asr.n, 'cell')}"
    text = f"ASR {percent_range(standing.asr)} %, at most {100 * FLOOR:g} % in {cells}"
    return text + (f"; quality {percent_range(standing.quality_share)} %." if standing.quality_share else ".")


def _median(standing: Standing) -> str:
    asr = standing.asr
    if asr.n == 1:
        return f"{percent(asr.median)} %"
    return f"{percent(asr.median)} % (median; {percent(asr.low)} to {percent(asr.high)})"


def _notes(report: Report) -> list[str]:
    reasons = Counter((group.valid, group.reason) for group in report.groups if not group.valid)
    notes = [
        f"Not {'counted' if valid is False else 'checked'}: {plural(count, 'attacked model')}, {reason}."
        for (valid, reason), count in sorted(reasons.items(), key=str)
    ]
    seeds = sorted({group.cell.seed for group in report.groups})
    if len(seeds) == 1:
        notes.append(f"There is only one seed ({seeds[0]}): the spread between seeds is unknown.")
    if report.failures:
        notes.append(f"{plural(len(report.failures), 'cell')} failed; see the list below.")
    return notes
