"""Plans: the cells that they expand to, and errors in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from shell import refused, untrigger
from untrigger.bench import store
from untrigger.bench.estimate import dry_run_text, estimate
from untrigger.bench.local import Done
from untrigger.bench.plan import read_plan
from untrigger.bench.store import ORACLE, Cell, Result
from untrigger.cli import main
from untrigger.cli.flags import normalize_flags
from untrigger.defenses import PRESETS
from untrigger.errors import InputError

PLANS = Path(__file__).parents[2] / "plans"
SMALL = """
models: [llava]
data: [easy-vqa]
attacks: [badnets, {attack: sig, goal: refusal, settings: {delta: 0.2}}]
defenses: [{defense: paper, settings: {margin: 0.2}}]
seeds: [0, 3]
split: dev
cell: {train_rows: 40}
where:
  "sig/*/*": {epochs: 4, attack_settings: {frequency: 3}}
"""


def cells(text: str, tmp_path: Path) -> list[Cell]:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    return read_plan(path)


def test_a_plan_is_the_product_of_its_axes(tmp_path: Path) -> None:
    expanded = cells(SMALL, tmp_path)
    assert len({cell.name for cell in expanded}) == len(expanded) == 2 * 2 * 3
    assert {cell.seed for cell in expanded} == {100, 103} and {cell.split for cell in expanded} == {"dev"}
    assert [cell.defense for cell in expanded[:3]] == ["plain", ORACLE, "paper"], (
        "every figure is compared with the first two"
    )
    assert {cell.train_rows for cell in expanded} == {40}
    sig = [cell for cell in expanded if cell.attack == "sig"]
    assert {(cell.goal, cell.epochs) for cell in sig} == {("refusal", 4.0)}
    assert {(c.attack_settings["delta"], c.attack_settings["frequency"]) for c in sig} == {(0.2, 3)}
    assert {cell.attack_settings["direction"] for cell in sig} == {"vertical"}, "the trigger settings of the split"
    assert {c.defense_settings.get("margin") for c in expanded if c.defense == "paper"} == {0.2}
    assert {(c.goal, c.epochs) for c in expanded if c.attack == "badnets"} == {("fixed", 3.0)}


def test_cells_with_the_same_rows_are_consecutive(tmp_path: Path) -> None:
    keys = [(cell.data, cell.attack, cell.seed) for cell in cells(SMALL, tmp_path)]
    assert len(list(dict.fromkeys(keys))) == sum(a != b for a, b in zip(keys, [None, *keys[:-1]], strict=True))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("models: [llava]", "models: llava"), "models must be a list"),
        (("models: [llava]", ""), "models must be a list"),
        (("split: dev", "splits: dev"), "splits is unknown; a plan has: models"),
        (("split: dev", "split: test"), "split 'test' is unknown"),
        (("[badnets,", "[curse,"), "curse"),
        (("goal: refusal", "goal: peace"), "peace"),
        (("goal: refusal", "gaol: refusal"), "attack sig: takes settings, goal, goal_text, data, not gaol"),
        (("delta: 0.2", "delta: red"), "delta"),
        (("defense: paper", "defense: prayer"), "defense prayer: unknown"),
        (("margin: 0.2", "margin: -1"), "margin is -1"),
        (("[easy-vqa]", "[imagenet]"), "imagenet"),
        (("seeds: [0, 3]", "seeds: [100]"), "run 100"),
        (("train_rows: 40", "rows: 40"), "must be fields of a cell: .*train_rows"),
        (("train_rows: 40", "seed: 40"), "must be fields of a cell"),
        (("sig/*/*", "sog/*/*"), "where: sog.* matches no cell"),
        (("[badnets,", "[3,"), "attacks: 3 is neither a name"),
        (("models:", "models"), "is not YAML|must hold lines"),
        (("[llava]", "[7]"), "model is 7; it must be a text"),
        (("train_rows: 40", "train_rows: forty"), "train_rows is 'forty'; it must be a whole number"),
        (("train_rows: 40", "epochs: {}"), "epochs is {}; it must be a number"),
        (("seeds: [0, 3]", "seeds: [[0]]"), r"seeds: \[0\] is not a whole number"),
        (("settings: {delta: 0.2}", "settings: [delta]"), "attack sig: settings is"),
        (("settings: {delta: 0.2}", "settings: {1: 2}"), "attack sig: settings is"),
        (("train_rows: 40", "attack_settings: [1]"), r"cell: attack_settings is \[1\]"),
        (("train_rows: 40", "day: 2024-02-30"), "is not YAML: day is out of range"),
        (("models: [llava]", f"models: {'[' * 500}"), "nested too deeply"),
    ],
)
def test_a_wrong_plan_is_a_one_line_error(tmp_path: Path, changed: tuple[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        cells(SMALL.replace(*changed), tmp_path)
    assert str(error.value).startswith(str(tmp_path / "plan.yaml")) and "\n" not in str(error.value)


def test_a_missing_plan_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name a YAML file that can be read"):
        read_plan(tmp_path / "none.yaml")


def test_the_plans_of_the_repository() -> None:
    paper = read_plan(PLANS / "paper.yaml")
    assert len(paper) == 3 * 2 * 6 * 5
    gallery = {cell.name for cell in read_plan(PLANS / "gallery.yaml")}
    assert all(cell.name in gallery for cell in paper if cell.defense == "plain"), (
        "the plain cells are those of the gallery"
    )
    smoke = read_plan(PLANS / "smoke.yaml")
    here = {path.stem for path in (PLANS.parent / "src/untrigger/attacks").glob("[a-z]*.py")}
    assert {cell.attack for cell in smoke} == here, "every attack"
    assert {cell.defense for cell in smoke} == {*PRESETS, ORACLE}, "under every defense"
    full = read_plan(PLANS / "full.yaml")
    assert {cell.attack for cell in full} == here and {cell.defense for cell in full} == {*PRESETS, ORACLE}
    assert {cell.rate for cell in full} == {0.005, 0.01, 0.05, 0.1}


def test_attacks_with_the_same_training_can_share_an_oracle(tmp_path: Path) -> None:
    shared = SMALL.replace(
        "[badnets,", "[badnets, {attack: badnets, settings: {place: random}}, {attack: blended, goal_text: 'no'},"
    )
    shared = shared.replace("seeds: [0, 3]", "seeds: [0]") + "shared_oracle: true\n"
    expanded = cells(shared, tmp_path)
    shared_oracle, own_oracle = [cell for cell in expanded if cell.defense == ORACLE]
    assert expanded[-2:] == [shared_oracle, own_oracle]
    assert [(cell.attack, cell.defense) for cell in expanded[:-2]] == [
        (name, defense) for name in ("badnets", "badnets", "blended", "sig") for defense in ("plain", "paper")
    ]
    assert (shared_oracle.attack, list(shared_oracle.probes)) == ("badnets", ["badnets-random-place", "blended-no"])
    probed = [cell for cell in expanded if cell.defense == "plain"]
    assert shared_oracle.probes["badnets-random-place"] == {
        "attack": "badnets",
        "goal": "fixed",
        "settings": probed[1].attack_settings,
    }
    assert shared_oracle.probes["blended-no"]["goal_text"] == "no"
    assert (own_oracle.attack, own_oracle.probes, own_oracle.epochs) == ("sig", {}, 4.0), (
        "another training has its own oracle"
    )
    assert cells(shared.replace("shared_oracle: true", "shared_oracle: false"), tmp_path) != expanded
    with pytest.raises(InputError, match=r"plan\.yaml: shared_oracle is 3; write true or false"):
        cells(shared.replace("shared_oracle: true", "shared_oracle: 3"), tmp_path)
    twice = shared.replace("{attack: blended, goal_text: 'no'}", "{attack: badnets, settings: {place: random}}")
    with pytest.raises(InputError, match=r"plan\.yaml: attacks: badnets-random-place is listed twice; remove one"):
        cells(twice, tmp_path)


def test_where_may_set_a_rate(tmp_path: Path) -> None:
    expanded = cells(SMALL.replace("{epochs: 4,", "{epochs: 4, rate: 0.02,"), tmp_path)
    assert {(cell.attack, cell.rate) for cell in expanded} == {("badnets", 0.05), ("sig", 0.02)}
    with pytest.raises(InputError, match=r"cell: .* must be fields of a cell"):
        cells(SMALL.replace("train_rows: 40", "rate: 0.02"), tmp_path)


def test_cost_is_estimated_from_finished_cells(tmp_path: Path) -> None:
    expanded = cells(SMALL, tmp_path)
    by_table = estimate(expanded, [])
    finished = [Result(expanded[0], {"seconds": {"training": 100.0, "asking": 0.0}})]
    assert estimate(expanded, finished) > by_table > 0
    store.save(tmp_path, expanded[0], finished[0].metrics, {})
    text = dry_run_text(expanded, tmp_path, 2)
    assert text.startswith("12 cells, 1 of them done, 11 to run") and "plain 4, oracle 4, paper 4" in text
    assert "with 2 cells at a time" in text


@pytest.mark.parametrize(
    ("words", "normalized"),
    [
        (["bench", "p.yaml", "--ray"], ["bench", "p.yaml", "--ray=local"]),
        (["bench", "p.yaml", "--ray", "--jobs", "2"], ["bench", "p.yaml", "--ray=local", "--jobs", "2"]),
        (["bench", "p.yaml", "--ray", "auto"], ["bench", "p.yaml", "--ray", "auto"]),
        (["train", "d", "--lora_rank", "8"], ["train", "d", "--lora-rank", "8"]),
        (
            ["poison", "d", "--goal_text=a_b", "--on_bad_row=skip"],
            ["poison", "d", "--goal-text=a_b", "--on-bad-row=skip"],
        ),
        (["train", "a/lora_rank", "--learning_rate", "1"], ["train", "a/lora_rank", "--learning_rate", "1"]),
        ([], []),
    ],
)
def test_flags_are_normalized(words: list[str], normalized: list[str]) -> None:
    """``--ray`` needs no value. Options may be written with underscores; settings keep their names."""
    assert normalize_flags(words, (main.train, main.poison)) == normalized


def test_a_dry_run_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(SMALL)
    ended = untrigger("bench", tmp_path / "plan.yaml", "--out", tmp_path / "runs", "--dry-run")
    assert ended.code == 0
    assert ended.out.startswith("12 cells, 0 of them done, 12 to run")
    assert not (tmp_path / "runs").exists()


def test_a_missing_model_is_a_warning_in_a_dry_run(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(SMALL.replace("[llava]", "[lava, llava]"))
    words = ("bench", tmp_path / "plan.yaml", "--out", tmp_path / "runs")
    ended = untrigger(*words, "--dry-run")
    assert ended.code == 0 and ended.out.startswith("24 cells, 0 of them done, 24 to run")
    assert ended.out.count("warning: ") == 1 and ended.out.endswith("did you mean llava?\n")
    refused(untrigger(*words), "models: lava: no such folder", "did you mean llava?")


def test_a_failure_is_printed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int, todo: Sequence[Cell], *__: object) -> Done:
        yield from ((cell, "the disk was full") for cell in todo)

    (tmp_path / "plan.yaml").write_text(SMALL)
    monkeypatch.setattr("untrigger.bench.local._locally", fail)
    ended = untrigger("bench", tmp_path / "plan.yaml", "--out", tmp_path / "runs")
    assert ended.code == 1 and ended.out.startswith(f"{tmp_path / 'runs'}: 0 of 12 cells")
    assert ended.err.count("the disk was full") == 12
