"""Score the rows of a data file on a Ray cluster, through Ray Data."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast, final

import pyarrow as pa
import pyarrow.parquet as pq

from untrigger.files import new_file
from untrigger.models.scoring import BATCH_ROWS, TokenScores
from untrigger.rows.data_file import open_rows
from untrigger.rows.sample import Data, select_rows
from untrigger.training.row_scorer import SCORES, RowScorer, columns_of, scores_of

_TASKS = 8  # for each CPU: a lost one costs little


@final
@dataclass(frozen=True)
class RayScoring:
    """Scores rows by number as tasks of the connected cluster (`untrigger.ray_session.connected`).

    All machines must see data file, model and output folder under the same paths. A task reads its rows itself, in the
    batches of one process, so scores have the same bits on the same hardware. A task that dies with its worker or
    machine is run again. Scores lie in ``FOLDER.parquet``, and a resumed run reads them from there.

    Fields:
        data: the rows. gpus: that a task takes.
    """

    data: Data
    gpus: int = 0

    def __call__(self, scorer: RowScorer, rows: Sequence[int], folder: Path) -> list[TokenScores]:
        path = folder.with_suffix(".parquet")
        if not path.is_file() and len(rows):
            self._score(scorer, [self.data.numbers[row] for row in rows], path)
        if not len(rows):
            return []
        # tasks end in any order
        return scores_of(pq.read_table(path).sort_by("place"))

    def _score(self, scorer: RowScorer, numbers: Sequence[int], path: Path) -> None:
        import ray
        from ray.data import DataContext

        context = DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        starts = range(0, len(numbers), BATCH_ROWS)
        batches = [{"place": start, "numbers": list(numbers[start : start + BATCH_ROWS])} for start in starts]
        tasks = min(len(batches), _TASKS * int(ray.cluster_resources().get("CPU", 1)))
        work = BatchWork(scorer, self.data.path.resolve(), tuple(self.data.ignored))
        scored = ray.data.from_items(batches, override_num_blocks=tasks).map_batches(
            work, batch_size=1, batch_format="pyarrow", num_cpus=1, num_gpus=self.gpus
        )
        with new_file(path) as file, pq.ParquetWriter(file, SCORES.append(pa.field("place", pa.int64()))) as writer:
            for scores in scored.iter_batches(batch_size=None, batch_format="pyarrow"):
                table = cast(Any, scores)
                writer.write_table(table.select(writer.schema.names).cast(writer.schema))


@final
@dataclass(frozen=True)
class BatchWork:
    """What a worker does: scores the rows of the data file with the numbers of a batch."""

    scorer: RowScorer
    path: Path
    ignored: Sequence[str]

    def __call__(self, batches: pa.Table) -> pa.Table:
        tables: list[pa.Table] = []
        for batch in batches.to_pylist():
            data, numbers = _opened(self.path, self.ignored), batch["numbers"]
            samples = select_rows(data, numbers)
            scores = self.scorer.scores(samples)
            ids = [data.without_images(number).id for number in numbers]
            table = pa.table(columns_of([number + 1 for number in numbers], ids, scores), SCORES)
            tables.append(table.append_column("place", pa.array(range(batch["place"], batch["place"] + len(numbers)))))
        return pa.concat_tables(tables)


@lru_cache(maxsize=1)
def _opened(path: Path, ignored: Sequence[str]) -> Data:
    """The data file, opened once in a process; the driver has checked its rows."""
    rows = open_rows(path, ignored)
    return Data(path, rows, range(len(rows)), ignored=ignored)
