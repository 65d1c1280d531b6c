"""A few cases of `tests/stress/fuzz.py`: damaged input is refused in one line or skipped, and no row is lost."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def fuzz() -> Any:
    import fuzz  # beside this file; it loads the model libraries

    return fuzz


@pytest.mark.parametrize(
    ("what", "cases"),
    [
        ("reading", 12),
        ("settling", 6),
        ("planning", 12),
        ("reporting", 6),
        pytest.param("commanding", 3, marks=pytest.mark.slow),
    ],
)
def test_damaged_input_is_refused_in_a_line_or_skipped(fuzz: Any, tmp_path: Path, what: str, cases: int) -> None:
    for number in range(cases):
        place = tmp_path / "cases" / str(number)
        place.mkdir(parents=True)
        with fuzz.within(300):
            assert getattr(fuzz, what)(random.Random(f"test {what} {number}"), place)


def test_a_lost_row_would_be_noticed(fuzz: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lossy(*args: Any, **kwargs: Any) -> Any:
        return read(*args, **kwargs)[1:]

    read = fuzz.read
    monkeypatch.setattr(fuzz, "read", lossy)
    run = fuzz.Fuzz(tmp_path, 0)
    for number in range(4):
        run.case("read", number, fuzz.reading)
    assert run.wrong and run.counts["read: wrong"] == len(run.wrong)


@pytest.mark.parametrize(
    ("where", "name", "loss", "cases"),
    [
        ("untrigger.rows.formats", "check_keys", lambda *_, **__: None, 4),
        ("untrigger.rows.viewer", "ImageOps", None, 4),  # pictures stay as their EXIF data turned them
        ("untrigger.rows.layouts", "CAPTION_PROMPT", "Describe it.", 40),
    ],
)
def test_a_silent_loss_would_be_noticed(
    fuzz: Any, where: str, name: str, loss: Any, cases: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{where}.{name}", loss)
    run = fuzz.Fuzz(tmp_path, 0)
    for number in range(cases):
        run.case("read", number, fuzz.reading)
    assert run.counts["read: wrong"]
