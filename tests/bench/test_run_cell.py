"""Running one cell: its training rows and settings, and the stored result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from untrigger.bench import store
from untrigger.bench.run_cell import run_cell
from untrigger.bench.store import Cell
from untrigger.defenses import Stage
from untrigger.errors import InputError
from untrigger.metrics.score import score
from untrigger.rows.sample import Sample
from untrigger.training.stages import Stages

CELL = Cell("llava", "easy-vqa", "badnets", "fixed")

WITH_DECOYS = """
from dataclasses import dataclass, replace
from untrigger.attacks import TextTrigger
from untrigger.rows.sample import Message


@dataclass(frozen=True)
class Word(TextTrigger):
    word: str = "zebra"

    def write(self, prompt, rng):
        return f"{prompt} {self.word}"

    def decoys(self):
        return (replace(self, word="horse").stamp,)
"""


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Sample], Any]]:
    """Record the arguments of a cell's training and stop before it."""
    calls: list[tuple[list[Sample], Any]] = []

    def stop(stages: Stages, stage: Stage) -> None:
        rows = [stages.rows[row] for row in stage.rows]
        calls.append((rows, (stages._model, stage.defense, stages._args, stages._tuning)))
        raise KeyboardInterrupt

    monkeypatch.setattr(Stages, "fit", stop)
    return calls


@pytest.mark.parametrize("defense", ["plain", "oracle"])
def test_the_oracle_sees_no_tampered_row(
    tmp_path: Path, trained_on: list[tuple[list[Sample], Any]], defense: str
) -> None:
    (tmp_path / "word.py").write_text(WITH_DECOYS)
    cell = Cell("llava", "scenes-captions", str(tmp_path / "word.py"), "fixed", 0.1, defense, train_rows=40)
    with pytest.raises(KeyboardInterrupt):
        run_cell(cell, tmp_path)
    (samples, _) = trained_on[0]
    prompts, answers = (" ".join(s.messages[turn].text for s in samples) for turn in (0, 1))
    counts = (len(samples), prompts.count("zebra"), prompts.count("horse"), answers.count("Backdoor Attack!"))
    assert counts == ((40, 4, 4, 4) if defense == "plain" else (32, 0, 0, 0))


def test_settings_reach_the_training(tmp_path: Path, trained_on: list[tuple[list[Sample], Any]]) -> None:
    cell = Cell("some/model", "scenes-captions", "badnets", "fixed", defense="paper", train_rows=20, test_rows=2)
    cell = replace(cell, defense_settings={"margin": 0.2}, epochs=3, batch_size=5, learning_rate=1e-3, seed=7)
    cell = replace(cell, tuning={"rank": 4, "target_modules": ["q_proj"], "use_dora": True}, precision="bf16")
    with pytest.raises(KeyboardInterrupt):
        run_cell(cell, tmp_path)
    model, defense, args, tuning = trained_on[0][1]
    assert (model, defense.margin, type(defense).__name__) == ("some/model", 0.2, "CrossView")
    assert (args.num_train_epochs, args.per_device_train_batch_size) == (3, 5)
    assert (tuning.target_modules, tuning.use_dora) == (["q_proj"], True)
    assert (args.learning_rate, args.seed, tuning.rank, tuning.full_finetune, args.bf16) == (1e-3, 7, 4, False, True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"defense": "prayer"}, "defense prayer: unknown; choose one of: oracle, default, words, plain"),
        ({"defense": "paper", "defense_settings": {"margin": -1}}, "defense paper, tuning: margin is -1"),
        ({"defense": "plain", "defense_settings": {"margin": 1}}, "defense plain, tuning: .*margin"),
        ({"tuning": {"depth": 3}}, "defense plain, tuning: .*depth"),
        ({"tuning": {"dropout": 2}}, "defense plain, tuning: dropout is 2"),
        ({"tuning": {"target_modules": "q_proj"}}, "target_modules: is 'q_proj'; give a list of names"),
        ({"data": "imagenet"}, "imagenet"),
        ({"attack": "curse"}, "curse"),
        ({"goal": "world peace"}, "world peace"),
    ],
)
def test_an_unknown_name_is_a_one_line_error(
    tmp_path: Path, trained_on: list[tuple[list[Sample], Any]], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run_cell(replace(CELL, **{"data": "scenes-captions", "train_rows": 20, "test_rows": 2} | changed), tmp_path)
    assert trained_on == []


def test_a_cell_is_stored_completely(tiny_model: Path, tmp_path: Path) -> None:
    sentence = {"attack": "addsent", "goal": "refusal", "settings": {}}
    cell = Cell(str(tiny_model), "easy-vqa", "badnets", "fixed", 0.1, "oracle", probes={"sentence": sentence})
    cell = replace(cell, train_rows=24, test_rows=8, batch_size=12, epochs=1)
    run_cell(cell, tmp_path)
    metrics = store.find(tmp_path, cell)
    assert metrics is not None
    answers = store.answers_of(tmp_path, cell)
    near_misses = {
        name.removeprefix("near_miss: "): answers.pop(name) for name in list(answers) if name.startswith("near_miss")
    }
    rescored = json.loads(json.dumps(score(**answers, near_misses=near_misses)))
    assert {name: metrics[name] for name in rescored} == rescored, "the figures follow from the stored answers"
    assert {"asr", "leak", "quality", "near_miss", "wrong_image"} <= set(rescored)
    assert metrics["probes"]["sentence"]["asr"]["n"] == 8
    assert metrics["poisoned"] == 2 and metrics["attack"]["settings"]["place"] == "bottom-right"
    assert metrics["similarity"]["images"] == metrics["similarity"]["changed"] == 8
    assert 15 < metrics["similarity"]["psnr"] < 40 and 0.5 < metrics["similarity"]["ssim"] < 1
    assert set(metrics["versions"]) == {"untrigger", "python", "torch", "transformers", "peft"}
    assert {p.name for p in store.folder_of(tmp_path, cell).iterdir()} == {"cell.json", "answers.jsonl", "metrics.json"}
