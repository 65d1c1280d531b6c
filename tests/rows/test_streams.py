"""Rows read in passes: parquet, patterns of files and IterableDatasets, without a copy to TMPDIR."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from untrigger.errors import InputError
from untrigger.rows import arrow_batches
from untrigger.rows.arrow_batches import BATCH_ROWS, Part, PassedBatches
from untrigger.rows.sample import Data, read, write

ROWS = 300


def table(start: int = 0, count: int = ROWS) -> pa.Table:
    rng = np.random.default_rng(0)

    def picture() -> dict[str, Any]:
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    pictures = [picture() for _ in range(8)]
    rows = [
        {"id": f"r{n}", "image": pictures[n % 8], "question": f"what is {n}?", "answer": "a cat"}
        for n in range(start, start + count)
    ]
    return pa.Table.from_pylist(rows)


@pytest.fixture
def no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a copy in TMPDIR")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)


def ids(data: Data) -> list[str]:
    return [data.without_images(at).id for at in range(len(data))]


@pytest.mark.parametrize("group", [7, 100, ROWS])
def test_parquet_is_read_in_any_order_without_a_copy(group: int, tmp_path: Path, no_copies: None) -> None:
    pq.write_table(table(), tmp_path / "data.parquet", row_group_size=group)
    data = read(tmp_path / "data.parquet")
    assert ids(data) == [f"r{n}" for n in range(ROWS)]
    for at in np.random.default_rng(0).permutation(ROWS).tolist():
        assert data[at].id == f"r{at}" and data[at].messages[0].text.endswith(f"what is {at}?")
    write(data, tmp_path / "out", keep=[5, 2, 299])
    assert ids(read(tmp_path / "out")) == ["r5", "r2", "r299"]


def test_a_pattern_of_parquet_files(tmp_path: Path, no_copies: None) -> None:
    for name, start in (("b", 3), ("a", 0), ("c", 5)):
        pq.write_table(table(start, 3 if name == "a" else 2), tmp_path / f"{name}.parquet")
    data = read(tmp_path / "*.parquet")
    assert ids(data) == [f"r{n}" for n in range(7)] and data.path == tmp_path / "*.parquet"
    write(data, tmp_path / "out")
    assert ids(read(tmp_path / "out" / "data.parquet")) == ids(data)
    with pytest.raises(InputError, match=r"x\*\.parquet: no such file"):
        read(tmp_path / "x*.parquet")


def test_a_file_that_changes_between_passes_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_batches, "_KEPT", 0)
    pq.write_table(table(), tmp_path / "data.parquet")
    data = read(tmp_path / "data.parquet")
    pq.write_table(table(1), tmp_path / "data.parquet")
    with pytest.raises(InputError, match="changed while it was in use; start again"):
        data[0]


def test_an_iterable_dataset_is_read_in_passes(tmp_path: Path, no_copies: None) -> None:
    datasets = pytest.importorskip("datasets")
    pq.write_table(table(), tmp_path / "data.parquet", row_group_size=50)
    text = datasets.Value("string")
    features = datasets.Features({"id": text, "image": datasets.Image(), "question": text, "answer": text})
    stream = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "data.parquet"), features=features, split="train", streaming=True,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    data, expected = read(stream), read(tmp_path / "data.parquet")
    assert ids(data) == ids(expected)
    assert data[250].images[0].tobytes() == expected[250].images[0].tobytes() and data[3].id == "r3"
    write(data, tmp_path / "out", keep=[1])
    assert ids(read(tmp_path / "out")) == ["r1"]
    with pytest.raises(InputError, match=r"read: got a list; give a path, or an IterableDataset"):
        read([1])


# --- how often a part is begun, and what stays in memory --------------------------------------------


class Parts:
    """Parts of numbered rows that count their passes."""

    def __init__(self, *sizes: int, short: int = 0) -> None:
        self.begun = [0] * len(sizes)
        schema = pa.schema([("n", pa.int64()), ("pad", pa.string())])

        def read(part: int) -> Iterator[pa.RecordBatch]:
            self.begun[part] += 1
            start = sum(sizes[:part])
            numbers = range(start, start + sizes[part] - short)
            for at in range(0, len(numbers), 10):  # other batches than those that are given out
                some = list(numbers[at : at + 10])
                yield pa.RecordBatch.from_pylist([{"n": n, "pad": "x" * 100} for n in some], schema)

        self.batches = PassedBatches(
            schema, [Part(size, lambda part=part: read(part)) for part, size in enumerate(sizes)]
        )

    def row(self, number: int) -> int:
        for at, count in enumerate(self.batches.counts):
            if number < count:
                return self.batches[at]["n"][number].as_py()
            number -= count
        raise IndexError


def test_a_pass_begins_each_part_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_batches, "_KEPT", 0)
    parts = Parts(38, 0, 16, 1)
    assert parts.batches.counts == [16, 16, 6, 16, 1]
    for _ in range(2):
        assert [parts.row(n) for n in range(55)] == [*range(55)]
    assert parts.begun == [2, 0, 2, 2]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    size = Parts(BATCH_ROWS).batches[0].nbytes
    monkeypatch.setattr(arrow_batches, "_KEPT", 3 * size)
    parts = Parts(20 * BATCH_ROWS)
    for n in np.random.default_rng(0).integers(0, 20 * BATCH_ROWS, 50).tolist():
        assert parts.row(n) == n
        assert sum(batch.nbytes for batch in parts.batches._kept.values()) <= 3 * size


def test_a_large_part_that_is_begun_again_and_again_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_batches, "_KEPT", 0)
    small, large = Parts(20 * BATCH_ROWS), Parts(20 * BATCH_ROWS)
    for parts, limit in ((small, 10**9), (large, 1)):
        monkeypatch.setattr(arrow_batches, "_LARGE", limit)
        for n in range(20 * BATCH_ROWS - 1, 0, -1):
            assert parts.row(n) == n
    assert small.begun == [20] and large.begun == [8 + 1], "the last time to copy it"


def test_a_part_with_fewer_rows_than_it_says() -> None:
    with pytest.raises(ValueError, match="fewer rows than it says"):
        Parts(100, short=50).row(70)
