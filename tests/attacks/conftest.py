"""Fixtures for tests of learned triggers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder for learned results."""
    from untrigger.attacks import _learned

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _learned.learned_cells.cache_clear()
    yield tmp_path / "untrigger"
    _learned.learned_cells.cache_clear()
