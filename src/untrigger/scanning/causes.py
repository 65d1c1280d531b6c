"""Suspected rows that share no text: what they share that harms other rows, where it lies, and how many are honest.

`untrigger.defenses.SharedCause` has measured the harm. docs/paper.md has the equations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from untrigger.defenses.harm import Harm, means_by_suspect
from untrigger.models.grafted_rows import Place, Places
from untrigger.models.scoring import TokenScores
from untrigger.rows.sample import LazyRows, Sample
from untrigger.scanning.cues import Cue, cell_losses, covered, log_odds, windows
from untrigger.scanning.findings import Effect, Target
from untrigger.views.grafts import KINDS, mean_image, moved
from untrigger.views.patches import to_rgb


def target_of(rows: Sequence[int], placed: Sequence[Places], harm: Harm) -> Target:
    """The target of rows that share no text; the prompt counts if its words were needed to do harm."""
    p_values = list(zip(harm.kinds, harm.p_values, strict=True))
    with_words = min((p for kind, p in p_values if KINDS[kind]), default=None)
    return Target("", min(harm.p_values), list(rows), min(harm.p_values), with_words, placed)


def honest_share(strengths: NDArray[np.floating]) -> float:
    """Estimated share of honest rows among suspects, in (0, 1].

    Honest suspects show what all suspects share as controls do, by chance: half of them less than the median control.
    So there are twice as many honest rows as rows that show less, one added.

    Args:
        strengths: how much each suspect shows, and its control, [n, 2] (`strengths_in_images`, `strengths_in_words`).
    """
    less = int((strengths[:, 0] <= np.median(strengths[:, 1])).sum())
    return min(1.0, (1 + 2 * less) / len(strengths))


def strengths_in_images(rows: Sequence[Sample], harm: Harm, placed: Sequence[Places]) -> NDArray[np.floating]:
    """How much of what suspects' images share lies in each tested suspect's first image, and in its control's, [n, 2].

    That is the inner product with the mean of the other suspects that show the same pattern, each moved back from its
    place. The mean of the hosts is the origin. A control stands where its suspect shows the pattern.
    """
    controls = {c.suspect: c.control for c in harm.comparisons}
    size = rows[next(iter(controls))].images[0].size
    origin = mean_image((rows[row].images[0] for row in sorted({c.host for c in harm.comparisons})), size)

    def levels(row: int, place: Place) -> NDArray[np.float32]:
        return moved(mean_image(rows[row].images[:1], size) - origin, -place.down, -place.right).ravel()

    strengths: list[tuple[float, float]] = []
    for places in ({row: each[row] for row in sorted(each) if row in controls} for each in placed):
        own = {row: levels(row, place) for row, place in places.items()}
        total = np.sum(list(own.values()), axis=0)
        for row, place in places.items():
            of_others = float(own[row] @ (total - own[row])) / max(len(own) - 1, 1)
            strengths.append((of_others, float(levels(controls[row], place) @ total) / len(own)))
    return np.array(strengths)


def strengths_in_words(harm: Harm) -> NDArray[np.floating]:
    """How much harm each suspect's words do, and a control's, [n, 2]: the mean over its hosts and the kinds."""
    suspects = np.array([c.suspect for c in harm.comparisons])
    damage = harm.before - harm.after
    return np.stack([means_by_suspect(damage[..., at], suspects).mean(axis=0) for at in (0, 1)], axis=1)


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
