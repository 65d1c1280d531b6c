"""The report as one HTML page that loads nothing: it embeds styles, scripts and images."""

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
from untrigger.bench.report.figures import Report, as_rate, number, short_name
from untrigger.bench.report.tables import Detection, View
from untrigger.errors import InputError
from untrigger.html import style, templates

_HERE = Path(__file__).parent
_FILTERS = (
    *(words.auroc, words.auroc_range, words.percent, words.percent_range, words.plural, words.points_range),
    *(words.difference, words.quality, words.rate, words.ratio_range, words.seconds_range, words.share),
    *(as_rate, marked, number, short_name, tables.settings_of),
)


def page(report: Report, results: Sequence[Path]) -> str:
    """Render the page; answers and images come from the folders among ``results``.

    Raises:
        InputError: plotly is not installed, or stored answers or images cannot be read.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise InputError("a report in HTML needs plotly: pip install 'untrigger[report]'") from error
    pictures: dict[str, str] = {}  # data URL -> id: each image is in the page once, however many cells use it
    environment = templates(_HERE)
    filters = cast(dict[str, Any], environment.filters)
    filters |= {function.__name__: function for function in _FILTERS}
    filters["picture"] = lambda url: pictures.setdefault(url, f"picture-{len(pictures)}")
    views = tables.views(report)
    figures = _figures(report, selected := tables.select_views(views))
    scripts = [*([get_plotlyjs()] if figures else []), (_HERE / "page.js").read_text(encoding="utf-8")]
    return environment.get_template("page.html.j2").render(
        _context(report),
        examples={group.anchor: examples(results, group, report.defenses) for group in report.groups},
        pictures=pictures,
        premise_summary=words.premise_summary(views),
        selected_views=selected,
        colors=(charts.CLEAN, charts.POISONED),
        style=style(),
        figures=list(figures),
        # without "<" no text can end the script element
        data=json.dumps(figures, sort_keys=True, ensure_ascii=False).replace("<", "\\u003c"),
        scripts=scripts,
        hashes=[f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" for script in scripts],
    )


def _figures(report: Report, selected: list[View]) -> dict[str, charts.Figure]:
    pareto = charts.pareto(report)
    views = {f"view-{at}": charts.histogram(view) for at, view in enumerate(selected)}
    return {"pareto": pareto, **views} if pareto else views


def _context(report: Report) -> dict[str, Any]:
    """The data of the page's tables."""
    blocks, all_detections = tables.blocks(report), tables.detections(report)
    views: dict[str, dict[str, View]] = defaultdict(dict)
    for view in tables.views(report):
        views[view.group.anchor][view.name] = view
    detections: dict[str, list[Detection]] = defaultdict(list)
    for detection in all_detections:
        detections[detection.group.anchor].append(detection)
    return {
        "report": report,
        "headline": words.headline(report),
        "terms": words.TERMS,
        "validity": words.VALIDITY,
        "by_defense": words.BY_DEFENSE,
        "beyond_words": words.BEYOND,
        "beyond": tables.beyond(blocks, report.defenses),
        "blocks": blocks,
        "standings": [(block.title, tables.standings(block.groups, report.defenses)) for block in blocks],
        "image_uses": tables.image_uses(blocks),
        "costs": tables.costs(report),
        "detection_titles": tables.DETECTION,
        "detectors": tables.detectors(all_detections),
        "detections": detections,
        "views": views,
        "view_names": list(dict.fromkeys(name for names in views.values() for name in names)),
        "environment": tables.environment(report),
    }
