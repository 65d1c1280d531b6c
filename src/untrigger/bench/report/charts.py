"""The charts of the report as plotly figures; the page sets the colors of text and background."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from html import escape
from typing import Any

from untrigger.bench.report.figures import PLAIN, AttackGroup, Report, short_name
from untrigger.bench.report.tables import View
from untrigger.bench.report.words import percent, rate
from untrigger.bench.store import ORACLE
from untrigger.bench.validity import FLOOR

# Distinct on white and on near black, and by shape too. The first two are for the undefended model and the oracle.
COLORS = ("#d9480f", "#2b8a3e", "#1c7ed6", "#a33fc0", "#a87b00", "#0c8599", "#c92a6b", "#74797f", "#5c6bf0", "#96683a")
_SHAPES = ("x", "star", "circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon", "hexagon", "cross")
CLEAN, POISONED = COLORS[2], COLORS[0]  # colors of rows
_GRAY = COLORS[7]

Figure = dict[str, Any]


def pareto(report: Report) -> Figure | None:
    """Quality over ASR, a point for each cell that counts; None if none does."""
    tested = [name for name in report.defenses if name not in (PLAIN, ORACLE)]
    traces: list[Figure] = []
    for at, name in enumerate((PLAIN, ORACLE, *tested)):
        groups = [g for g in report.counted if name in g.results and g.quality_share(name) is not None]
        shape, again = _SHAPES[at % len(_SHAPES)], at >= len(_SHAPES)
        trace = {
            "type": "scatter",
            "mode": "markers",
            "name": escape(name),
            "x": [round(100 * group.asr(name).value, 2) for group in groups],
            "y": [round(100 * (group.quality_share(name) or 0.0), 2) for group in groups],
            "text": [_hover(group, name) for group in groups],
            "hoverinfo": "text",
            "marker": {
                "color": COLORS[at % len(COLORS)],
                "symbol": shape + "-open" * again,
                "size": 9,
                "opacity": 0.8,
            },
        }
        traces += [trace] if groups else []
    layout: Figure = _layout("ASR, %", "quality, % of the oracle's", 500) | {
        "showlegend": True,
        "hovermode": "closest",
        "legend": {"orientation": "h", "y": -0.18, "yanchor": "top", "x": 0},
        "shapes": [
            {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": 100 * FLOOR, "x1": 100 * FLOOR}
            | {"line": {"dash": "dot", "width": 1, "color": _GRAY}}
        ],
    }
    layout["xaxis"] |= {"range": [-4, 104]}
    return {"data": traces, "layout": layout} if traces else None


def histogram(view: View) -> Figure:
    """Shares of clean and of poisoned rows in bins of the divergence between the answers to image and view."""
    traces: list[Figure] = []
    for name, counts, color in (("clean", view.clean, CLEAN), ("poisoned", view.poisoned, POISONED)):
        rows = max(1, sum(counts))
        traces.append(
            {
                "type": "bar",
                "name": name,
                "x": [at + 0.5 for at in range(len(counts))],
                "y": [round(100 * count / rows, 2) for count in counts],
                "width": 1,
                "opacity": 0.6,
                "marker": {"color": color, "line": {"width": 0}},
                "text": [
                    f"{name}: {count} of {rows} rows<br>{_bin(view.edges, at)}" for at, count in enumerate(counts)
                ],
                "textposition": "none",
                "hoverinfo": "text",
            }
        )
    layout: Figure = _layout("Jensen-Shannon divergence, nats", "rows, %", 220) | {
        "barmode": "overlay",
        "showlegend": False,
    }
    ticks = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
    layout["xaxis"] |= {
        "tickvals": [_bin_position(view.edges, tick) for tick in ticks],
        "ticktext": [f"{t:g}" for t in ticks],
    }
    layout["xaxis"] |= {"range": [0, len(view.clean)]}
    return {"data": traces, "layout": layout}


def _hover(group: AttackGroup, defense: str) -> str:
    cell = group.cell
    share = percent(group.quality_share(defense) or 0.0)
    attack = f"{short_name(cell.attack)} {100 * cell.rate:g} %"
    where = f"{short_name(cell.model)}, {cell.data}, {attack}, seed {cell.seed}"
    lines = (defense, where, f"ASR {rate(group.asr(defense))} %", f"quality {share} % of the oracle's")
    return "<br>".join(map(escape, lines))


def _layout(x: str, y: str, height: int) -> Figure:
    axis: Figure = {"fixedrange": True, "zeroline": False, "automargin": True}
    return {
        "height": height,
        "margin": {"l": 50, "r": 10, "t": 10, "b": 40},
        "dragmode": False,
        "xaxis": {**axis, "title": {"text": x}},
        "yaxis": {**axis, "title": {"text": y}, "rangemode": "normal"},
    }


def _bin(edges: Sequence[float], at: int) -> str:
    return f"{edges[at]:.2g} to {edges[at + 1]:.2g} nats"


def _bin_position(edges: Sequence[float], value: float) -> float:
    """The position of a divergence on an axis of bins: logarithmic in a bin, linear in the first, which starts at 0."""
    at = min(bisect_right(edges, value), len(edges) - 1) - 1
    low, high = edges[at], edges[at + 1]
    return at + ((value - low) / (high - low) if low <= 0 else math.log(value / low) / math.log(high / low))
