"""Cells on Ray: the same results as in worker processes of this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from stand_ins import cells, started_seeds, work

from untrigger.bench import store
from untrigger.bench.sweep import run_matrix
from untrigger.errors import InputError

pytest.importorskip("ray")

from untrigger.bench.ray_cluster import on_ray

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let Ray's workers import the substitutes of this folder."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]))
    yield


@pytest.mark.slow
def test_cells_run_on_a_local_cluster_despite_failures(tmp_path: Path) -> None:
    store.save(tmp_path, cells(1)[0], {"old": True}, {})
    failed = run_matrix(cells(1, 2, 3, 13, 15), tmp_path, on_ray(jobs=2), work)
    assert started_seeds(tmp_path) == [2, 3, 13, 15]
    assert [store.find(tmp_path, cell) is not None for cell in cells(1, 2, 3, 13, 15)] == [True] * 3 + [False] * 2
    assert sorted(line.partition(": ")[2].partition(";")[0] for line in failed) == [
        "WorkerCrashedError",
        "data: row 3: no image",
    ]
    pids = {store.find(tmp_path, cell)["pid"] for cell in cells(2, 3)}  # type: ignore[index]
    assert os.getpid() not in pids


def test_an_unreachable_cluster_is_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--ray nowhere:1: .+"):
        run_matrix(cells(1), tmp_path, on_ray("nowhere:1"), work)


def test_without_ray_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("untrigger.ray_session.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'untrigger\[ray\]'"):
        on_ray()
