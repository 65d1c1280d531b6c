"""The matrix with stand-ins for the work of a cell: what runs, what is told, what a kill leaves behind.

And one cell: what it is trained on, what is kept of it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from untrigger import store
from untrigger.errors import InputError
from untrigger.matrix import run_cell, run_matrix
from untrigger.metrics.score import score
from untrigger.sample import Sample
from untrigger.store import Cell

CELL = Cell("llava", "easy-vqa", "badnets", "fixed")


def cells(*seeds: int) -> list[Cell]:
    return [replace(CELL, seed=seed) for seed in seeds]


def note(root: Path, what: str, cell: Cell) -> None:
    with (root / "notes").open("a") as file:
        file.write(f"{what} {cell.seed} {os.environ['OMP_NUM_THREADS']} {os.getpid()}\n")


def notes(root: Path) -> list[list[str]]:
    path = root / "notes"
    return [line.split() for line in path.read_text().splitlines()] if path.is_file() else []


def ran(root: Path) -> list[int]:
    return sorted(int(line[1]) for line in notes(root) if line[0] == "start")


def work(cell: Cell, root: Path) -> None:
    """In a training's place; what happens is told by the seed."""
    note(root, "start", cell)
    print(f"this is cell {cell.seed}")
    if cell.seed == 13:
        raise InputError("data: row 3: no image;\n take it out")
    if cell.seed == 14:
        raise RuntimeError("out of\nmemory")
    if cell.seed == 15:
        os.kill(os.getpid(), signal.SIGKILL)
    if cell.seed == 16:
        return
    if cell.seed >= 90:
        time.sleep(1000)
    store.save(root, cell, {"asr": {"value": 0.5}, "pid": os.getpid()}, {})
    note(root, "end", cell)


def meeting(cell: Cell, root: Path) -> None:
    """Ends only where another cell runs at the same time."""
    note(root, "start", cell)
    late = time.monotonic() + 300
    while len(ran(root)) < 2:
        assert time.monotonic() < late
        time.sleep(0.02)
    store.save(root, cell, {}, {})


def wait_until(met: object, seconds: float = 300.0) -> None:
    late = time.monotonic() + seconds
    while not met():  # type: ignore[operator]
        assert time.monotonic() < late, "it took too long"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether the process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_missing_cells_run_once_each_in_a_process_of_its_own(tmp_path: Path) -> None:
    store.save(tmp_path, cells(1)[0], {"old": True}, {})
    assert run_matrix(cells(1, 2, 3, 2), tmp_path, work=work) == []
    assert ran(tmp_path) == [2, 3]
    pids = {store.find(tmp_path, cell)["pid"] for cell in cells(2, 3)}  # type: ignore[index]
    assert len(pids) == 2 and os.getpid() not in pids
    assert run_matrix(cells(1, 2, 3), tmp_path, work=work) == []
    assert ran(tmp_path) == [2, 3], "nothing is missing the second time"


def test_failures_are_told_in_a_line_and_stop_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    failed = run_matrix(cells(13, 14, 15, 16, 1), tmp_path, work=work, workers=2)
    whose = [cell.name for cell in cells(13, 14, 15, 16)]
    assert sorted(failed) == sorted(
        f"{name}: {why}"
        for name, why in zip(
            whose,
            (
                "data: row 3: no image; take it out",
                "RuntimeError: out of memory",
                "was killed by signal 9; see log.txt in its folder",
                "ended with code 0 and no result; see log.txt in its folder",
            ),
            strict=True,
        )
    )
    assert store.find(tmp_path, cells(1)[0]) is not None
    shown = capfd.readouterr()
    assert "this is cell" not in shown.out + shown.err, "what a cell prints goes to its log"
    for cell, line in zip(cells(13, 14, 15, 16), sorted(failed), strict=False):
        assert line.partition(": ")[2] == store.failure(tmp_path, cell)
    assert "Traceback" in (store.folder_of(tmp_path, cells(14)[0]) / "log.txt").read_text()
    assert "this is cell 1\n" in (store.folder_of(tmp_path, cells(1)[0]) / "log.txt").read_text()


