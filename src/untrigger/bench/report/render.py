"""The report: a pure render of a folder of results, as a page, as tables or as figures for a program."""

from __future__ import annotations

import json
from pathlib import Path

from untrigger.errors import InputError
from untrigger.files import write_text

_SUFFIXES = (".html", ".md", ".json")


def write(results: Path, out: Path) -> None:
    """Render ``results`` into the file ``out``, by its ending: ``.html``, ``.md`` or ``.json``.

    The same results give the same bytes. A page also shows the answers and pictures that are kept below ``results``;
    a fresh clone may have the figures alone.

    Raises:
        InputError: another ending, no finished cell below ``results``, or something there that cannot be read.
    """
    if out.suffix not in _SUFFIXES:
        raise InputError(f"{out}: a report ends in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}; rename it")
    try:
        text = _rendered(results, out.suffix)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # a text where a figure belongs, and the like
        raise InputError(
            f"{results}: a metrics.json in it is not as untrigger bench wrote it ({error!r}); delete that cell's "
            "folder, it will run again"
        ) from error
    write_text(out, text)


def _rendered(results: Path, suffix: str) -> str:
    from untrigger.bench.report.figures import as_json, read

    report = read(results)
    if suffix == ".html":
        from untrigger.bench.report.page import page

        return page(report, results)
    if suffix == ".md":
        from untrigger.bench.report.markdown import markdown

        return markdown(report)
    return json.dumps(as_json(report), indent=2, ensure_ascii=False) + "\n"
