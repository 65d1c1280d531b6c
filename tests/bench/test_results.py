"""The results that are committed are what their cells say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from untrigger.bench import store
from untrigger.bench.plan import read_plan
from untrigger.bench.report import render

ROOT = Path(__file__).parents[2]
CELLS = ROOT / "results" / "paper"
MARK = "<!-- from here on as rendered by `untrigger report` -->\n"


@pytest.mark.parametrize(
    ("plan", "folder"),
    [
        ("paper", "paper"),
        ("gauntlet", "gauntlet"),
        ("goals-vqa", "goals"),
        ("goals-captions", "goals"),
        ("weak-domain", "weak-domain"),
        ("baselines", "baselines"),
        ("baselines-captions", "baselines"),
        ("ablation", "ablation"),
        ("rates", "rates"),
        ("link", "link"),
        ("seeds", "seeds"),
        ("views", "views"),
        ("number-of-views", "views"),
        ("smol-vqa", "smol"),
        ("smol-captions", "smol"),
        ("rates-captions", "rates"),
    ],
)
def test_every_cell_of_a_plan_is_there(plan: str, folder: str) -> None:
    assert store.missing(ROOT / "results" / folder, read_plan(ROOT / "plans" / f"{plan}.yaml")) == []


def test_the_figures_and_the_page_are_rendered_from_the_cells(tmp_path: Path) -> None:
    for name in ("paper.json", "paper.md"):
        render.write(CELLS, tmp_path / name)
    assert (ROOT / "results" / "paper.json").read_text() == (tmp_path / "paper.json").read_text()
    _, _, rendered = (ROOT / "RESULTS.md").read_text().partition(MARK)
    assert rendered == (tmp_path / "paper.md").read_text()


def test_the_figures_have_what_a_program_asks_for() -> None:
    told = json.loads((ROOT / "results" / "paper.json").read_text())
    wanted = {"model", "task", "attack", "rate", "defense", "seed", "valid", "asr", "leak", "quality"}
    for cell in told["cells"]:
        assert wanted | {"quality_vs_oracle", "seconds"} <= set(cell)
        assert 0 <= cell["asr"]["low"] <= cell["asr"]["value"] <= cell["asr"]["high"] <= 1
