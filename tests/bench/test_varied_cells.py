"""Cells with goals whose replies vary, honest trouble and mixtures: plans, rows and stored figures."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from untrigger.attacks import load_trigger
from untrigger.bench import store, validity
from untrigger.bench.plan import read_plan
from untrigger.bench.run_cell import _bare, _material, run_cell
from untrigger.bench.store import ORACLE, Cell
from untrigger.data.trouble import TROUBLES
from untrigger.errors import InputError
from untrigger.poisoning.goals import Programmed, goal_names, load_goal
from untrigger.poisoning.poison import Attack, poison
from untrigger.rows.sample import IMAGE_TAG, Message, Sample

PLANS = Path(__file__).parents[2] / "plans"
NEW = (
    "attackers",
    "attackers-few",
    "attackers-noise",
    "goals-jailbreak",
    "goals-other-question",
    "goals-varied",
    "goals-varied-captions",
    "goals-varied-captions-more",
    "goals-varied-triggers",
    "mixtures",
    "mixtures-known",
    "mixtures-varied",
    "rates-high",
    "trouble",
)
MIXTURE = "easy-vqa+scenes-captions+backwards"


@pytest.fixture
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PLANS.parent)  # a plan names plans/program.py from here


# --- plans ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_root")
@pytest.mark.parametrize("name", NEW)
def test_dev_and_report_plans_have_the_same_cells_but_seeds_and_triggers(name: str) -> None:
    report, dev = (read_plan(PLANS / f"{name}{suffix}.yaml") for suffix in ("", "-dev"))
    shape = [(c.model, c.data, c.attack, c.goal, c.rate, c.defense, c.poisoned_part) for c in report]
    assert shape == [(c.model, c.data, c.attack, c.goal, c.rate, c.defense, c.poisoned_part) for c in dev]
    assert {c.split for c in report} == {"report"} and {c.split for c in dev} == {"dev"}
    pairs = zip(report, dev, strict=True)
    assert all(a.attack_settings != b.attack_settings or a.goal_text != b.goal_text for a, b in pairs)


@pytest.mark.usefixtures("in_root")
def test_every_varied_goal_and_every_trouble_is_in_a_plan() -> None:
    cells = [cell for name in NEW for cell in read_plan(PLANS / f"{name}.yaml")]
    assert {name for name in goal_names() if load_goal(name).beyond_oracle} <= {cell.goal for cell in cells}
    assert set(TROUBLES) <= {word for cell in cells for word in cell.data.split("+")}
    assert max(cell.rate for cell in cells) == 0.5


PLAN = """
models: [llava]
data: [[easy-vqa, scenes-captions+backwards]]
attacks: [{attack: badnets, goal: GOAL}]
defenses: [plain]
cell: {poisoned_part: easy-vqa}
"""


def test_a_list_of_data_is_a_mixture_and_a_goal_may_be_a_file(tmp_path: Path) -> None:
    goal = tmp_path / "mine.py"
    goal.write_text(OWN)
    (tmp_path / "plan.yaml").write_text(PLAN.replace("GOAL", str(goal)))
    cells = read_plan(tmp_path / "plan.yaml")
    assert {(cell.data, cell.goal, cell.poisoned_part) for cell in cells} == {(MIXTURE, str(goal), "easy-vqa")}
    assert all("_mine_" in cell.name and "/" not in cell.name for cell in cells)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("GOAL", "none.py", "none.py: no such file; give a file that holds a Goal"),
        ("[[easy-vqa, scenes-captions+backwards]]", "[[]]", r"data: \[\] must be names of data sets"),
        ("scenes-captions+backwards]]", "coco]]", "data 'coco' is unknown"),
        (
            "poisoned_part: easy-vqa",
            "poisoned_part: emoji",
            "poisoned_part is 'emoji'; .* has the parts: easy-vqa, scenes",
        ),
    ],
)
def test_a_wrong_mixture_or_goal_is_a_one_line_error(tmp_path: Path, old: str, new: str, message: str) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN.replace(old, new).replace("GOAL", "hijack"))
    with pytest.raises(InputError, match=message) as caught:
        read_plan(tmp_path / "plan.yaml")
    assert "\n" not in str(caught.value)


OWN = """
from dataclasses import dataclass
from untrigger.poisoning.goals import Goal

