"""What a scan leaves in its folder: verdicts for programs, a page for people, and the data without what was found."""

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
_BLOCK = 10_000  # rows told at a time: bounds memory
_COLUMNS = pa.schema(
    [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("suspected", pa.bool_()),
        ("score", pa.float64()),
        ("target", pa.string()),
        ("fdr", pa.float64()),
        ("flagged_tokens", pa.string()),
        ("image_cue", pa.float64()),
        ("prompt_cue", pa.float64()),
        ("cells", pa.list_(pa.list_(pa.list_(pa.float32())))),
        ("words", pa.list_(pa.struct([("word", pa.string()), ("nats", pa.float32())]))),
    ]
)


def write(findings: Findings, data: Sequence[Sample], out: Path) -> None:
    """``verdicts.jsonl`` and ``verdicts.parquet``, the most suspicious row first; ``gallery.html``; ``clean``.

    A row's fields: those of `Findings.rows`; ``cells`` and ``words``, what its doubted words lose without each cell of
    each image, and each word. ``clean`` is the data without the suspected rows: only where the data is that of a file.
    """
    order = sorted(findings.verdicts, key=lambda verdict: -verdict.score)
    lines, table = new_file(out / "verdicts.jsonl"), new_file(out / "verdicts.parquet")
    with lines as text, table as columns, pq.ParquetWriter(columns, _COLUMNS) as writer:
        for start in range(0, len(order), _BLOCK):
            told = [findings.told(verdict) | _maps(verdict.cue) for verdict in order[start : start + _BLOCK]]
            text.writelines(dump(each) + b"\n" for each in told)
            writer.write_table(pa.Table.from_pylist(told, schema=_COLUMNS))
    write_text(out / "gallery.html", page(findings, data))
    # it appears whole: if it is there, a run before wrote it
    if isinstance(data, Data) and findings.targets and not (out / CLEAN).exists():
        write_data(data, out / CLEAN, keep=[row for row in range(len(data)) if findings.verdicts[row].target is None])


def _maps(cue: Cue | None) -> dict[str, Any]:
    return {
        "cells": [np.round(cells, 3).tolist() for cells in cue.cells] if cue else None,
        "words": [{"word": word, "nats": rounded(nats)} for word, nats in cue.words] if cue else None,
    }
