"""Judge token scores that were computed elsewhere: no model runs, and no row is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from untrigger.defenses import Plain, SharedCause, Stage
from untrigger.defenses.shared_cause import Judgment
from untrigger.defenses.shared_surprise import Screening, containing
from untrigger.errors import InputError
from untrigger.models.loading import LoadedModel, processor_of
from untrigger.scanning.findings import Findings
from untrigger.scanning.targets import findings_of
from untrigger.training.row_scorer import SCORES, scores_of

Scores = Path | str | pa.Table
"""A Parquet file or a folder of such files, or a table, with the columns of `untrigger.training.row_scorer.SCORES`."""


def judge_scores(
    model: str | Path, before: Scores, after: Scores | None = None, defense: SharedCause | None = None
) -> Findings:
    """Verdicts from the token scores of `untrigger.training.row_scorer.RowScorer`.

    Rows that share a surprising text are suspected, as by `untrigger.scan`, without maps of their cue. Rows that share
    no text are not tested: that trains a model. ``scan --ray`` does all of it.

    Args:
        model: what the rows were scored with, to write tokens as text; its weights are not loaded.
        before: scores by the model before fine-tuning.
        after: scores of some or all of these rows after a warm-up on the data; a row counts with the answer's smaller
            NLL of the two. Without them, an answer that any such data makes likely may surprise.
        defense: how rows are flagged; the preset ``default`` if left out.

    Raises:
        InputError: there are no scores, a column is missing, or ``after`` has other rows.
    """
    defense, rows = defense or SharedCause(), _read(before)
    names = list(zip(rows["row"].to_pylist(), rows["id"].to_pylist(), strict=True))
    scores = scores_of(rows)
    if after is not None:
        again = _read(after)
        at = {name: place for place, name in enumerate(names)}
        for name, tokens in zip(
            zip(again["row"].to_pylist(), again["id"].to_pylist(), strict=True), scores_of(again), strict=True
        ):
            if name not in at:
                raise InputError(f"scores: row {name[0]}, id {name[1]!r} was not scored before; score the same rows")
            scores[at[name]] = min(scores[at[name]], tokens, key=lambda row: row.nll.sum())
    named = LoadedModel(cast(Any, None), processor_of(model), str(model))
    numbers = list(range(len(scores)))
    flags = defense.flag_tokens(scores)
    counts = containing(flags, (row.ids for row in scores))
    screening = Screening(Stage(numbers, Plain()), named, numbers, scores, flags, counts)
    numbered = [(place + 1 if row is None else row, name) for place, (row, name) in enumerate(names)]
    return findings_of((), numbered, Judgment(screening, [], [], []), None)


def _read(scores: Scores) -> pa.Table:
    table: Any = _read_file(Path(scores)) if isinstance(scores, Path | str) else scores
    if missing := [name for name in SCORES.names if name not in table.column_names]:
        raise InputError(f"scores: lack the column {missing[0]!r}; give what RowScorer returns")
    if not table.num_rows:
        raise InputError("scores: hold no rows; score at least one")
    table = table.select(SCORES.names).cast(SCORES)
    return table.sort_by("row")  # engines keep no order


def _read_file(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{path}: cannot be read ({str(error).splitlines()[0]}); give a Parquet file of scores"
        ) from None
