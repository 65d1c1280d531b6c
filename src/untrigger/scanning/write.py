"""What a scan leaves in its folder: verdicts for programs, a page for people, and the data without what was found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from untrigger.files import new_file, write_text
from untrigger.sample import Data
from untrigger.sample import write as write_data
from untrigger.scanning import Findings
from untrigger.scanning.page import page
from untrigger.storage import dump

CLEAN = "clean"
_COLUMNS = pa.schema(
    [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("suspected", pa.bool_()),
        ("score", pa.float64()),
        ("target", pa.string()),
        ("fdr", pa.float64()),
        ("doubted", pa.string()),
        ("image_cue", pa.float64()),
        ("prompt_cue", pa.float64()),
        ("cells", pa.list_(pa.list_(pa.list_(pa.float32())))),
        ("words", pa.list_(pa.struct([("word", pa.string()), ("nats", pa.float32())]))),
    ]
)


def write(findings: Findings, data: Data, out: Path) -> None:
    """``verdicts.jsonl`` and ``verdicts.parquet``, the most suspicious row first; ``gallery.html``; ``clean``.

    A row's fields: ``row`` from 1, as it stands in the file; ``id``; ``suspected``; ``score``; ``target``, what it is
    suspected of teaching; ``fdr``; ``doubted`` words; ``image_cue`` and ``prompt_cue``, the nats that these lose with
    another's image or prompt; ``cells`` and ``words``, what they lose without each cell of each image, and each word.
    """
    order = sorted(range(len(data)), key=lambda row: -findings.verdicts[row].score)
    told = [_told(row, data, findings) for row in order]
    with new_file(out / "verdicts.jsonl") as file:
        file.writelines(dump(each) + b"\n" for each in told)
    with new_file(out / "verdicts.parquet") as file:
        pq.write_table(pa.Table.from_pylist(told, schema=_COLUMNS), file)
    write_text(out / "gallery.html", page(findings, data))
    if findings.targets and not (out / CLEAN).exists():  # it appears whole: if it is there, a run before wrote it
        write_data(data, out / CLEAN, keep=[row for row in range(len(data)) if findings.verdicts[row].target is None])


def _told(row: int, data: Data, findings: Findings) -> dict[str, Any]:
    verdict = findings.verdicts[row]
    cue, target = verdict.cue, verdict.target
    return {
        "row": data.numbers[row] + 1,
        "id": data.told(row).id,
        "suspected": target is not None,
        "score": round(verdict.score, 4),
        "target": findings.targets[target].text if target is not None else None,
        "fdr": verdict.fdr,
        "doubted": verdict.doubted,
        "image_cue": _rounded(cue.image) if cue else None,
        "prompt_cue": _rounded(cue.prompt) if cue else None,
        "cells": [np.round(cells, 3).tolist() for cells in cue.cells] if cue else None,
        "words": [{"word": word, "nats": _rounded(nats)} for word, nats in cue.words] if cue else None,
    }


def _rounded(nats: float | None) -> float | None:
    return None if nats is None else round(nats, 3)
