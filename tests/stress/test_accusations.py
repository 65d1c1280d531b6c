"""`tests/stress/accusations.py` counts what a defense flags, and trains nothing after its verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from untrigger.bench.store import Cell
from untrigger.training.stages import Stages


@pytest.fixture
def accusations() -> Any:
    import accusations  # beside this file; it loads the model libraries

    return accusations


def test_the_last_training_is_left_out(accusations: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []
    train = Stages._train  # pyright: ignore[reportPrivateUsage]

    def recording(self: Stages, *args: Any) -> float:
        trained.append(args[2].name)
        return train(self, *args)

    monkeypatch.setattr(Stages, "_train", recording)
    settings: dict[str, Any] = {"train_rows": 24, "test_rows": 4, "clean_rows": 4, "epochs": 1.0, "batch_size": 8}
    for defense, stages in (("default", ["warmup"]), ("plain", [])):
        cell = Cell(str(tiny_model), "easy-vqa", "badnets", "fixed", rate=0.25, defense=defense, **settings)
        counts = accusations.accused(cell)
        assert (counts["rows"], counts["poisoned"]) == (24, 6) and counts["both"] <= counts["flagged"] <= 24
        assert trained == stages
        trained.clear()


def test_cells_are_judged_once(accusations: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, out, judged = tmp_path / "plan.yaml", tmp_path / "out.jsonl", list[Cell]()
    plan.write_text("models: [llava]\ndata: [easy-vqa]\nattacks: [badnets, sig]\ndefenses: [plain, oracle, paper]\n")
    monkeypatch.setattr(accusations, "accused", lambda cell: judged.append(cell) or {"flagged": 0})
    for _ in range(2):
        accusations.main(plan, out, "default")
        assert [cell.attack for cell in judged] == ["badnets", "sig"] and {cell.defense for cell in judged} == {
            "default"
        }
    assert len([json.loads(line) for line in out.read_text().splitlines()]) == 2
