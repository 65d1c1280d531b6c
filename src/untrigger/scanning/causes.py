"""Suspected rows that share no text: which part of them harms other rows, where it lies, and how many are honest.

`untrigger.defenses.SharedCause` has measured the harm. docs/paper.md has the equations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from untrigger.defenses.harm import Harm, means_by_suspect
from untrigger.models.scoring import TokenScores
from untrigger.rows.sample import LazyRows, Sample
from untrigger.scanning.cues import Cue, cell_losses, covered, log_odds, windows
from untrigger.scanning.findings import Effect, Target
from untrigger.views.grafts import KINDS
from untrigger.views.patches import to_rgb


def target_of(rows: Sequence[int], harm: Harm) -> Target:
    """The target of rows that share no text; image and prompt count if a part of them does harm."""
    p_values = [
        min((p for kind, p in zip(harm.kinds, harm.p_values, strict=True) if KINDS[kind][part]), default=None)
        for part in (0, 1)
    ]
    return Target("", min(harm.p_values), list(rows), *p_values)


def honest_share(harm: Harm) -> float:
    """Estimated share of honest rows among those tested, in (0, 1].

    Parts of honest rows do as much harm as controls' parts, more in half of the rows and less in the others. So there
    are twice as many honest rows as rows that do less harm, one added.
    """
    means = means_by_suspect(harm.excess, np.array([c.suspect for c in harm.comparisons])).mean(axis=0)
    return min(1.0, (1 + 2 * int((means <= 0).sum())) / len(means))


def effects_of(harm: Harm) -> dict[int, Effect]:
    """The largest effect of each suspect that was tested; suspects and hosts are positions."""
    differences = harm.after[..., 1] - harm.after[..., 0]
    effects: dict[int, Effect] = {}
    for at in np.argsort(differences, axis=None).tolist():  # the largest is written last
        kind, pair = divmod(at, len(harm.comparisons))
        c, (suspect, control) = harm.comparisons[pair], harm.after[kind, pair].tolist()
        effects[c.suspect] = Effect(harm.kinds[kind], c.host, suspect, control)
    return effects


def maps_of(
    effects: Mapping[int, Effect], rows: Sequence[Sample], tokens: Callable[[Sequence[Sample]], list[TokenScores]]
) -> dict[int, Cue]:
    """Where in its first image each suspect's harmful part lies.

    Windows of the suspect's image are put onto its effect's host, which is scored with its own answer. A cell is worth
    the least that a window with it costs.
    """
    places = [(at, place) for at in effects for place in (None, *windows())]

    def view(number: int) -> Sample:
        at, place = places[number]
        host = rows[effects[at].host]
        if place is None:
            return host
        size = host.images[0].size
        return covered(host, [to_rgb(rows[at].images[0]).resize(size)], 0, *place)

    scores = tokens(LazyRows(range(len(places)), view))
    odds = {key: log_odds(float(row.nll.sum())) for key, row in zip(places, scores, strict=True)}
    losses = {at: {(0, *place): odds[at, None] - odds[at, place] for place in windows()} for at in effects}
    return {at: Cue(None, None, [cell_losses(losses[at], 0)], []) for at in effects}
