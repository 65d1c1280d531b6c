"""The part of the wheel's metadata that follows from the repository's address: project URLs, and the README's links.

The README links to its neighbors, which works in the repository but not on a package index, where it is the long
description. The address is in one place, ``[tool.hatch.metadata.hooks.custom]`` of pyproject.toml. As long as it is
empty there are no project URLs, and the long description has the words of these links without their targets.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_RELATIVE = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?![a-z]+:|#)(?P<path>[^)\s]+)\)")


def project_urls(repository: str) -> dict[str, str]:
    """The links that an index shows beside the package; none without an address."""
    if not repository:
        return {}
    return {
        "Homepage": repository,
        "Documentation": f"{repository}/blob/main/docs/tutorial.md",
        "Changelog": f"{repository}/blob/main/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }


def long_description(readme: str, repository: str) -> str:
    """The README without relative links: they lead into the repository, or without an address lose their target."""

    def absolute(link: re.Match[str]) -> str:
        picture, text, path = link["picture"], link["text"], link["path"]
        if not repository:
            return "" if picture else text
        return f"{picture}[{text}]({repository}/{'raw' if picture else 'blob'}/main/{path})"

    return _RELATIVE.sub(absolute, readme)


class RepositoryHook(MetadataHookInterface):
    """Fills in the dynamic fields ``readme`` and ``urls``."""

    def update(self, metadata: dict[str, Any]) -> None:
        repository = self.config["repository"]
        readme = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": long_description(readme, repository)}
        metadata["urls"] = project_urls(repository)