def test_failed_cells_are_tried_again(tmp_path: Path) -> None:
    run_matrix(cells(16), tmp_path, work=work)
    assert store.failure(tmp_path, cells(16)[0]) is not None
    store.fail(tmp_path, cells(1)[0], "the disk was full")
    assert run_matrix(cells(1), tmp_path, work=work) == []
    assert store.failure(tmp_path, cells(1)[0]) is None


def test_workers_run_at_once_with_a_thread_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert run_matrix(cells(1, 2), tmp_path, workers=2, work=meeting) == []
    assert {line[2] for line in notes(tmp_path)} == {"1"}
    assert os.environ["OMP_NUM_THREADS"] == "5", "only the workers' is set"
    monkeypatch.delenv("OMP_NUM_THREADS")
    run_matrix(cells(3), tmp_path, work=work)
    assert notes(tmp_path)[-1][2] == "1", "a worker alone has no more, or its answers would be others"
    assert "OMP_NUM_THREADS" not in os.environ


def test_no_workers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 1"):
        run_matrix(cells(1), tmp_path, workers=0, work=work)


def test_killed_at_any_moment_it_goes_on_where_it_was(tmp_path: Path) -> None:
    """SIGKILL to the parent while one cell is done and two are in flight: these end too, and run again."""
    code = (
        "from pathlib import Path; import test_matrix as t; "
        f"t.run_matrix(t.cells(1, 90, 91, 2), Path({str(tmp_path)!r}), work=t.work, workers=2)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: ran(tmp_path) == [1, 90, 91] or parent.poll() is not None)
        assert parent.poll() is None
        in_flight = [int(line[3]) for line in notes(tmp_path) if line[0] == "start" and line[1] != "1"]
        assert all(map(alive, in_flight))
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not any(map(alive, in_flight)))
    assert [c.seed for c in store.missing(tmp_path, cells(1, 90, 91, 2))] == [90, 91, 2]
    assert not any(store.failure(tmp_path, cell) for cell in cells(1, 90, 91, 2)), "a kill is no failure of a cell"
    assert run_matrix(cells(1, 90, 91, 2), tmp_path, work=quick, workers=2) == []
    assert ran(tmp_path) == [1, 2, 90, 90, 91, 91], "the finished cell did not run again"


def quick(cell: Cell, root: Path) -> None:
    note(root, "start", cell)
    store.save(root, cell, {}, {})


