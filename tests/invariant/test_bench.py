"""The bench through the command line: killed at any moment or run on a cluster, its figures are the same."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from untrigger.bench import store
from untrigger.bench.plan import read_plan
from untrigger.bench.store import Cell

SMOKE = Path(__file__).parents[2] / "plans" / "smoke.yaml"
FEW = {"train_rows": 20, "test_rows": 4, "clean_rows": 8, "epochs": 1, "batch_size": 10}  # most of it is imports


def bench(plan: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "untrigger", "bench", str(plan), "--out", str(out), *more])


def figures(root: Path, cells: Iterable[Cell]) -> dict[str, Mapping[str, Any]]:
    """All that must not change: not the clock, and not the machine."""
    found = {cell.name: store.find(root, cell) for cell in cells}
    assert all(found.values()), [name for name, metrics in found.items() if metrics is None]
    return {
        name: {key: value for key, value in (metrics or {}).items() if key not in ("seconds", "machine")}
        for name, metrics in found.items()
    }


def narrowed(folder: Path, **fields: object) -> Path:
    """The smoke plan with few rows and these fields instead: whole, it has every attack under every defense."""
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(SMOKE.read_text()) | {"cell": FEW} | fields))
    return path


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One attack under every defense."""
    return narrowed(tmp_path_factory.mktemp("part"), attacks=["badnets"])


@pytest.fixture(scope="module")
def killed(part: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of ``part``, killed at a random moment after its first cell, and started again."""
    out = tmp_path_factory.mktemp("killed")
    cells = read_plan(part)
    process = bench(part, out)
    while len(store.missing(out, cells)) == len(cells) and process.poll() is None:
        time.sleep(0.5)
    time.sleep(random.uniform(0, 12))
    assert process.poll() is None, "it ended before it was killed"
    process.kill()
    process.wait()
    assert bench(part, out, "--jobs", "2").wait() == 0
    return out


@pytest.mark.slow
def test_every_kind_of_attack_runs(tmp_path: Path) -> None:
    """One that learns its trigger, those of other data and of another goal, and one in the text.

    The rest go the way of badnets, under every defense below.
    """
    kinds = [attack for attack in yaml.safe_load(SMOKE.read_text())["attacks"] if not isinstance(attack, str)]
    attacks = [kind for kind in kinds if kind["attack"] in ("vlood", "vltrojan", "shadowcast")]
    plan, out = narrowed(tmp_path, attacks=[*attacks, "addsent"], defenses=["plain"]), tmp_path / "results"
    assert bench(plan, out).wait() == 0
    assert store.missing(out, read_plan(plan)) == []


@pytest.mark.slow
def test_every_defense_runs_in_spite_of_kills(killed: Path, part: Path) -> None:
    assert store.missing(killed, read_plan(part)) == []
    assert not list(killed.glob("*/error.txt"))


@pytest.mark.slow
def test_neither_a_kill_nor_a_cluster_changes_a_figure(killed: Path, tmp_path: Path) -> None:
    """One defense of each kind; those that are left out work like one of these."""
    defenses = ["plain", "paper", "default", "abl", "fine-pruning", "oracle"]
    plan, out = narrowed(tmp_path, attacks=["badnets"], defenses=defenses), tmp_path / "results"
    assert bench(plan, out, *(["--ray"] if find_spec("ray") else [])).wait() == 0
    cells = read_plan(plan)
    assert figures(out, cells) == figures(killed, cells)


@pytest.mark.slow
def test_the_report_shows_it_all(killed: Path, part: Path, tmp_path: Path) -> None:
    for name in ("report.html", "report.md", "report.json"):
        words = [sys.executable, "-m", "untrigger", "report", str(killed), "--out", str(tmp_path / name)]
        assert subprocess.run(words).returncode == 0
    told = json.loads((tmp_path / "report.json").read_text())
    assert len(told["cells"]) == len(read_plan(part))
