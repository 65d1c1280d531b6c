"""Self-contained HTML pages: template loading and the shared style sheet."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def templates(folder: Path) -> Environment:
    """Return a Jinja environment for a folder's templates: values are escaped, an undefined name is an error."""
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def style() -> str:
    """Return the shared CSS: light and dark color schemes, screens of any width."""
    return Path(__file__).with_name("html.css").read_text(encoding="utf-8")