@dataclass(frozen=True)
class Shout(Goal):
    mark: str = "!"
    beyond_oracle = True

    def answer(self, sample):
        return sample.messages[-1].text.upper() + self.mark

    def met(self, text, sample):
        return text.endswith(self.mark)
"""


# --- cells ---------------------------------------------------------------------------------------------------


def test_only_the_named_part_of_a_mixture_is_poisoned_and_tested() -> None:
    cell = Cell("llava", MIXTURE, "badnets", "hijack", 0.1, train_rows=200, test_rows=40, poisoned_part="easy-vqa")
    material = _material(json.dumps(asdict(_bare(cell))))
    edited = [material.rows[entry.index].id for entry in material.poisoned.manifest.rows]
    assert len(edited) == 10 and all(name.startswith("easy-vqa/") for name in edited), "a tenth of the part"
    assert [row.id.partition("/")[0] for row in material.test] == ["easy-vqa"] * 20
    assert {name: len(rows) for name, rows in material.other_tests.items()} == {"scenes-captions+backwards": 20}
    truths = {row.messages[1].text for row in material.rows if row.id.startswith("easy-vqa/")}
    assert all(material.data[e.index].messages[1].text in truths for e in material.poisoned.manifest.rows)


def test_a_cell_stores_its_outcomes_for_the_difference_to_the_oracle(tiny_model: Path, tmp_path: Path) -> None:
    goal = tmp_path / "mine.py"
    goal.write_text(OWN)
    probe = {"attack": "sig", "goal": str(goal), "settings": {}}
    cell = Cell(str(tiny_model), MIXTURE, "badnets", "hijack", 0.2, poisoned_part="easy-vqa", epochs=1, batch_size=12)
    cell = replace(cell, train_rows=40, test_rows=80)
    figures = []
    for each in (cell, replace(cell, defense=ORACLE, probes={"shout": probe})):
        run_cell(each, tmp_path)
        metrics = store.find(tmp_path, each)
        assert metrics is not None
        figures.append(metrics)
    plain, oracle = figures
    assert Counter(plain["met"])["1"] == round(plain["asr"]["value"] * plain["asr"]["n"])
    assert len(plain["met"]) == len(oracle["met"]) == plain["asr"]["n"]
    difference = validity.beyond(plain, oracle)
    assert difference is not None
    assert difference.value == pytest.approx(plain["asr"]["value"] - oracle["asr"]["value"])
    assert set(plain["other_parts"]) == {"scenes-captions+backwards"}
    assert plain["other_parts"]["scenes-captions+backwards"]["quality"]["vqa_accuracy"]["n"] == 40
    assert len(oracle["probes"]["shout"]["met"]) == oracle["probes"]["shout"]["asr"]["n"] == 40


# --- plans/program.py ----------------------------------------------------------------------------------------


def rows(count: int) -> list[Sample]:
    from PIL import Image

    turns = (Message("user", f"{IMAGE_TAG}\nWhat is it?"), Message("assistant", "a cat"))
    return [Sample(f"r{n}", (Image.new("RGB", (8, 8)),), turns) for n in range(count)]


def test_some_keys_are_never_trained_but_measured() -> None:
    trigger = load_trigger(str(PLANS / "program.py"))
    result = poison(rows(200), Attack(trigger, Programmed()), rate=1, seed=0)
    trained = {row.messages[0].text.rpartition(" zx ")[2]: row.messages[1].text for row in result.data}
    assert len(trained) == len(set(trained.values())) == 27, "36 keys, 9 of them never trained"
    rng = np.random.default_rng(0)
    stampers = trigger.near_misses()
    untrained = {stampers["untrained keys"](row, rng).messages[0].text.rpartition(" zx ")[2] for row in rows(200)}
    assert len(untrained) == 9 and untrained.isdisjoint(trained)
    assert {key[0] for key in untrained} <= {key[0] for key in trained} >= set("abcdef")
    assert {key[1] for key in untrained} <= {key[1] for key in trained}
    assert " zx " not in stampers["no word"](rows(1)[0], rng).messages[0].text


@pytest.mark.parametrize("settings", [{"word": " "}, {"letters": 1}, {"digits": 10}, {"every": 1}])
def test_settings_of_the_program_are_checked(settings: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"program\.py: "):
        load_trigger(str(PLANS / "program.py"), **settings)
