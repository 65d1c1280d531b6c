"""The bench through the command line: killed at any moment or run on a cluster, its figures are the same."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from untrigger.bench import store
from untrigger.bench.plan import read_plan
from untrigger.bench.store import Cell

SMOKE = Path(__file__).parents[2] / "plans" / "smoke.yaml"
KILLS = 3


def bench(plan: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "untrigger", "bench", str(plan), "--out", str(out), *more])


def figures(root: Path, cells: Iterable[Cell]) -> dict[str, Mapping[str, Any]]:
    """All that must not change: not the clock, and not the machine."""
    metrics_of = {cell.name: store.find(root, cell) for cell in cells}
    assert all(metrics_of.values()), [name for name, metrics in metrics_of.items() if metrics is None]
    return {
        name: {key: value for key, value in (metrics or {}).items() if key not in ("seconds", "machine")}
        for name, metrics in metrics_of.items()
    }


def narrowed(folder: Path, **fields: object) -> Path:
    """The smoke plan with these fields replaced; the whole plan has every attack under every defense."""
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(SMOKE.read_text()) | fields))
    return path


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One attack under every defense."""
    return narrowed(tmp_path_factory.mktemp("part"), attacks=["badnets"])


@pytest.fixture(scope="module")
def killed(part: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of ``part``, killed at random moments and started again each time."""
    out = tmp_path_factory.mktemp("killed")
    cells = read_plan(part)
    for kill in range(KILLS):
        process = bench(part, out, "--jobs", "2")
        missing = len(store.missing(out, cells))
        while len(store.missing(out, cells)) >= missing and process.poll() is None:
            time.sleep(0.5)  # each start finishes a cell at least, or it would be no more than a late start
        time.sleep(random.uniform(0, 6))
        assert process.poll() is None, f"it ended before kill {kill + 1}"
        process.kill()
        process.wait()
    assert bench(part, out, "--jobs", "2").wait() == 0
    return out


@pytest.mark.slow
def test_every_attack_runs(tmp_path: Path) -> None:
    plan, out = narrowed(tmp_path, defenses=["plain"]), tmp_path / "results"
    assert bench(plan, out, "--jobs", "2").wait() == 0
    assert store.missing(out, read_plan(plan)) == []


@pytest.mark.slow
def test_every_defense_runs_in_spite_of_kills(killed: Path, part: Path) -> None:
    assert store.missing(killed, read_plan(part)) == []
    assert not list(killed.glob("*/error.txt"))


@pytest.mark.slow
def test_a_kill_changes_no_figure(killed: Path, part: Path, tmp_path: Path) -> None:
    assert bench(part, tmp_path, "--jobs", "2").wait() == 0
    cells = read_plan(part)
    assert figures(tmp_path, cells) == figures(killed, cells)


@pytest.mark.slow
def test_a_cluster_changes_no_figure(killed: Path, part: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    assert bench(part, tmp_path, "--ray").wait() == 0
    cells = read_plan(part)
    assert figures(tmp_path, cells) == figures(killed, cells)


@pytest.mark.slow
def test_the_report_shows_it_all(killed: Path, part: Path, tmp_path: Path) -> None:
    for name in ("report.html", "report.md", "report.json"):
        words = [sys.executable, "-m", "untrigger", "report", str(killed), "--out", str(tmp_path / name)]
        assert subprocess.run(words).returncode == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["cells"]) == len(read_plan(part))
