"""Render stored results as an HTML page, Markdown tables or JSON figures, or pack them into one JSONL file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from untrigger.bench import store
from untrigger.errors import InputError
from untrigger.files import write_text

_SUFFIXES = (".html", ".md", ".json", ".jsonl")


def write(results: Sequence[Path], out: Path) -> None:
    """Render ``results`` into the file ``out``.

    The suffix of ``out`` sets the format: ``.html``, ``.md``, ``.json`` or ``.jsonl``. The same results give the same
    bytes. Each of ``results`` is a folder that ``untrigger bench`` wrote, or a JSONL file that this function packed.
    A page also shows the answers and images of a folder; a JSONL file has only figures.

    Raises:
        InputError: unknown suffix, no finished cell in one of ``results``, or a file there that cannot be read.
    """
    if out.suffix not in _SUFFIXES:
        raise InputError(
            f"{out}: the suffix of a report must be {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}; rename it"
        )
    try:
        text = _rendered(results, out.suffix)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # a figure of the wrong type, for example
        raise InputError(
            f"{', '.join(map(str, results))}: the figures of a cell are damaged ({error!r}); "
            "delete that cell's folder or line, and it runs again"
        ) from error
    write_text(out, text)


def _rendered(results: Sequence[Path], suffix: str) -> str:
    from untrigger.bench.report.figures import as_json, read

    report = read(*results)
    if suffix == ".html":
        from untrigger.bench.report.page import page

        return page(report, results)
    if suffix == ".md":
        from untrigger.bench.report.markdown import markdown

        return markdown(report)
    if suffix == ".jsonl":
        return store.packed_text(results)
    return json.dumps(as_json(report), indent=2, ensure_ascii=False) + "\n"
