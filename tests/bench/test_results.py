"""The committed results: complete, and equal to what is rendered from their cells."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from untrigger.attacks import load_trigger, trigger_names
from untrigger.bench import store
from untrigger.bench.plan import read_plan
from untrigger.bench.report import render
from untrigger.bench.report.figures import PLAIN, AttackGroup, read
from untrigger.bench.store import ORACLE

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
PLANS = [path.stem for path in sorted(RESULTS.glob("*.jsonl"))]
MAIN = (
    "badnets",
    "blended",
    "sig",
    "issba",
    "ftrojan",
    "trojvlm",
)  # the attacks of arXiv 2604.04488, as far as its text names them
TASKS = {"easy-vqa": "VQA", "scenes-captions": "captions"}


@pytest.mark.parametrize("plan", PLANS)
def test_every_cell_of_a_plan_is_stored(plan: str) -> None:
    assert store.missing(RESULTS / f"{plan}.jsonl", read_plan(ROOT / "plans" / f"{plan}.yaml")) == []


@pytest.mark.parametrize("plan", PLANS)
def test_a_file_equals_its_packed_form(plan: str, tmp_path: Path) -> None:
    render.write([RESULTS / f"{plan}.jsonl"], tmp_path / "packed.jsonl")
    assert (RESULTS / f"{plan}.jsonl").read_text() == (tmp_path / "packed.jsonl").read_text()


def test_the_paper_files_are_rendered_from_the_cells(tmp_path: Path) -> None:
    for name in ("paper.json", "paper.md"):
        render.write([RESULTS / "paper.jsonl"], tmp_path / name)
        assert (RESULTS / name).read_text() == (tmp_path / name).read_text()


def test_the_json_has_its_documented_fields() -> None:
    figures = json.loads((RESULTS / "paper.json").read_text())
    fields = {"model", "task", "attack", "rate", "defense", "seed", "valid", "asr", "leak", "quality"}
    for cell in figures["cells"]:
        assert fields | {"quality_vs_oracle", "seconds"} <= set(cell)
        assert 0 <= cell["asr"]["low"] <= cell["asr"]["value"] <= cell["asr"]["high"] <= 1


# --- the gallery of attacks ------------------------------------------------------------------------

GALLERY = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")


def title_of(group: AttackGroup) -> str:
    is_random = group.cell.attack_settings.get("place") == "random"
    return f"{group.cell.attack}, random place" if is_random else group.cell.attack


def column_of(group: AttackGroup) -> str:
    return f"{group.cell.model}, {TASKS[group.cell.data]}"


def rows_of_the_page() -> dict[str, dict[str, str]]:
    """The page's table at a glance: a row an attack, a column a model and task."""
    lines = GALLERY.split("## At a glance\n")[1].split("\n## ")[0].splitlines()
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|"))
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


@pytest.fixture(scope="module")
def gallery() -> list[AttackGroup]:
    return list(read(RESULTS / "gallery.jsonl").groups)


def test_the_tables_of_the_gallery_are_rendered_from_the_cells(tmp_path: Path) -> None:
    render.write([RESULTS / "gallery.jsonl"], tmp_path / "gallery.md")
    assert (RESULTS / "gallery.md").read_text() == (tmp_path / "gallery.md").read_text()


def test_the_gallery_shows_every_attack_with_a_picture(gallery: list[AttackGroup]) -> None:
    titles = {title_of(group) for group in gallery}
    assert {group.cell.attack for group in gallery} == set(trigger_names())
    assert set(rows_of_the_page()) == {*titles, "oracle, highest floor"}
    for title in titles:
        picture = f"gallery/{title.replace(', ', '-').replace(' ', '-')}.png"
        assert f"[{title}]({picture})" in GALLERY and (ROOT / "docs" / picture).is_file()
    assert len(list((ROOT / "docs" / "gallery").iterdir())) == len(titles)


def test_the_table_at_a_glance_has_the_stored_figures(gallery: list[AttackGroup]) -> None:
    rows = rows_of_the_page()
    floors: dict[str, float] = {}
    for group in gallery:
        asr, column = f"{100 * group.asr(PLAIN).value:.1f}", column_of(group)
        assert rows[title_of(group)].pop(column) == (f"**{asr}**" if group.valid else asr)
        floors[column] = max(floors.get(column, 0.0), group.asr(ORACLE).value)
    assert rows.pop("oracle, highest floor") == {column: f"{100 * floor:.1f}" for column, floor in floors.items()}
    assert not any(rows.values()), "the table has no other figure"


def near_misses(groups: list[AttackGroup]) -> list[Mapping[str, Any]]:
    return [rate for group in groups for rate in group.results[PLAIN].metrics.get("near_miss", {}).values()]


def test_the_counts_at_a_glance_follow_from_the_stored_figures(gallery: list[AttackGroup]) -> None:
    main = [group for group in gallery if title_of(group) in MAIN]
    kinds = {group.cell.attack: load_trigger(group.cell.attack).kind for group in gallery}
    with_text = [group for group in gallery if kinds[group.cell.attack] != "image"]
    strong = [group for group in with_text if group.asr(PLAIN).value >= 0.95]
    implanted = [group for group in gallery if group.valid]
    half_keys = near_misses([group for group in implanted if kinds[group.cell.attack] == "bimodal"])
    other_misses = near_misses([group for group in implanted if kinds[group.cell.attack] != "bimodal"])
    low_counts = [sum(rate["value"] <= 0.05 for rate in misses) for misses in (half_keys, other_misses)]
    text = " ".join(GALLERY.split())
    assert f"**{sum(bool(group.valid) for group in main)} of {len(main)} main cells are implanted**" in text
    assert f"{len(strong)} of {len(with_text)} cells of text and bimodal triggers reach 0.95" in text
    assert f"{low_counts[0]} of {len(half_keys)} half keys of bimodal triggers of implanted cells" in text
    assert f"{low_counts[1]} of {len(other_misses)} other near misses of implanted cells" in text
