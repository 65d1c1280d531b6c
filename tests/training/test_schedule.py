"""The steps of a training in parts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainingArguments

from untrigger.training.schedule import shorten


@given(total=st.integers(2, 500), early=st.integers(1, 99))
def test_two_parts_add_up_to_all_steps(total: int, early: int) -> None:
    parts = [TrainingArguments("out", max_steps=total, use_cpu=True) for _ in range(2)]
    shorten(parts[0], early / 100)
    shorten(parts[1], 1 - early / 100, early / 100)
    first, rest = (part.max_steps for part in parts)
    assert first + rest == total or sorted((first, rest)) == [1, total], "each part has at least one step"