def test_an_interrupt_leaves_no_process_behind(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; import test_matrix as t; "
        f"t.run_matrix(t.cells(90, 91), Path({str(tmp_path)!r}), work=t.work, workers=2)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent, stderr=subprocess.DEVNULL)
    wait_until(lambda: ran(tmp_path) == [90, 91] or parent.poll() is not None)
    assert parent.poll() is None
    parent.send_signal(signal.SIGINT)
    assert parent.wait(300) != 0
    assert not any(alive(int(line[3])) for line in notes(tmp_path))


# --- one cell --------------------------------------------------------------------------------------

WITH_DECOYS = """
from dataclasses import dataclass, replace
from untrigger.attacks import TextTrigger
from untrigger.sample import Message


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
    """What the training of a cell is given; nothing is trained."""
    given: list[tuple[list[Sample], Any]] = []

    def stop(samples: Any, model: str, defense: Any, args: Any, *, tuning: Any) -> None:
        given.append((list(samples), (model, defense, args, tuning)))
        raise KeyboardInterrupt

    monkeypatch.setattr("untrigger.finetune.fine_tune", stop)
    return given


@pytest.mark.parametrize("defense", ["plain", "oracle"])
def test_the_oracle_sees_no_tampered_row(
    tmp_path: Path, trained_on: list[tuple[list[Sample], Any]], defense: str
) -> None:
    (tmp_path / "word.py").write_text(WITH_DECOYS)
    cell = Cell("llava", "scenes-captions", str(tmp_path / "word.py"), "fixed", 0.1, defense, train_rows=40)
    with pytest.raises(KeyboardInterrupt):
        run_cell(cell, tmp_path)
    (samples, _) = trained_on[0]
    asked, said = (" ".join(s.messages[turn].text for s in samples) for turn in (0, 1))
    counts = (len(samples), asked.count("zebra"), asked.count("horse"), said.count("Backdoor Attack!"))
    assert counts == ((40, 4, 4, 4) if defense == "plain" else (32, 0, 0, 0))


def test_settings_reach_the_training(tmp_path: Path, trained_on: list[tuple[list[Sample], Any]]) -> None:
    cell = Cell("some/model", "scenes-captions", "badnets", "fixed", defense="paper", train_rows=20, test_rows=2)
    cell = replace(cell, defense_settings={"margin": 0.2}, epochs=3, batch_size=5, learning_rate=1e-3, seed=7)
    cell = replace(cell, tuning={"rank": 4})
    with pytest.raises(KeyboardInterrupt):
        run_cell(cell, tmp_path)
    model, defense, args, tuning = trained_on[0][1]
    assert (model, defense.margin, type(defense).__name__) == ("some/model", 0.2, "CrossView")
    assert (args.num_train_epochs, args.per_device_train_batch_size) == (3, 5)
    assert (args.learning_rate, args.seed, tuning.rank, tuning.full) == (1e-3, 7, 4, False)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"defense": "prayer"}, "defense prayer: unknown; choose one of: oracle, plain"),
        ({"defense": "paper", "defense_settings": {"margin": -1}}, "defense paper, tuning: margin is -1"),
        ({"defense": "plain", "defense_settings": {"margin": 1}}, "defense plain, tuning: .*margin"),
        ({"tuning": {"depth": 3}}, "defense plain, tuning: .*depth"),
        ({"data": "imagenet"}, "imagenet"),
        ({"attack": "curse"}, "curse"),
        ({"goal": "world peace"}, "world peace"),
    ],
)
def test_what_is_not_there_is_told_in_a_line(
    tmp_path: Path, trained_on: list[tuple[list[Sample], Any]], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run_cell(replace(CELL, **{"data": "scenes-captions", "train_rows": 20, "test_rows": 2} | changed), tmp_path)
    assert trained_on == []


def test_a_cell_is_kept_whole(tiny_model: Path, tmp_path: Path) -> None:
    sentence = {"attack": "addsent", "goal": "refusal", "settings": {}}
    cell = Cell(str(tiny_model), "easy-vqa", "badnets", "fixed", 0.1, "oracle", probes={"sentence": sentence})
    cell = replace(cell, train_rows=24, test_rows=8, batch_size=12, epochs=1)
    run_cell(cell, tmp_path)
    metrics = store.find(tmp_path, cell)
    assert metrics is not None
    said = store.answers_of(tmp_path, cell)
    near = {name.removeprefix("near_miss: "): said.pop(name) for name in list(said) if name.startswith("near_miss")}
    again = json.loads(json.dumps(score(**said, near_misses=near)))
    assert {name: metrics[name] for name in again} == again, "the figures follow from the stored answers"
    assert {"asr", "leak", "quality", "near_miss", "wrong_image"} <= set(again)
    assert metrics["probes"]["sentence"]["asr"]["n"] == 8
    assert metrics["poisoned"] == 2 and metrics["attack"]["settings"]["place"] == "bottom-right"
    assert metrics["similarity"]["images"] == metrics["similarity"]["changed"] == 8
    assert 15 < metrics["similarity"]["psnr"] < 40 and 0.5 < metrics["similarity"]["ssim"] < 1
    assert set(metrics["versions"]) == {"untrigger", "python", "torch", "transformers", "peft"}
    assert {p.name for p in store.folder_of(tmp_path, cell).iterdir()} == {"cell.json", "answers.jsonl", "metrics.json"}


@pytest.mark.slow
def test_an_embedded_model_takes_the_backdoor(tmp_path: Path) -> None:
    probes = {name: {"attack": name, "goal": "fixed", "settings": {}} for name in ("blended", "badword")}
    cells = [CELL, replace(CELL, defense="oracle", probes=probes)]
    cells = [replace(cell, split="dev", seed=100, test_rows=200) for cell in cells]
    assert run_matrix(cells, tmp_path, workers=2) == []
    plain, oracle = (store.find(tmp_path, cell) for cell in cells)
    assert plain is not None and oracle is not None
    assert plain["asr"]["value"] >= 0.90
    assert max(probe["asr"]["value"] for probe in (oracle, *oracle["probes"].values())) <= 0.05
    assert oracle["quality"]["vqa_accuracy"]["value"] > oracle["wrong_image"]["value"] + 0.1
