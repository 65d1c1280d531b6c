"""The matrix with stand-ins for the work of a cell: what runs, what is told, what a kill leaves behind."""

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
from stand_ins import CELL, cells, meeting, notes, quick, ran, work

from untrigger.bench import store
from untrigger.bench.local import on_this_machine
from untrigger.bench.sweep import run_matrix
from untrigger.errors import InputError
from untrigger.models.loading import weights_sha256


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


def test_missing_cells_run_once_each_in_another_process(tmp_path: Path) -> None:
    store.save(tmp_path, cells(1)[0], {"old": True}, {})
    assert run_matrix(cells(1, 2, 3, 2), tmp_path, work=work) == []
    assert ran(tmp_path) == [2, 3]
    pids = {store.find(tmp_path, cell)["pid"] for cell in cells(2, 3)}  # type: ignore[index]
    assert len(pids) == 1 and os.getpid() not in pids, "one process runs them one after the other"
    assert run_matrix(cells(1, 2, 3), tmp_path, work=work) == []
    assert ran(tmp_path) == [2, 3], "nothing is missing the second time"


def test_failures_are_told_in_a_line_and_stop_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    failed = run_matrix(cells(13, 14, 15, 16, 1), tmp_path, work=work, runner=on_this_machine(2))
    whose = [cell.name for cell in cells(13, 14, 15, 16)]
    assert sorted(failed) == sorted(
        f"{name}: {why}"
        for name, why in zip(
            whose,
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
    shown = capfd.readouterr()
    assert "this is cell" not in shown.out + shown.err, "what a cell prints goes to its log"
    for line in failed:
        assert shown.err.count(f"failed: {line}\n") == 1
    for cell, line in zip(cells(13, 14, 15, 16), sorted(failed), strict=False):
        assert line.partition(": ")[2] == store.failure(tmp_path, cell)
    assert "Traceback" in (store.folder_of(tmp_path, cells(14)[0]) / "log.txt").read_text()
    assert "this is cell 1\n" in (store.folder_of(tmp_path, cells(1)[0]) / "log.txt").read_text()


def test_a_model_that_is_not_there_is_told_before_the_first_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    gone, root = replace(CELL, model="smol"), tmp_path / "results"
    with pytest.raises(InputError, match="models: smol: no such folder"):
        run_matrix([*cells(1), gone], root, work=work)
    assert not root.exists()
    store.save(root, gone, {"weights": "those that it had"}, {})
    assert run_matrix([*cells(1), gone], root, work=work) == [], "what is done needs its model no more"


def test_failed_cells_are_tried_again(tmp_path: Path) -> None:
    run_matrix(cells(16), tmp_path, work=work)
    assert store.failure(tmp_path, cells(16)[0]) is not None
    store.fail(tmp_path, cells(1)[0], "the disk was full")
    assert run_matrix(cells(1), tmp_path, work=work) == []
    assert store.failure(tmp_path, cells(1)[0]) is None


def test_cells_of_a_model_that_has_changed_are_run_again(tmp_path: Path) -> None:
    """Figures of other weights under the same name would pass for the model's own."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"one")
    changed, same = (replace(CELL, model=str(model), seed=seed) for seed in (1, 2))
    now = weights_sha256(str(model))
    store.save(tmp_path, changed, {"weights": "of another alignment"}, {})
    store.save(tmp_path, same, {"weights": now}, {})
    store.save(tmp_path, replace(CELL, seed=3), {}, {})  # by a release that kept no hash
    store.save(tmp_path, replace(CELL, seed=4, model="hub/id"), {"weights": None}, {})
    assert run_matrix([changed, same, *cells(3), replace(CELL, seed=4, model="hub/id")], tmp_path, work=work) == []
    assert ran(tmp_path) == [1]
    (model / "model.safetensors").write_bytes(b"two")
    assert weights_sha256(str(model)) != now


def test_workers_run_at_once_with_a_thread_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert run_matrix(cells(1, 2), tmp_path, runner=on_this_machine(2), work=meeting) == []
    assert {line[2] for line in notes(tmp_path)} == {"1"}
    assert os.environ["OMP_NUM_THREADS"] == "5", "only the workers' is set"
    monkeypatch.delenv("OMP_NUM_THREADS")
    run_matrix(cells(3), tmp_path, work=work)
    assert notes(tmp_path)[-1][2] == "1", "a worker alone has no more, or its answers would be others"
    assert "OMP_NUM_THREADS" not in os.environ


def test_what_a_file_beside_the_folder_holds_is_not_run_again(tmp_path: Path) -> None:
    root = tmp_path / "run"
    store.save(root, cells(1)[0], {"asr": {"value": 0.5}}, {})
    store.packed(root).write_text(store.packed_text([root]))
    shutil.rmtree(root)
    assert run_matrix(cells(1, 2), root, work=work) == []
    assert ran(root) == [2]
    assert [cell.seed for cell, _ in store.results(root)] == [1, 2]
    with pytest.raises(InputError, match=r"run\.jsonl: is a file; give the folder .*run, what the file holds is done"):
        run_matrix(cells(1, 2), store.packed(root), work=work)


def test_no_workers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 1"):
        run_matrix(cells(1), tmp_path, on_this_machine(0), work)


def test_killed_at_any_moment_it_goes_on_where_it_was(tmp_path: Path) -> None:
    """SIGKILL to the parent while one cell is done and two are in flight: these end too, and run again."""
    code = (
        "from pathlib import Path; from test_sweep import *; "
        f"run_matrix(cells(1, 90, 91, 2), Path({str(tmp_path)!r}), on_this_machine(2), work)"
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
    assert run_matrix(cells(1, 90, 91, 2), tmp_path, work=quick, runner=on_this_machine(2)) == []
    assert ran(tmp_path) == [1, 2, 90, 90, 91, 91], "the finished cell did not run again"


def test_an_interrupt_leaves_no_process_behind(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from stand_ins import *; from untrigger.bench.local import on_this_machine; "
        f"list(on_this_machine(2)(cells(90, 91), Path({str(tmp_path)!r}), work))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent, stderr=subprocess.DEVNULL)
    wait_until(lambda: ran(tmp_path) == [90, 91] or parent.poll() is not None)
    assert parent.poll() is None
    parent.send_signal(signal.SIGINT)
    assert parent.wait(300) != 0
    assert not any(alive(int(line[3])) for line in notes(tmp_path))
