"""Score rows on any engine: a picklable function from columns of rows to columns of token scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast, final

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from untrigger.errors import InputError
from untrigger.models.loading import LoadedModel, processor_of, to_accelerator
from untrigger.models.quantized import is_quantized
from untrigger.models.scoring import TokenScores, row_answers, row_tokens
from untrigger.rows.formats import parse
from untrigger.rows.images import encode
from untrigger.rows.sample import Sample, opened
from untrigger.training.stage_models import load_base, load_stage
from untrigger.training.tuning import Tuning

SCORES = pa.schema(
    [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("answer_ids", pa.list_(pa.int64())),
        ("nll", pa.list_(pa.float32())),
        ("prompt_ids", pa.list_(pa.int64())),
    ]
)


def columns_of(numbers: Sequence[int | None], ids: Sequence[str], scores: Sequence[TokenScores]) -> dict[str, Any]:
    """The columns of `SCORES`: of each row its number, from 1, its id and its scores."""
    return {
        "row": list(numbers),
        "id": list(ids),
        "answer_ids": [row.ids for row in scores],
        "nll": [row.nll.astype(np.float32) for row in scores],
        "prompt_ids": [row.prompt_ids for row in scores],
    }


@final
@dataclass(frozen=True)
class RowScorer:
    """Columns of rows to columns of token scores: ``row``, ``id``, ``answer_ids``, ``nll`` (nats), ``prompt_ids``.

    It goes into `ray.data.Dataset.map_batches` with ``batch_format="pyarrow"`` or ``"pandas"``, into `datasets.map`
    with ``batched=True``, and its method `frames` into Spark's ``mapInPandas``. Each process loads the model once.

    Rows have the keys of a data file (docs/data.md); images may also be those of Pillow. A column ``row`` counts from
    1. Without it, the indices that `datasets` passes (``with_indices=True``) number the rows.

    Fields:
        model: an embedded model's name, a local folder or a hub id.
        weights: folder of a finished stage, such as a scan's ``stages/warmup``; None for the model before fine-tuning.
        tuning: which weights that stage trained.
        precision: of that training, float32, bfloat16 or float16.
        folder: what image paths are relative to.
        ignore_keys: keys of rows to ignore, whatever they hold.
        answers_only: whether only the answers' token ids are wanted, with an NLL of 0; no model is loaded.

    Raises:
        InputError: when called: a row is bad, or has neither a number nor an id; and as `load`.
    """

    model: str
    weights: Path | None = None
    tuning: Tuning = field(default_factory=Tuning)
    precision: str = "float32"
    folder: Path = Path()
    ignore_keys: Sequence[str] = ()
    answers_only: bool = False

    SPARK_SCHEMA: ClassVar[str] = (
        "row bigint, id string, answer_ids array<bigint>, nll array<float>, prompt_ids array<bigint>"
    )
    _loaded: ClassVar[dict[str, LoadedModel]] = {}  # the model that this process has loaded last

    def __call__(self, columns: Any, indices: Sequence[int] | None = None) -> Any:
        """Score a batch; the result is of its kind: a dictionary of lists, a pandas frame or an Arrow table."""
        rows = _records(columns)
        numbers = [row.pop("row", None) for row in rows] if indices is None else [at + 1 for at in indices]
        samples = [self._sample(row, number) for row, number in zip(rows, numbers, strict=True)]
        scores = self.scores(samples)
        result = columns_of(numbers, [sample.id for sample in samples], scores)
        if isinstance(columns, pa.Table | pa.RecordBatch):
            return pa.table(result, SCORES)
        return result if isinstance(columns, Mapping) else type(columns)(result)

    def frames(self, frames: Iterator[Any]) -> Iterator[Any]:
        """Score an iterator of pandas frames: ``rows.mapInPandas(scorer.frames, RowScorer.SPARK_SCHEMA)``."""
        return map(self, frames)

    def scores(self, samples: Sequence[Sample]) -> list[TokenScores]:
        """`untrigger.models.scoring.row_tokens` of samples."""
        if self.answers_only:
            ids = row_answers(processor_of(self.model), samples)
            return [TokenScores(row, np.zeros(len(row), np.float32)) for row in ids]
        return row_tokens(self._load(), samples)

    def _sample(self, row: dict[str, object], number: int | None) -> Sample:
        if number is None and row.get("id") is None:
            raise InputError("a row has neither a 'row' nor an 'id'; add a column with its number, from 1")
        try:
            return opened(parse(row, (number or 1) - 1, self.ignore_keys), self.folder)
        except InputError as error:
            name = f"row {number}" if number else f"row with the id {row['id']!r}"
            raise InputError(f"{name}: {error}") from None

    def _load(self) -> LoadedModel:
        key = repr(self)
        if key not in self._loaded:
            self._loaded.clear()
            device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            precision = getattr(torch, self.precision)
            model = load_base(self.model, self.tuning, precision, device or torch.device("cpu"))
            quantized = is_quantized(cast(Any, model.model))
            model = load_stage(model, self.tuning, self.weights) if self.weights else model
            self._loaded[key] = model if quantized else to_accelerator(model)
        return self._loaded[key]


def scores_of(table: pa.Table) -> list[TokenScores]:
    """The rows of a table with the columns of `SCORES`, in its order."""
    columns = [_arrays(table[name]) for name in ("answer_ids", "nll", "prompt_ids")]
    return [TokenScores(*row) for row in zip(*columns, strict=True)]


def _arrays(column: pa.ChunkedArray) -> list[Any]:
    """Each list of a column as an array."""
    lists = column.combine_chunks()
    lists = lists.combine_chunks() if isinstance(lists, pa.ChunkedArray) else lists
    sizes = np.asarray(lists.value_lengths())
    return np.split(lists.flatten().to_numpy(zero_copy_only=False), np.cumsum(sizes)[:-1]) if len(sizes) else []


def _records(columns: Any) -> list[dict[str, Any]]:
    """Rows as dictionaries of plain values, from any of the engines' batches."""
    if isinstance(columns, pa.Table | pa.RecordBatch):
        return columns.to_pylist()
    if not isinstance(columns, Mapping):
        columns = columns.to_dict("list")
    return [
        {name: _plain(value) for name, value in zip(columns, row, strict=True)}
        for row in zip(*columns.values(), strict=True)
    ]


def _plain(value: Any) -> Any:
    """A value without the array types that engines wrap lists and numbers in; images as files."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Image.Image):
        return {"bytes": encode(value), "path": None}
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return [*map(_plain, value)] if isinstance(value, list | tuple) else value
