"""A sweep with substitutes for the work of a cell: which cells run, failures, and kills."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from stand_ins import CELL, cells, notes, quick, started_seeds, wait_for_another, work

from untrigger.bench import store
from untrigger.bench.local import on_this_machine
from untrigger.bench.sweep import run_matrix
from untrigger.errors import InputError
from untrigger.models.loading import weights_sha256


def wait_until(condition: object, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "timeout"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_missing_cells_run_once_in_another_process(tmp_path: Path) -> None:
    store.save(tmp_path, cells(1)[0], {"old": True}, {})
    assert run_matrix(cells(1, 2, 3, 2), tmp_path, work=work) == []
    assert started_seeds(tmp_path) == [2, 3]
    pids = {store.find(tmp_path, cell)["pid"] for cell in cells(2, 3)}  # type: ignore[index]
    assert len(pids) == 1 and os.getpid() not in pids, "one worker runs both cells"
    assert run_matrix(cells(1, 2, 3), tmp_path, work=work) == []
    assert started_seeds(tmp_path) == [2, 3], "nothing is missing the second time"


def test_a_failure_is_one_line_and_does_not_stop_other_cells(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    failed = run_matrix(cells(13, 14, 15, 16, 1), tmp_path, work=work, runner=on_this_machine(2))
    names = [cell.name for cell in cells(13, 14, 15, 16)]
    assert sorted(failed) == sorted(
        f"{name}: {reason}"
        for name, reason in zip(
            names,
            (
                "data: row 3: no image; take it out",
                "RuntimeError: out of memory",
                "was killed by signal 9; see log.txt in its folder",
                "ended with no result; see log.txt in its folder",
            ),
            strict=True,
        )
    )
    assert store.find(tmp_path, cells(1)[0]) is not None
    printed = capfd.readouterr()
    assert "this is cell" not in printed.out + printed.err, "the output of a cell goes to its log"
    for line in failed:
        assert printed.err.count(f"failed: {line}\n") == 1
    for cell, line in zip(cells(13, 14, 15, 16), sorted(failed), strict=False):
        assert line.partition(": ")[2] == store.failure(tmp_path, cell)
    assert "Traceback" in (store.folder_of(tmp_path, cells(14)[0]) / "log.txt").read_text()
    assert "this is cell 1\n" in (store.folder_of(tmp_path, cells(1)[0]) / "log.txt").read_text()


def test_a_missing_model_is_an_error_before_the_first_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    absent, root = replace(CELL, model="smol"), tmp_path / "results"
    with pytest.raises(InputError, match="models: smol: no such folder"):
        run_matrix([*cells(1), absent], root, work=work)
    assert not root.exists()
    store.save(root, absent, {"weights": "its former weights"}, {})
    assert run_matrix([*cells(1), absent], root, work=work) == [], "finished cells no longer need their model"


def test_failed_cells_run_again(tmp_path: Path) -> None:
    run_matrix(cells(16), tmp_path, work=work)
    assert store.failure(tmp_path, cells(16)[0]) is not None
    store.record_failure(tmp_path, cells(1)[0], "the disk was full")
    assert run_matrix(cells(1), tmp_path, work=work) == []
    assert store.failure(tmp_path, cells(1)[0]) is None


def test_cells_run_again_when_the_weights_of_their_model_change(tmp_path: Path) -> None:
    """Figures of old weights must not count as figures of the model's new weights."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"one")
    changed, same = (replace(CELL, model=str(model), seed=seed) for seed in (1, 2))
    now = weights_sha256(str(model))
    store.save(tmp_path, changed, {"weights": "of another alignment"}, {})
    store.save(tmp_path, same, {"weights": now}, {})
    store.save(tmp_path, replace(CELL, seed=3), {}, {})  # from a release that stored no hash
    store.save(tmp_path, replace(CELL, seed=4, model="hub/id"), {"weights": None}, {})
    assert run_matrix([changed, same, *cells(3), replace(CELL, seed=4, model="hub/id")], tmp_path, work=work) == []
    assert started_seeds(tmp_path) == [1]
    (model / "model.safetensors").write_bytes(b"two")
    assert weights_sha256(str(model)) != now


def test_workers_run_in_parallel_with_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert run_matrix(cells(1, 2), tmp_path, runner=on_this_machine(2), work=wait_for_another) == []
    assert {line[2] for line in notes(tmp_path)} == {"1"}
    assert os.environ["OMP_NUM_THREADS"] == "5", "only the workers' environment is changed"
    monkeypatch.delenv("OMP_NUM_THREADS")
    run_matrix(cells(3), tmp_path, work=work)
    assert notes(tmp_path)[-1][2] == "1", "a single worker also has one thread, or its answers would differ"
    assert "OMP_NUM_THREADS" not in os.environ


def test_cells_in_the_file_beside_the_folder_do_not_run_again(tmp_path: Path) -> None:
    root = tmp_path / "run"
    store.save(root, cells(1)[0], {"asr": {"value": 0.5}}, {})
    store.packed(root).write_text(store.packed_text([root]))
    shutil.rmtree(root)
    assert run_matrix(cells(1, 2), root, work=work) == []
    assert started_seeds(root) == [2]
    assert [cell.seed for cell, _ in store.results(root)] == [1, 2]
    with pytest.raises(
        InputError, match=r"run\.jsonl: is a file; give the folder .*run, cells of the file are not run again"
    ):
        run_matrix(cells(1, 2), store.packed(root), work=work)


def test_zero_jobs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 1"):
        run_matrix(cells(1), tmp_path, on_this_machine(0), work)


def test_a_killed_run_resumes_at_the_unfinished_cells(tmp_path: Path) -> None:
    """SIGKILL the parent while one cell is finished and two are running: these end too, and run again."""
    code = (
        "from pathlib import Path; from test_sweep import *; "
        f"run_matrix(cells(1, 90, 91, 2), Path({str(tmp_path)!r}), on_this_machine(2), work)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: started_seeds(tmp_path) == [1, 90, 91] or parent.poll() is not None)
        assert parent.poll() is None
        running = [int(line[3]) for line in notes(tmp_path) if line[0] == "start" and line[1] != "1"]
        assert all(map(alive, running))
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not any(map(alive, running)))
    assert [c.seed for c in store.missing(tmp_path, cells(1, 90, 91, 2))] == [90, 91, 2]
    assert not any(store.failure(tmp_path, cell) for cell in cells(1, 90, 91, 2)), "a kill is not a failure of a cell"
    assert run_matrix(cells(1, 90, 91, 2), tmp_path, work=quick, runner=on_this_machine(2)) == []
    assert started_seeds(tmp_path) == [1, 2, 90, 90, 91, 91], "the finished cell does not run again"


def test_an_interrupt_leaves_no_process_behind(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from stand_ins import *; from untrigger.bench.local import on_this_machine; "
        f"list(on_this_machine(2)(cells(90, 91), Path({str(tmp_path)!r}), work))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent, stderr=subprocess.DEVNULL)
    wait_until(lambda: started_seeds(tmp_path) == [90, 91] or parent.poll() is not None)
    assert parent.poll() is None
    parent.send_signal(signal.SIGINT)
    assert parent.wait(300) != 0
    assert not any(alive(int(line[3])) for line in notes(tmp_path))
