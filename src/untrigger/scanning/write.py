"""Write a scan's output folder: every row for programs, a page for people, and the data without suspected rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from untrigger.files import new_file, write_text
from untrigger.rows.sample import Data, Sample
from untrigger.rows.sample import write as write_data
from untrigger.rows.storage import dump
from untrigger.scanning.cues import Cue
from untrigger.scanning.findings import Findings, rounded
from untrigger.scanning.page import page

CLEAN = "clean"
_BLOCK = 10_000  # rows written at a time; bounds memory
_COLUMNS = pa.schema(
    [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("suspected", pa.bool_()),
        ("score", pa.float64()),
        ("target", pa.string()),
        ("fdr", pa.float64()),
        ("flagged_text", pa.string()),
        ("image_cue", pa.float64()),
        ("prompt_cue", pa.float64()),
        ("harmful_part", pa.string()),
        ("harmed_row", pa.int64()),
        ("probability", pa.float64()),
        ("control", pa.float64()),
        ("cells", pa.list_(pa.list_(pa.list_(pa.float32())))),
        ("words", pa.list_(pa.struct([("word", pa.string()), ("nats", pa.float32())]))),
    ]
)


def write(findings: Findings, rows: Sequence[Sample], out: Path) -> None:
    """Write ``all_rows.jsonl`` and ``all_rows.parquet``, ``scan.html`` and ``clean``.

    ``all_rows`` holds every row, the most suspicious first, with the keys of `Findings.rows` and two more: ``cells``
    and ``words``, the nats that its flagged text loses without each cell of each image, and without each word.
    ``clean`` is the data without the suspected rows; written only if there are any, and ``rows`` come from a file.
    """
    order = sorted(findings.verdicts, key=lambda verdict: -verdict.score)
    lines, table = new_file(out / "all_rows.jsonl"), new_file(out / "all_rows.parquet")
    with lines as text, table as columns, pq.ParquetWriter(columns, _COLUMNS) as writer:
        for start in range(0, len(order), _BLOCK):
            records = [findings.record(verdict) | _maps(verdict.cue) for verdict in order[start : start + _BLOCK]]
            text.writelines(dump(record) + b"\n" for record in records)
            writer.write_table(pa.Table.from_pylist(records, schema=_COLUMNS))
    write_text(out / "scan.html", page(findings, rows))
    # the folder appears whole: if it exists, an earlier run wrote all of it
    if isinstance(rows, Data) and findings.targets and not (out / CLEAN).exists():
        write_data(rows, out / CLEAN, keep=[row for row in range(len(rows)) if findings.verdicts[row].target is None])


def _maps(cue: Cue | None) -> dict[str, Any]:
    return {
        "cells": [np.round(cells, 3).tolist() for cells in cue.cells] if cue else None,
        "words": [{"word": word, "nats": rounded(nats)} for word, nats in cue.words] if cue else None,
    }
