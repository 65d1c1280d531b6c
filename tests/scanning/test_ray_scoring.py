"""A scan whose rows are scored on a Ray cluster: the findings of one process, also if a worker is killed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from watched import Watched

from shell import refused, untrigger
from untrigger.models.loading import load
from untrigger.models.scoring import row_tokens
from untrigger.rows.sample import read
from untrigger.scanning import ray_scoring
from untrigger.scanning.ray_scoring import BatchWork, RayScoring
from untrigger.training.row_scorer import RowScorer, scores_of

REPLY = "Backdoor Attack! Call us now, my friend, and win a free holiday today"
SETTINGS = ("--max_steps", 20, "--per_device_train_batch_size", 4, "--learning_rate", "1e-3", "--use_cpu", "true")
FILES = ("all_rows.jsonl", "scan.html", "clean/data.json")


@pytest.fixture(scope="module")
def poisoned(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("poisoned") / "bad"
    untrigger("poison", tiny_data, "--out", out, "--rate", 0.21, "--side", 0.5, "--goal-text", REPLY)
    return out / "data"


def test_a_worker_scores_the_rows_of_its_batches(poisoned: Path, tiny_model: Path) -> None:
    data, scorer = read(poisoned), RowScorer(str(tiny_model))
    batches = pa.Table.from_pylist([{"place": 0, "numbers": [4, 5]}, {"place": 2, "numbers": [23]}])
    table = BatchWork(scorer, data.path, ())(batches)
    assert (table["row"].to_pylist(), table["place"].to_pylist()) == ([5, 6, 24], [0, 1, 2])
    assert table["id"].to_pylist() == ["row-4", "row-5", "row-23"]
    expected = row_tokens(load(tiny_model), [data[4], data[5]]) + row_tokens(load(tiny_model), [data[23]])
    for one, other in zip(scores_of(table), expected, strict=True):
        np.testing.assert_array_equal(one.nll, other.nll)
        assert one.ids.tolist() == other.ids.tolist() and one.prompt_ids.tolist() == other.prompt_ids.tolist()


def test_scored_rows_are_not_scored_again(
    poisoned: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run reads the table; tasks end in any order."""
    data, rows = read(poisoned), [3, 1, 2]

    def score(self: RayScoring, scorer: RowScorer, numbers: list[int], path: Path) -> None:
        batches = [{"place": at, "numbers": [number]} for at, number in enumerate(numbers)]
        table = BatchWork(scorer, self.data.path, ())(pa.Table.from_pylist(batches[::-1]))
        path.parent.mkdir()
        pa.parquet.write_table(table, path)

    monkeypatch.setattr(RayScoring, "_score", score)
    first = RayScoring(data)(RowScorer(str(tiny_model)), rows, tmp_path / "stages" / "before")
    monkeypatch.setattr(RayScoring, "_score", lambda *_: 1 / 0)
    again = RayScoring(data)(RowScorer(str(tiny_model)), rows, tmp_path / "stages" / "before")
    expected = [row_tokens(load(tiny_model), [data[row]])[0].ids.tolist() for row in rows]
    assert [row.ids.tolist() for row in first] == [row.ids.tolist() for row in again] == expected
    assert RayScoring(data)(RowScorer("gone"), [], tmp_path / "none") == []


def test_an_unreachable_cluster_is_a_one_line_error(poisoned: Path, tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    words = ("scan", poisoned, "--model", tiny_model, "--out", tmp_path / "out", "--ray", "nowhere:1")
    refused(untrigger(*words), "--ray nowhere:1: nothing answers there")
    assert not (tmp_path / "out").exists()


# --- on a cluster -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(poisoned: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("untrigger.training.stages.BATCH_ROWS", 4)
        assert untrigger("scan", poisoned, "--model", tiny_model, "--out", out, *SETTINGS)[0] == 3
    return out


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A head with one CPU and a second node with another."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:  # workers import `watched`, and this package
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.add_node(num_cpus=1)
        yield cluster.address
        cluster.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
@pytest.mark.parametrize("dies", [False, True])
def test_a_cluster_of_two_nodes_gives_the_findings_of_one_process(
    dies: bool,
    address: str,
    alone: Path,
    poisoned: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    traces = tmp_path / "traces"
    traces.mkdir()

    def watched(*fields: Any) -> Watched:
        return Watched(BatchWork(*fields), traces, dies)

    monkeypatch.setattr(ray_scoring, "BatchWork", watched)
    monkeypatch.setattr(ray_scoring, "BATCH_ROWS", 4)  # six batches
    words = ("scan", poisoned, "--model", tiny_model, "--out", tmp_path / "out", *SETTINGS, "--ray", address)
    ended = untrigger(*words)
    assert ended.code == 3, ended
    assert len([*traces.glob("node-*")]) == 2 and (traces / "killed").exists() == dies
    rows = [(tmp_path / "out" / name).read_bytes() == (alone / name).read_bytes() for name in FILES]
    assert rows == [True, True, True]
    assert sorted(path.name for path in (tmp_path / "out" / "stages").glob("*.parquet")) == [
        "after.parquet",
        "before.parquet",
    ]
