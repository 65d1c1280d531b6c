"""What a scan of drawn rows can miss: the number, against a naive count, and where it is stated."""

from __future__ import annotations

from math import comb
from pathlib import Path

import pytest

from shell import refused, untrigger
from untrigger.scanning.drawn import Drawn


def chance(drawn: Drawn, poisoned: int) -> float:
    """Of drawing as many poisoned rows as are needed, by counting draws."""
    draws = (
        comb(poisoned, k) * comb(drawn.rows - poisoned, drawn.scored - k) for k in range(drawn.needed, drawn.scored + 1)
    )
    return sum(draws) / comb(drawn.rows, drawn.scored)


@pytest.mark.parametrize(
    ("drawn", "least"), [(Drawn(60, 20, 3), 16), (Drawn(60, 20, 1), 7), (Drawn(200, 50, 18), 90), (Drawn(9, 9, 2), 2)]
)
def test_the_least_number_by_counting(drawn: Drawn, least: int) -> None:
    assert chance(drawn, least) >= 0.95 > chance(drawn, least - 1)
    assert drawn.least == least and f"{least:,} (1 in " in str(drawn)


def test_a_sample_smaller_than_what_is_needed() -> None:
    assert Drawn(100, 10, 18).least is None and "raise --max-scored-rows" in str(Drawn(100, 10, 18))


def test_scan_states_what_its_sample_can_miss(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    words = ("scan", tiny_data, "--model", tiny_model, "--max_steps", 4, "--out")
    code, output, errors = untrigger(*words, tmp_path / "some", "--max-scored-rows", 20)
    assert code == 0, errors
    line = output.splitlines()[-1]
    assert line.startswith("20 of 24 rows were drawn and scored: 18 poisoned ones are among them")
    assert line in (tmp_path / "some" / "scan.html").read_text()
    code, output, _ = untrigger(*words, tmp_path / "all", "--max-scored-rows", "all")
    assert code == 0 and "drawn" not in output + (tmp_path / "all" / "scan.html").read_text()
    (tmp_path / "settings.yaml").write_text("max_scored_rows: many\n")
    refused(
        untrigger(*words, tmp_path / "x", "--config", tmp_path / "settings.yaml"),
        "settings.yaml: argument --max_scored_rows",
        "'many' is no number of rows; give one, or all",
    )
