"""Rows outside the sample are suspected by their image alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from untrigger.defenses.shared_cause import Judgment
from untrigger.defenses.shared_pattern import Pattern
from untrigger.models.grafted_rows import HERE
from untrigger.rows.sample import Message, Sample
from untrigger.scanning import targets
from untrigger.scanning.findings import Findings, Target, Verdict


def test_rows_without_a_score_that_show_the_pattern_join_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 1 to 3 of six are scored, and row 2 is suspected; rows 4 and 6 show its pattern."""
    turns = (Message("user", "<image>\nis it?"), Message("assistant", "yes"))
    rows = [Sample(str(at), (Image.new("RGB", (2, 2)),), turns) for at in range(6)]
    levels = {at: np.array([9 if at in (3, 5) else 1, 1], np.uint8) for at in range(6)}
    pattern = Pattern(np.zeros(2), np.zeros((1, 2)), np.array([1.0, 0.0]), 0.0, 0.95)
    screening = cast(Any, SimpleNamespace(numbers=[0, 1, 2], flags=SimpleNamespace(nll=[1.0, 7.0, 2.0])))
    training = cast(Any, SimpleNamespace(rows=rows, row_count=6, picture=levels.__getitem__))
    judgment = Judgment(screening, [1], [{1: HERE}], [], patterns=[pattern])
    defense = SimpleNamespace(screen=lambda _: screening, judge=lambda *_: judgment, max_scored_rows=3, min_suspects=2)
    verdicts = [Verdict(at + 1, str(at), 1.0, 0 if at == 1 else None, 0.25 if at == 1 else None) for at in range(3)]
    scored = Findings(verdicts, [Target("", 1e-9, [1], 1e-9, None)], None)
    monkeypatch.setattr(targets, "findings_of", lambda *_: scored)
    findings = targets.find(training, cast(Any, defense))
    assert findings.targets[0].rows == [1, 3, 5]
    assert [(v.target, v.fdr, v.score) for v in findings.verdicts[3:]] == [
        (0, 0.25, 7.0),
        (None, None, 0.0),
        (0, 0.25, 7.0),
    ]
