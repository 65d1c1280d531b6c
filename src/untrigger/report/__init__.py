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
    from untrigger.report.figures import as_json, read

    if out.suffix not in _SUFFIXES:
        raise InputError(f"{out}: a report ends in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}; rename it")
    report = read(results)
    if out.suffix == ".html":
        from untrigger.report.page import page

        text = page(report, results)
    elif out.suffix == ".md":
        from untrigger.report.markdown import markdown

        text = markdown(report)
    else:
        text = json.dumps(as_json(report), indent=2, ensure_ascii=False) + "\n"
    write_text(out, text)
