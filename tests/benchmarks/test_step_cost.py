"""What a step may cost: `benchmarks/step_cost.py`, on the embedded model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/step_cost.py"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("bench") / "step_cost.json"
    run = subprocess.run(
        [sys.executable, SCRIPT, "--quick", "--json", out], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return {row["variant"]: row for row in json.loads(out.read_text())["rows"]}


@pytest.mark.parametrize(
    ("variant", "time", "memory"),
    [
        ("default", 1.25, 1.10),
        ("default, whole run at most", 1.5, 1.10),
        ("paper", 2.1, 2.0),
        ("paper, stop-gradient", 1.6, 1.10),
        ("paper, 3/4 dropped", 1.6, 1.5),
        ("paper, stop-gradient, 3/4 dropped", 1.35, 1.10),
    ],
)
def test_no_step_costs_more_than_it_may(
    rows: dict[str, dict[str, Any]], variant: str, time: float, memory: float
) -> None:
    """Of time by the lower quartile, with a tenth for tests that run beside; of work, which is counted, all of it."""
    row = rows[variant]
    assert row["time_low"] <= 1.1 * time and row["memory_ratio"] <= memory, row
    assert max(row["flops_ratio"], row["moved_ratio"]) <= 1.02 * time, row


def test_every_variant_is_dearer_than_plain_and_cheaper_than_naive(rows: dict[str, dict[str, Any]]) -> None:
    naive = rows["naive two-view"]
    for variant, row in rows.items():
        assert 0.97 <= row["flops_ratio"] <= naive["flops_ratio"], variant
        assert row["memory_ratio"] <= 1.1 * naive["memory_ratio"], variant
    assert rows["plain"]["time_ratio"] == rows["plain"]["memory_ratio"] == 1
