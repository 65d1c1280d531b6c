"""Pages of HTML that load nothing: how their templates are read, and the style that they share."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def templates(folder: Path) -> Environment:
    """The templates of a folder; what they are given is escaped, and a name that they lack is an error."""
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def style() -> str:
    """Light and dark, for screens of any width."""
    return Path(__file__).with_name("page.css").read_text(encoding="utf-8")
