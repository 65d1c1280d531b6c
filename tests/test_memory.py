"""Memory goes back to the system where a process holds much."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest

from untrigger import memory
from untrigger.memory import give_memory_back
from untrigger.training.memory_callback import MemoryGivenBack


@pytest.fixture
def trims(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls = list[int]()
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(malloc_trim=calls.append))
    monkeypatch.setattr(memory, "_resident", lambda: 100)
    return calls


def test_nothing_is_given_back_below_a_size(trims: list[int]) -> None:
    give_memory_back(above=100)
    assert trims == []
    give_memory_back(above=99)
    give_memory_back()
    assert trims == [0, 0]


def test_every_eighth_step_gives_memory_back(trims: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_resident", lambda: memory.MUCH + 1)
    for step in range(1, 17):
        MemoryGivenBack().on_step_end(None, SimpleNamespace(global_step=step), None)
        assert len(trims) == step // 8
