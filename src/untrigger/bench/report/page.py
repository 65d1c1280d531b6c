"""The report as one HTML page that loads nothing: styles, scripts and pictures lie within."""

from __future__ import annotations

import json
from base64 import b64encode
from collections import defaultdict
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

from untrigger.bench.report import charts, tables, words
from untrigger.bench.report.examples import examples, marked
from untrigger.bench.report.figures import Report, as_rate, number, shown
from untrigger.bench.report.tables import Detection, View
from untrigger.errors import InputError
from untrigger.html import style, templates

_HERE = Path(__file__).parent
_FILTERS = (
    *(words.area, words.area_over, words.many, words.over, words.percent, words.points_over, words.quality, words.rate),
    *(words.seconds, words.share, words.times, as_rate, marked, number, shown, tables.settings_of),
)


def page(report: Report, results: Sequence[Path]) -> str:
    """The whole page; the answers and pictures that it shows lie in the folders among ``results``.

    Raises:
        InputError: plotly is not installed, or what is kept below ``results`` cannot be read.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise InputError("a report in HTML needs plotly: pip install 'untrigger[report]'") from error
    pictures: dict[str, str] = {}  # address -> name: each is in the page once, though many models are shown it
    made = templates(_HERE)
    filters = cast(dict[str, Any], made.filters)
    filters |= {use.__name__: use for use in _FILTERS}
    filters["picture"] = lambda address: pictures.setdefault(address, f"picture-{len(pictures)}")
    views = tables.views(report)
    figures = _figures(report, picked := tables.chosen(views))
    scripts = [*([get_plotlyjs()] if figures else []), (_HERE / "page.js").read_text(encoding="utf-8")]
    return made.get_template("page.html.j2").render(
        _context(report),
        examples={group.anchor: examples(results, group, report.defenses) for group in report.groups},
        pictures=pictures,
        reading=words.reading(views),
        picked=picked,
        colors=(charts.CLEAN, charts.POISONED),
        style=style(),
        figures=list(figures),
        # JSON that no page takes for the end of its script
        data=json.dumps(figures, sort_keys=True, ensure_ascii=False).replace("<", "\\u003c"),
        scripts=scripts,
        hashes=[f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" for script in scripts],
    )


def _figures(report: Report, picked: list[View]) -> dict[str, charts.Figure]:
    pareto = charts.pareto(report)
    views = {f"view-{at}": charts.histogram(view) for at, view in enumerate(picked)}
    return {"pareto": pareto, **views} if pareto else views


def _context(report: Report) -> dict[str, Any]:
    """What the page's tables hold."""
    blocks, found = tables.blocks(report), tables.detections(report)
    views: dict[str, dict[str, View]] = defaultdict(dict)
    for view in tables.views(report):
        views[view.group.anchor][view.name] = view
    detections: dict[str, list[Detection]] = defaultdict(list)
    for each in found:
        detections[each.group.anchor].append(each)
    return {
        "report": report,
        "headline": words.headline(report),
        "terms": words.TERMS,
        "gates": words.GATES,
        "by_defense": words.BY_DEFENSE,
        "blocks": blocks,
        "standings": [(block.title, tables.standings(block.groups, report.defenses)) for block in blocks],
        "sights": tables.sights(blocks),
        "costs": tables.costs(report),
        "detection": tables.DETECTION,
        "detectors": tables.detectors(found),
        "detections": detections,
        "views": views,
        "view_names": list(dict.fromkeys(name for of in views.values() for name in of)),
        "environment": tables.environment(report),
    }
