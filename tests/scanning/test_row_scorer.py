"""Scoring rows on other engines, and judging the scores: the same as in one process."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shell import untrigger
from untrigger import RowScorer, judge_scores, read
from untrigger.errors import InputError
from untrigger.models.loading import load
from untrigger.models.scoring import TokenScores, row_tokens
from untrigger.training.row_scorer import SCORES, scores_of

REPLY = "Backdoor Attack! Call us now, my friend, and win a free holiday today"
SETTINGS = ("--max_steps", 20, "--per_device_train_batch_size", 4, "--learning_rate", "1e-3", "--use_cpu", "true")


@pytest.fixture(scope="module")
def poisoned(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("poisoned") / "bad"
    untrigger("poison", tiny_data, "--out", out, "--rate", 0.21, "--side", 0.5, "--goal-text", REPLY)
    return out / "data"


@pytest.fixture(scope="module")
def columns(poisoned: Path) -> dict[str, list[Any]]:
    rows = json.loads((poisoned / "data.json").read_text())
    return {name: [row[name] for row in rows] for name in rows[0]} | {"row": [*range(1, len(rows) + 1)]}


@pytest.fixture(scope="module")
def expected(poisoned: Path, tiny_model: Path) -> list[TokenScores]:
    return row_tokens(load(tiny_model), read(poisoned))


@pytest.fixture
def scorer(tiny_model: Path, poisoned: Path) -> RowScorer:
    return pickle.loads(pickle.dumps(RowScorer(str(tiny_model), folder=poisoned)))


def same(table: pa.Table, expected: list[TokenScores]) -> None:
    scores = scores_of(table.cast(SCORES))
    assert len(scores) == len(expected)
    for one, other in zip(scores, expected, strict=True):
        for got, wanted in zip(one, other, strict=True):
            np.testing.assert_array_equal(got, wanted)


def in_a_dictionary(scorer: RowScorer, columns: dict[str, list[Any]]) -> pa.Table:
    return pa.table(scorer(columns))


def in_numpy(scorer: RowScorer, columns: dict[str, list[Any]]) -> pa.Table:
    """As Ray's default format wraps nested values."""
    arrays = {name: np.array([None, *values], dtype=object)[1:] for name, values in columns.items()}
    arrays["conversations"] = np.array([None, *map(np.array, columns["conversations"])], dtype=object)[1:]
    return pa.table(scorer(arrays))


def in_arrow(scorer: RowScorer, columns: dict[str, list[Any]]) -> pa.Table:
    return scorer(pa.table(columns))


def by_spark(scorer: RowScorer, columns: dict[str, list[Any]]) -> pa.Table:
    """The contract of mapInPandas: an iterator of frames to an iterator of frames."""
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(columns)
    (result,) = scorer.frames(iter([frame]))
    names = [field.split()[0] for field in RowScorer.SPARK_SCHEMA.split(", ")]
    assert isinstance(result, pandas.DataFrame) and [*result.columns] == names == SCORES.names
    return pa.Table.from_pandas(result, SCORES)


def by_datasets(scorer: RowScorer, columns: dict[str, list[Any]]) -> pa.Table:
    """Images of Pillow, rows without numbers."""
    datasets = pytest.importorskip("datasets")
    rows = {name: values for name, values in columns.items() if name != "row"}
    images = [Image.open(BytesIO((scorer.folder / name).read_bytes())) for name in rows.pop("image")]
    dataset = datasets.Dataset.from_dict(rows | {"image": images}).cast_column("image", datasets.Image())
    options = {"batched": True, "batch_size": 32, "with_indices": True, "remove_columns": dataset.column_names}
    mapped = dataset.to_iterable_dataset().map(scorer, **options)
    return pa.Table.from_pylist(list(mapped), SCORES)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("engine", [in_a_dictionary, in_numpy, in_arrow, by_spark, by_datasets])
def test_every_engine_scores_as_one_process(
    engine: Callable[[RowScorer, dict[str, list[Any]]], pa.Table],
    scorer: RowScorer,
    columns: dict[str, list[Any]],
    expected: list[TokenScores],
) -> None:
    table = engine(scorer, columns)
    same(table, expected)
    assert table["row"].to_pylist() == columns["row"] and table["id"].to_pylist() == columns["id"]


def test_answers_alone_need_no_model(scorer: RowScorer, columns: dict[str, list[Any]], expected: list[Any]) -> None:
    answers = RowScorer(scorer.model, Path("gone"), folder=scorer.folder, answers_only=True)
    assert [row.tolist() for row in answers(columns)["answer_ids"]] == [row.ids.tolist() for row in expected]


def test_scores_judged_apart_give_the_verdicts_of_a_scan(
    poisoned: Path, tiny_model: Path, columns: dict[str, list[Any]], tmp_path: Path
) -> None:
    assert untrigger("scan", poisoned, "--model", tiny_model, "--out", tmp_path / "scan", *SETTINGS)[0] == 3
    rows = sorted(map(json.loads, (tmp_path / "scan/all_rows.jsonl").read_text().splitlines()), key=lambda r: r["row"])
    order = np.random.default_rng(0).permutation(len(columns["row"]))  # engines keep no order
    shuffled = pa.table(columns).take(order)
    for name, weights in (("before", None), ("after", tmp_path / "scan/stages/warmup")):
        pq.write_table(RowScorer(str(tiny_model), weights, folder=poisoned)(shuffled), tmp_path / f"{name}.parquet")
    findings = judge_scores(tiny_model, tmp_path / "before.parquet", tmp_path / "after.parquet")
    assert [target.text for target in findings.targets] == [REPLY]
    for row, own in zip(findings.rows, rows, strict=True):
        wanted = {name: own[name] for name in row} | {"image_cue": None, "prompt_cue": None}
        assert row == wanted | {"score": pytest.approx(own["score"], abs=2e-3), "fdr": pytest.approx(own["fdr"])}
    some = pq.read_table(tmp_path / "after.parquet").slice(0, 12)
    assert judge_scores(tiny_model, tmp_path / "before.parquet", some).targets
    with pytest.raises(InputError, match=r"scores: row 99, id 'x' was not scored before; score the same rows"):
        other = some.slice(0, 1).set_column(0, "row", pa.array([99])).set_column(1, "id", pa.array(["x"]))
        judge_scores(tiny_model, tmp_path / "before.parquet", other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row": None, "id": None}, r"^a row has neither a 'row' nor an 'id'; add a column with its number, from 1$"),
        ({"image": "gone.png"}, r"^row 1: image 'gone.png'"),
        ({"row": None, "image": "gone.png"}, r"^row with the id 'row-0': image 'gone.png'"),
        ({"tools": "[]"}, r"^row 1: .*tools"),
    ],
)
def test_a_bad_row_is_named(
    scorer: RowScorer, columns: dict[str, list[Any]], change: dict[str, Any], message: str
) -> None:
    row = {name: values[0] for name, values in columns.items()} | change
    with pytest.raises(InputError, match=message):
        scorer({name: [value] for name, value in row.items() if value is not None})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"row": [1]}), r"^scores: lack the column 'id'; give what RowScorer returns$"),
        (SCORES.empty_table(), r"^scores: hold no rows; score at least one$"),
        ("gone.parquet", r"^gone.parquet: cannot be read \(.+\); give a Parquet file of scores$"),
    ],
)
def test_scores_that_cannot_be_judged(table: Any, message: str, tiny_model: Path) -> None:
    with pytest.raises(InputError, match=message):
        judge_scores(tiny_model, table)
