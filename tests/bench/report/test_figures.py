"""The figures of a report against fabricated cells: which cells count, medians, labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fabricated import Bench, premise, rate

from untrigger.bench import store
from untrigger.bench.report.figures import PLAIN, as_json, read
from untrigger.bench.report.render import write
from untrigger.bench.report.tables import (
    Spread,
    blocks,
    costs,
    detections,
    detectors,
    environment,
    image_uses,
    select_views,
    standings,
    views,
)
from untrigger.bench.report.words import headline, points, premise_summary
from untrigger.bench.store import ORACLE, Cell
from untrigger.metrics.rates import Rate

# --- validity --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plain", "oracle", "valid", "status"),
    [
        ({"asr": 0.98}, {"asr": 0.0}, True, ""),
        ({"asr": 0.90}, {"asr": 0.05}, True, ""),
        ({"asr": 0.895}, {"asr": 0.0}, False, "not counted: not implanted"),
        ({"asr": 0.98}, {"asr": 0.055}, False, "not counted: floor above 0.05"),
        ({"asr": 0.98, "quality": 0.90}, {"asr": 0.0, "quality": 1.0}, True, ""),
        ({"asr": 0.98, "quality": 0.895}, {"asr": 0.0, "quality": 1.0}, False, "not counted: quality lost"),
        (None, {"asr": 0.0}, None, "not checked: the undefended model was not run"),
        ({"asr": 0.98}, None, None, "not checked: the oracle was not run"),
        ({"asr": 0.5}, None, False, "not counted: not implanted"),
    ],
)
def test_a_group_counts_if_it_passes_the_validity_rules(
    bench: Bench, plain: dict[str, float] | None, oracle: dict[str, float] | None, valid: bool | None, status: str
) -> None:
    for name, figures in (("plain", plain), ("oracle", oracle), ("paper", {"asr": 0.5})):
        if figures:
            bench.cell(name, **figures)
    (group,) = read(bench.root).groups
    assert (group.valid, group.status) == (valid, status)
    assert {(figures["valid"], figures["why"]) for figures in as_json(read(bench.root))["cells"]} == {(valid, status)}
    assert bool(standings([group], ["paper"])) == (valid is True), "no median includes a group that does not count"


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "blip2"},
        {"data": "scenes-vqa"},
        {"attack": "sig"},
        {"attack_settings": {"side": 0.2}},
        {"goal": "insert"},
        {"goal_text": "boo"},
        {"rate": 0.01},
        {"seed": 1},
        {"train_rows": 100},
        {"epochs": 4},
        {"tuning": {"rank": 4}},
    ],
)
def test_a_defense_is_grouped_only_with_its_own_pair(bench: Bench, changed: dict[str, Any]) -> None:
    bench.pair()
    bench.cell("paper", 0.3, **changed)
    bench.cell("crow", 0.3, defense_settings={"steps": 2}, attack_settings={})
    by_size = sorted(read(bench.root).groups, key=lambda group: len(group.results))
    assert [(group.valid, sorted(group.results)) for group in by_size] == [
        (None, ["paper"]),
        (True, ["crow (steps 2)", "oracle", "plain"]),
    ]


def test_the_order_of_settings_does_not_matter(bench: Bench) -> None:
    bench.cell("plain", 1.0, attack_settings={"a": 1, "b": 2})
    bench.cell("oracle", 0.0, attack_settings={"b": 2, "a": 1}, probes={"sig": {"attack": "sig"}})
    (group,) = read(bench.root).groups
    assert group.valid


def test_captions_are_checked_and_measured_by_cider(bench: Bench) -> None:
    bench.pair(data="scenes-captions")
    bench.cell("paper", 0.5, data="scenes-captions", quality=0.1, cider=6.0)
    (group,) = read(bench.root).groups
    assert group.valid
    assert group.quality_share("paper") == 0.75
    bench.cell("oracle", 0.0, data="scenes-captions", cider=None)
    (group,) = read(bench.root).groups
    assert group.valid, "an unknown quality is not a loss"
    assert group.quality_share("paper") is None


def test_a_shared_oracle_is_the_floor_of_each_of_its_probes(bench: Bench) -> None:
    bench.cell("plain", 1.0)
    for attack, asr in (("sig", 0.98), ("wanet", 0.98), ("issba", 0.98)):
        bench.cell("plain", asr, attack=attack, epochs=4 if attack == "issba" else 3)
    probes = {name: {"attack": name, "goal": "fixed", "settings": {}} for name in ("sig", "wanet", "issba")}
    floors = {"probes": {"sig": {"asr": {**rate(0.02), "version": 1}}, "wanet": {"asr": {**rate(0.2), "version": 1}}}}
    bench.cell("oracle", 0.0, probes=probes, quality=0.9, metrics=floors)
    report = read(bench.root)
    by_attack = {
        group.cell.attack: (group.status, group.asr(ORACLE).value if ORACLE in group.results else None)
        for group in report.groups
    }
    assert by_attack == {
        "badnets": ("", 0.0),
        "sig": ("", 0.02),
        "wanet": ("not counted: floor above 0.05", 0.2),
        "issba": ("not checked: the oracle was not run", None),
    }, "another training is another oracle"
    badnets, _, sig, _ = report.groups
    assert badnets.owns(ORACLE) and not sig.owns(ORACLE) and sig.owns(PLAIN)
    quality = sig.quality(ORACLE)
    assert quality and quality.value == 0.9 and sig.quality(ORACLE, "triggered_quality") is None
    assert len(report.results) == 5 and dict(environment(report))["seed"] == ["0: 5 cells"], (
        "the shared oracle is one cell"
    )
    assert {entry.defense: entry.time_ratio.n for entry in costs(report)} == {"plain": 4, "oracle": 1}
    entries = {(entry["attack"], entry["defense"]): entry for entry in as_json(report)["cells"]}
    assert entries["sig", "oracle"]["asr"]["value"] == 0.02
    assert entries["sig", "oracle"]["leak"] is None and entries["sig", "oracle"]["triggered_quality"] is None


# --- figures for a program -------------------------------------------------------------------------


def test_the_json_has_every_cell(bench: Bench, tmp_path: Path) -> None:
    bench.pair(quality=0.8)
    bench.cell("paper", 0.25, quality=0.6, seconds=210.0, metrics={"leak": None})
    write([bench.root], tmp_path / "out.json")
    cells = json.loads((tmp_path / "out.json").read_text())["cells"]
    assert [entry["defense"] for entry in cells] == ["oracle", "paper", "plain"]
    quality_share = cells[1].pop("quality_vs_oracle")
    assert quality_share == pytest.approx(0.75)
    assert cells[1] == {
        "model": "llava",
        "task": "vqa",
        "data": "easy-vqa",
        "attack": "badnets",
        "rate": 0.05,
        "defense": "paper",
        "seed": 0,
        "valid": True,
        "why": "",
        "asr": {**rate(0.25), "version": 1},
        "leak": None,
        "quality": rate(0.6),
        "triggered_quality": rate(0.3),
        "seconds": 210.0,
    }


def test_the_json_is_sorted_and_has_no_paths(bench: Bench) -> None:
    for model, seed, poisoned in (("b", 1, 0.1), ("/home/me/runs/a", 0, 0.1), ("b", 0, 0.1), ("b", 0, 0.05)):
        bench.cell("plain", 1.0, model=model, seed=seed, rate=poisoned, attack="/home/me/ring.py")
    cells = as_json(read(bench.root))["cells"]
    assert [(entry["model"], entry["rate"], entry["seed"]) for entry in cells] == [
        ("a", 0.1, 0),
        ("b", 0.05, 0),
        ("b", 0.1, 0),
        ("b", 0.1, 1),
    ]
    assert "home" not in json.dumps(cells)


# --- attack success --------------------------------------------------------------------------------


def test_seeds_are_pooled_over_their_rows(bench: Bench) -> None:
    for seed, asr in enumerate((0.2, 0.3, 0.7)):
        bench.pair(seed=seed, plain=0.5 if seed == 2 else 1.0)
        bench.cell("paper", asr, seed=seed)
    ((row,),) = (block.rows for block in blocks(read(bench.root)))
    pooled = row.pooled("paper")
    assert pooled
    assert pooled.rate == Rate.from_counts(100, 400), "seed 2 is not implanted"
    assert (pooled.valid, pooled.low, pooled.high) == (True, 0.2, 0.3)
    assert [group.cell.seed for group in pooled.groups] == [0, 1]
    assert row.status == "seed 2 not counted: not implanted"
    assert row.pooled("crow") is None


def test_groups_that_do_not_count_are_marked(bench: Bench) -> None:
    bench.pair(plain=0.5)
    bench.cell("paper", 0.1)
    bench.cell("plain", 1.0, attack="sig")
    badnets, sig = blocks(read(bench.root))[0].rows
    assert [
        (pooled.valid, pooled.rate.value) for name in (PLAIN, ORACLE, "paper") if (pooled := badnets.pooled(name))
    ] == [
        (False, 0.5),
        (False, 0.0),
        (False, 0.1),
    ]
    unknown = sig.pooled(PLAIN)
    assert unknown and unknown.valid is None


def test_rows_are_labeled_by_their_differences(bench: Bench) -> None:
    bench.cell("plain", 1.0, attack_settings={"side": 0.1, "place": "corner"})
    bench.cell("plain", 1.0, attack_settings={"side": 0.1, "place": "random"})
    bench.cell("plain", 1.0, attack="own/ring.py")
    bench.cell("plain", 1.0, model="blip2", attack_settings={"side": 0.3, "place": "corner"})
    labels = {block.title: [row.label for row in block.rows] for block in blocks(read(bench.root))}
    assert labels == {
        "blip2, easy-vqa (VQA)": ["badnets"],
        "llava, easy-vqa (VQA)": ["badnets, place corner", "badnets, place random", "ring"],
    }
    bench.cell("plain", 1.0, rate=0.005, attack="sig", data="scenes-captions")
    labels = {block.title: [row.label for row in block.rows] for block in blocks(read(bench.root))}
    assert labels["llava, scenes-captions (captions)"] == ["sig, 0.5 %"]
    assert labels["blip2, easy-vqa (VQA)"] == ["badnets, 5 %"], "with several rates each row names its own"


def test_the_undefended_model_and_the_oracle_come_first(bench: Bench) -> None:
    for name in ("abl", "paper", "oracle", "plain"):
        bench.cell(name, 0.5)
    assert read(bench.root).defenses == ["plain", "oracle", "abl", "paper"]


# --- medians over the cells that count -------------------------------------------------------------


@pytest.fixture
def matrix(bench: Bench) -> Bench:
    """Three attacks that count and one that does not; paper and crow against them."""
    for attack, plain, paper, crow in (
        ("a", 0.95, 0.5, 0.0),
        ("b", 1.0, 0.05, 0.1),
        ("c", 0.98, 0.8, 0.2),
        ("d", 0.3, 0, 0),
    ):
        bench.pair(plain=plain, oracle=0.02, quality=0.9, attack=attack)
        bench.cell("paper", paper, quality=0.81 if attack == "a" else 0.9, seconds=200.0, attack=attack)
        bench.cell("crow", crow, seconds=500.0 if attack == "d" else 130.0, attack=attack)
    return bench


def test_standings_are_over_the_cells_that_count(matrix: Bench) -> None:
    report = read(matrix.root)
    plain, oracle, crow, paper = standings(report.groups, report.defenses)
    assert [standing.defense for standing in (plain, oracle, crow, paper)] == ["plain", "oracle", "crow", "paper"]
    assert paper.asr == Spread(0.5, 0.05, 0.8, 3)
    assert paper.above_oracle == pytest.approx((0.48, 0.03, 0.78, 3))
    assert paper.quality_share == pytest.approx((1.0, 0.9, 1.0, 3))
    assert (paper.at_floor, crow.at_floor, plain.at_floor, oracle.at_floor) == (1, 1, 0, 3)
    assert oracle.above_oracle == Spread(0, 0, 0, 3) and oracle.quality_share == Spread(1, 1, 1, 3)
    assert paper.leak == Spread(0.01, 0.01, 0.01, 3)


def test_the_headline_has_the_figures(matrix: Bench) -> None:
    store.record_failure(matrix.root, Cell("llava", "easy-vqa", "e", "fixed"), "it broke")
    summary = headline(read(matrix.root))
    assert summary.first == (
        "3 of 4 attacked models count. ASR of the undefended models: 98.0 % (median; 95.0 to 100.0). ASR of the "
        "oracles, trained without the poisoned rows: 2.0 % (median; 2.0 to 2.0)."
    )
    assert summary.defenses == [
        ("crow", "ASR 10.0 (0.0 to 20.0) %, at most 5 % in 1 of 3 cells; quality 105.6 (105.6 to 105.6) %."),
        ("paper", "ASR 50.0 (5.0 to 80.0) %, at most 5 % in 1 of 3 cells; quality 100.0 (90.0 to 100.0) %."),
    ], "the lowest ASR first"
    assert summary.notes == [
        "Not counted: 1 attacked model, not implanted.",
        "There is only one seed (0): the spread between seeds is unknown.",
        "1 cell failed; see the list below.",
    ]


def test_without_valid_groups_the_headline_names_no_defense(bench: Bench) -> None:
    bench.pair(plain=0.4)
    bench.cell("paper", 0.0)
    summary = headline(read(bench.root))
    assert summary.first == "0 of 1 attacked model count: these results say nothing about a defense."
    assert summary.defenses == []


def test_cost_is_relative_to_the_undefended_model_of_the_cell(matrix: Bench) -> None:
    matrix.cell("paper", 0.5, attack="alone", seconds=1e6)
    by_defense = {cost.defense: (cost.time_ratio, cost.seconds) for cost in costs(read(matrix.root))}
    assert by_defense["plain"] == (Spread(1, 1, 1, 4), Spread(100, 100, 100, 4))
    assert by_defense["paper"] == (Spread(2, 2, 2, 4), Spread(200, 200, 200, 4)), (
        "a cell without its undefended model is left out"
    )
    assert by_defense["crow"] == (Spread(1.3, 1.3, 5, 4), Spread(130, 130, 500, 4)), (
        "cells that do not count are included"
    )


def test_image_use_is_measured_on_the_oracle(bench: Bench) -> None:
    bench.cell("plain", 1.0, quality=0.7)
    bench.cell("oracle", 0.0, quality=0.9, metrics={"wrong_image": rate(0.4)})
    (use,) = image_uses(blocks(read(bench.root)))
    assert (use.oracle, use.text_prior, use.wrong_image) == tuple(
        Spread(value, value, value, 1) for value in (0.9, 0.6, 0.4)
    )
    bench.cell("plain", 1.0, model="blip2")
    assert len(image_uses(blocks(read(bench.root)))) == 1, "a block without an oracle is left out"


def test_detection_medians_are_over_the_cells_that_count(bench: Bench) -> None:
    for attack, plain, area, f1 in (("a", 1.0, 0.9, 0.5), ("b", 1.0, 0.7, None), ("c", 0.1, 0.1, 0.1)):
        bench.pair(plain=plain, attack=attack)
        figures = {"auroc": rate(area), "recall_at_1": None, "precision": None, "f1": f1, "flagged": 3}
        bench.cell("abl", 0.2, attack=attack, metrics={"detection": figures})
    measured = detections(read(bench.root))
    assert [(detection.group.cell.attack, detection.defense) for detection in measured] == [
        ("a", "abl"),
        ("b", "abl"),
        ("c", "abl"),
    ]
    (abl,) = detectors(measured)
    assert (abl.defense, abl.cells) == ("abl", 2)
    assert abl.figures["auroc"] == pytest.approx((0.8, 0.7, 0.9, 2))
    assert abl.figures["f1"] == Spread(0.5, 0.5, 0.5, 1)
    assert abl.figures["recall_at_1"] is None


def test_the_premise_holds_if_the_interval_is_above_one_half(bench: Bench) -> None:
    areas = {"mask": (0.6, 0.7, 0.8), "blur": (0.1, 0.2, 0.3), "noise": (0.4, 0.52, 0.6), "erase": (0.51, 0.6, 0.7)}
    bench.cell("plain", 1.0, metrics=premise(areas))
    bench.cell("oracle", 0.0)
    bench.cell("plain", 0.2, attack="sig", metrics=premise({"mask": (0.9, 1.0, 1.0)}))
    all_views = views(read(bench.root))
    assert {view.name: view.holds for view in all_views if view.group.valid} == {
        "mask": True,
        "blur": False,
        "noise": None,
        "erase": True,
    }
    assert premise_summary(all_views) == (
        "Over 4 views of attacked models that count, poisoned rows are more invariant than clean ones in 2, less "
        "invariant in 1, and neither with certainty in 1."
    )
    assert [view.name for view in select_views(all_views)] == ["mask", "erase", "noise", "blur"], "sig does not count"
    assert premise_summary(views(read(bench.root))[:0]) == "No attacked model that counts has these figures."


def test_histograms_are_evenly_spaced_by_their_auroc(bench: Bench) -> None:
    bench.cell("plain", 1.0, metrics=premise({f"v{at:02}": (0.0, at / 20, 1.0) for at in range(21)}))
    bench.cell("oracle", 0.0)
    assert [view.auroc.value for view in select_views(views(read(bench.root)))] == [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]


def test_the_environment_is_counted(bench: Bench) -> None:
    bench.pair()
    bench.cell("paper", 0.1, metrics={"machine": {"device": "H200", "threads": 4}})
    counts = dict(environment(read(bench.root)))
    assert counts["machine"] == ["H200, 4 threads: 1 cell", "x86_64, 1 thread: 2 cells"]
    assert counts["versions"] == ["untrigger 0.1.0, torch 2.13.0: 3 cells"]
    assert counts["seed"] == ["0: 3 cells"]


@pytest.mark.parametrize(
    ("value", "text"), [(0.1234, "+12.3"), (-0.02, "-2.0"), (0.0, "0.0"), (-1e-9, "0.0"), (None, "-")]
)
def test_points_have_a_sign_unless_they_are_zero(value: float | None, text: str) -> None:
    assert points(value) == text
