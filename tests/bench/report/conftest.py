from __future__ import annotations

from pathlib import Path

import pytest
from fabricated import Bench, fill


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    root = tmp_path / "results"
    root.mkdir()
    return Bench(root)


@pytest.fixture
def full(bench: Bench) -> Bench:
    return fill(bench)
