"""Plans with the user's own data and models: their entries, and a whole run with stand-ins for what nobody has here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
from published_data import TRAIN, VAL, coco_captions, vqa
from shell import refused, untrigger
from untrigger.bench import store
from untrigger.bench.local import Done, Work, attempt
from untrigger.bench.plan import read_plan
from untrigger.bench.run_cell import arguments_of, material_of
from untrigger.bench.store import Cell
from untrigger.errors import InputError
from untrigger.poisoning.poison import stamped

PLAN = Path(__file__).parents[2] / "plans" / "coco-7b.yaml"
OWN = """
models:
  - llava
  - model: my/model
    precision: bf16
    batch_size: 4
    gradient_accumulation_steps: 4
    target_modules: [q_proj, v_proj]
    lora_rank: 8
data:
  - scenes-captions
  - {name: mine, train: mine/train.json, test: OWNER/NAME:test, task: captions, metric: rouge_l}
attacks: [badnets, {attack: blended, data: [mine]}]
defenses: [plain]
cell: {tuning: {rank: 4, dropout: 0.1}}
where:
  "*/my/model/mine": {tuning: {alpha: 64}}
"""


def cells_of(text: str, tmp_path: Path) -> list[Cell]:
    (tmp_path / "plan.yaml").write_text(text)
    return read_plan(tmp_path / "plan.yaml")


def test_entries_reach_the_cells(tmp_path: Path) -> None:
    cells = cells_of(OWN, tmp_path)
    assert len(cells) == 2 * 2 * (1 + 2), "one attack on the bundled data, two on the own"
    assert {cell.data for cell in cells if cell.attack == "blended"} == {"mine"}
    (cell,) = [c for c in cells if (c.model, c.data, c.attack, c.defense) == ("my/model", "mine", "badnets", "plain")]
    assert cell.own_data == {
        "train": "mine/train.json",
        "test": "OWNER/NAME:test",
        "task": "captions",
        "metric": "rouge_l",
    }
    assert (cell.task, cell.metric, cell.precision, cell.batch_size) == ("captions", "rouge_l", "bf16", 4)
    assert cell.tuning == {"rank": 8, "dropout": 0.1, "alpha": 64, "target_modules": ["q_proj", "v_proj"]}
    assert arguments_of(cell, tmp_path).gradient_accumulation_steps == 4
    assert store.Cell(**json.loads(json.dumps(asdict(cell)))) == cell, "a cell is what its JSON says"
    bundled = next(c for c in cells if (c.model, c.data) == ("llava", "scenes-captions"))
    assert (bundled.own_data, bundled.arguments, bundled.tuning) == ({}, {}, {"rank": 4, "dropout": 0.1})
    assert (bundled.metric, bundled.task) == ("cider", "captions")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("name: mine", "name: emoji"), "data: name is 'emoji'; give your data a name of its own"),
        (("name: mine", "name: a/b"), "data: name is 'a/b'"),
        (("name: mine, ", ""), "data: name is None"),
        (("test: OWNER/NAME:test, ", ""), "data mine: test is missing"),
        (("metric: rouge_l", "metric: vqa_accuracy"), "data mine: metric is 'vqa_accuracy'"),
        (("model: my/model", "name: my/model"), "names no model; write NAME or"),
        (("precision: bf16", "precison: bf16"), "model my/model: precison is unknown; .*; did you mean precision"),
        (("precision: bf16", "precision: bf8"), "precision is 'bf8'"),
        (("target_modules: [q_proj, v_proj]", "target_modules: q_proj"), "give a list of names"),
        (("batch_size: 4", "per_device_train_batch_size: 4"), "per_device_train_batch_size is unknown"),
        (("gradient_accumulation_steps: 4", "lr_scheduler_type: round"), "model my/model: .*round"),
        (("data: [mine]", "data: [yours]"), r"attack blended: data is \['yours'\]; list names of the plan: scenes-"),
        (("cell: {", "cell: {poisoned_part: mine, "), "poisoned_part is 'mine'"),
    ],
)
def test_a_wrong_entry_is_a_one_line_error(tmp_path: Path, changed: tuple[str, str], message: str) -> None:
    assert changed[0] in OWN
    with pytest.raises(InputError, match=message) as error:
        cells_of(OWN.replace(*changed), tmp_path)
    assert str(error.value).startswith(str(tmp_path / "plan.yaml")) and "\n" not in str(error.value)


# --- a whole run -------------------------------------------------------------------------------------


def stand_ins(folder: Path, models: Sequence[str]) -> dict[str, Any]:
    """The 7B plan with tiny models, small data of the same layouts, and few rows; made in ``folder``."""
    plan: dict[str, Any] = yaml.safe_load(PLAN.read_text())
    coco = folder / "coco"
    for year, rows in ((TRAIN, 160), (VAL, 70)):
        coco_captions(coco, year, rows)
        vqa(coco, year, rows)
    plan["models"] = [{**entry, "model": f"tiny-{name}"} for entry, name in zip(plan["models"], models, strict=False)]
    for name in models:
        tiny.make(name, folder / f"tiny-{name}")
    program = PLAN.parent / "program.py"
    plan["attacks"] = [
        {**entry, "attack": str(program)} if isinstance(entry, dict) and entry["attack"].endswith(".py") else entry
        for entry in plan["attacks"]
    ]
    plan["cell"] |= {"train_rows": 60, "test_rows": 24, "clean_rows": 4}
    plan["rates"] = [0.05]
    del plan["sizes"]
    return plan


def in_this_process(cells: Sequence[Cell], root: Path, work: Work) -> Done:
    return ((cell, attempt(work, cell, root)) for cell in cells)


def test_a_run_of_the_plan_with_stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = stand_ins(tmp_path, ["llava"])
    plan |= {"attacks": ["badnets"], "defenses": ["plain", "oracle"]}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    monkeypatch.setattr("untrigger.bench.local.on_this_machine", lambda jobs: in_this_process)
    monkeypatch.chdir(tmp_path)  # paths count from where the command runs
    dry = untrigger("bench", "plan.yaml", "--out", "runs", "--dry-run")
    assert dry.code == 0 and "GPU hours" in dry.out and "warning" not in dry.out
    ended = untrigger("bench", "plan.yaml", "--out", "runs")
    assert ended.code == 0 and ended.out.startswith("runs: 4 of 4 cells"), ended
    for cell in read_plan(Path("plan.yaml")):
        metrics = store.find(Path("runs"), cell)
        assert metrics is not None and metrics["quality"][cell.metric] is not None
        references = {len(answer.references) for answer in store.answers_of(Path("runs"), cell)["clean"]}
        assert references == {10 if cell.data == "vqav2" else 5}
    for suffix in (".html", ".md", ".json", ".jsonl"):
        assert untrigger("report", "runs", "--out", f"out{suffix}").code == 0
    page = Path("out.md").read_text()
    assert "### tiny-llava, coco (captions)" in page and "### tiny-llava, vqav2 (VQA)" in page
    assert len(store.results(Path("out.jsonl"))) == 4
    assert untrigger("report", "out.jsonl", "--out", "again.json").code == 0
    assert Path("again.json").read_text() == Path("out.json").read_text()
    (tmp_path / "coco/annotations").rename(tmp_path / "away")
    again = untrigger("bench", "plan.yaml", "--out", "runs")
    assert again.code == 0, "finished cells need their data no more"
    refused(untrigger("bench", "plan.yaml", "--out", "more"), "data: coco/annotations/captions_train2014.json: no such")


def test_every_attack_of_the_plan_fits_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = stand_ins(tmp_path, ["llava"]) | {"defenses": ["plain"]}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in read_plan(Path("plan.yaml")) if cell.defense == "plain"]
    assert len(cells) == 11 + 8
    for cell in cells:
        material = material_of(cell)
        assert len(material.poisoned.manifest.rows) == 3 and len(material.clean_rows) == 4
        attack = material.attack.fitted(material.test, cell.seed)
        triggered = stamped(material.test, attack, cell.seed)
        assert any(not attack.goal.met(row.messages[-1].text, row) for row in triggered), cell.name


@pytest.mark.slow
def test_every_model_and_defense_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = stand_ins(tmp_path, ["llava", "qwen2_5_vl", "internvl"]) | {"attacks": ["badnets"]}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    monkeypatch.setattr("untrigger.bench.local.on_this_machine", lambda jobs: in_this_process)
    monkeypatch.chdir(tmp_path)
    ended = untrigger("bench", "plan.yaml", "--out", "runs")
    assert ended.code == 0, ended.err
    assert not store.missing(Path("runs"), read_plan(Path("plan.yaml")))
    assert untrigger("report", "runs", "--out", "out.html").code == 0
