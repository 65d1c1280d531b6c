"""Goals whose replies vary: which cells count, and the section of the report."""

from __future__ import annotations

from typing import Any

import pytest
from fabricated import Bench

from untrigger.bench.report.figures import as_json, read
from untrigger.bench.report.markdown import markdown
from untrigger.bench.report.page import page
from untrigger.bench.report.words import points


def met(count: int) -> dict[str, Any]:
    return {"met": "1" * count + "0" * (200 - count)}


@pytest.mark.parametrize(
    ("plain", "oracle", "valid", "status"),
    [
        (70, 10, True, ""),
        (200, 140, True, ""),
        (69, 10, False, "not counted: not implanted"),
        (70, None, None, "not checked: the oracle was not run"),
    ],
)
def test_a_goal_whose_replies_vary_counts_beyond_the_oracle(
    bench: Bench, plain: int, oracle: int | None, valid: bool | None, status: str
) -> None:
    for name, hits in (("plain", plain), ("oracle", oracle), ("paper", 50)):
        if hits is not None:
            bench.cell(name, hits / 200, goal="hijack", metrics=met(hits))
    (group,) = read(bench.root).groups
    assert (group.valid, group.status) == (valid, status)
    difference = group.beyond_oracle("paper")
    if oracle is None:
        assert difference is None
        return
    assert difference is not None and difference.value == pytest.approx((50 - oracle) / 200)
    assert difference.low < difference.value < difference.high and group.beyond_oracle("oracle") is None
    stored = {entry["defense"]: entry.get("beyond_oracle") for entry in as_json(read(bench.root))["cells"]}
    assert stored["oracle"] is None and stored["paper"]["n"] == 200
    section = markdown(read(bench.root)).split("## Beyond the oracle")[1]
    (row,) = [line for line in section.splitlines() if "| hijack |" in line]
    cells = [cell.strip() for cell in row.split("|")[5:-1]]
    assert cells[0] == (status or "yes") and cells[2] == "-"
    assert [cell.split(" (")[0] for cell in (cells[1], cells[3])] == [
        points((hits - oracle) / 200) for hits in (plain, 50)
    ]
    page_row = (
        page(read(bench.root), [bench.root]).split("Beyond the oracle")[1].split("hijack</td>")[1].split("</tr>")[0]
    )
    assert all(cell.split(" (")[0] in page_row for cell in cells[1:]) and f"<td>{cells[0]}</td>" in page_row


def test_goals_with_one_reply_have_no_section_beyond_the_oracle(bench: Bench) -> None:
    bench.pair()
    assert "Beyond the oracle" not in markdown(read(bench.root))
    assert "Beyond the oracle" not in page(read(bench.root), [bench.root])
    assert not any("beyond_oracle" in entry for entry in as_json(read(bench.root))["cells"])
