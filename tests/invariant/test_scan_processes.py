"""Two processes of one run suspect and flag the rows that one process does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launch import in_two_forks, under_torchrun, untrigger_here

from untrigger.training.processes import Share

# long, so that it surprises
REPLY = "Backdoor Attack! Call us now, my friend, and win a free holiday today"
RUN = ("--max_steps", 20, "--learning_rate", "1e-3", "--use_cpu", "true", "--save_strategy", "no")
TWO = ("--per_device_train_batch_size", 2, "--ddp_backend", "gloo")


@pytest.fixture(scope="module")
def poisoned(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("poisoned") / "bad"
    untrigger_here("poison", tiny_data, "--out", out, "--rate", 0.21, "--side", 0.5, "--goal-text", REPLY)
    return out / "data"


def lines(path: Path) -> list[dict[str, Any]]:
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: row["row"])


def verdicts(path: Path) -> list[tuple[Any, ...]]:
    """What people act on, and the score: near where training ended in the same weights up to rounding."""
    return [
        (row["row"], row.get("suspected"), row["flagged_text"], pytest.approx(row["score"], abs=0.02))
        for row in lines(path)
    ]


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_shares_are_whole_batches_and_cover_all_rows(
    count: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = [Share(count, 2, processes, index) for index in range(processes)]
    batches = [{*range(start, min(start + 2, count))} for start in range(0, count, 2)]
    for share in shares:
        rows = share.rows
        assert -(-len(rows) // 2) == -(-len(batches) // processes), "as many turns for each process"
        assert all({*rows[at : at + 2]} in batches for at in range(0, len(rows), 2))

    def gather(into: list[Any], _: Any) -> None:
        into[:] = [share.rows for share in shares]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    assert shares[0].gathered(shares[0].rows) == [*range(count)]


@pytest.mark.parametrize("verb", ["scan", "train"])
def test_two_processes_judge_as_one(
    verb: str, poisoned: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of few rows, so that both processes score some."""
    monkeypatch.setattr("untrigger.training.stages.BATCH_ROWS", 4)
    one, two = tmp_path / "one", tmp_path / "two"
    file = "all_rows.jsonl" if verb == "scan" else "flagged_rows.jsonl"
    code = 3 if verb == "scan" else 0
    words = (verb, poisoned, "--model", tiny_model, *RUN, "--out")
    assert untrigger_here(*words, one, "--per_device_train_batch_size", 4) == code
    assert in_two_forks(tmp_path, *words, two, *TWO) == [code, 0]
    assert verdicts(two / file) == verdicts(one / file) and lines(one / file)
    assert {path.name for path in (two / "stages" / "before").iterdir()} == {"0-of-2", "1-of-2"}
    if verb == "scan":
        assert (two / "clean" / "data.json").read_bytes() == (one / "clean" / "data.json").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["scan", "train"])
def test_torchrun_judges_as_one_process(verb: str, poisoned: Path, tiny_model: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    file = "all_rows.jsonl" if verb == "scan" else "flagged_rows.jsonl"
    words = (verb, poisoned, "--model", tiny_model, *RUN, "--out")
    untrigger_here(*words, one, "--per_device_train_batch_size", 4)
    run = under_torchrun(tmp_path, *words, two, *TWO)
    assert run.returncode == (verb == "scan"), run.stderr[-3000:]
    assert verb == "train" or "exitcode  : 3" in run.stderr, "torchrun reports it, and ends with 1 itself"
    assert verdicts(two / file) == verdicts(one / file)
