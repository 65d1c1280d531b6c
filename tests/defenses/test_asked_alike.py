"""Rows are compared with rows whose prompts have the same tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array

from untrigger.defenses.asked_alike import among_asked_alike, neighbor_rate, token_sets

PROMPT = st.frozensets(st.integers(0, 6), max_size=4)


def prompt_matrix(*prompts: Sequence[int]) -> csr_array:
    rows = np.zeros((len(prompts), 100))
    for row, prompt in zip(rows, prompts, strict=True):
        row[list(prompt)] = 1
    return csr_array(rows)


@given(
    st.lists(
        st.tuples(st.frozensets(st.integers(0, 6), max_size=4), st.booleans(), st.booleans()), min_size=2, max_size=50
    ),
    st.floats(0, 1),
)
def test_neighbor_rate_equals_a_loop(rows: list[tuple[frozenset[int], bool, bool]], prior: float) -> None:
    shares: list[float] = []
    for prompt, _, holds in rows:
        if not holds:
            continue
        near = sorted(
            ((len(prompt & other) / len(prompt | other) if prompt | other else 1.0), bad)
            for other, bad, held in rows
            if not held
        )[::-1]
        if near:
            last = near[min(16, len(near)) - 1][0]
            bads = [bad for similarity, bad in near if similarity >= last]
            shares.append((sum(bads) + prior) / (len(bads) + 1))
    prompts, bad, holding = zip(*rows, strict=True)
    rate = neighbor_rate(prompt_matrix(*prompts), np.array(bad), np.array(holding), prior)
    assert rate == pytest.approx(np.mean(shares) if shares else 0.0)


@given(st.lists(PROMPT, min_size=1, max_size=90), st.lists(PROMPT, max_size=5), st.randoms(use_true_random=False))
def test_a_statistic_of_rows_asked_alike_equals_a_loop(
    prompts: list[frozenset[int]], more: list[frozenset[int]], random: object
) -> None:
    values = [float(i) for i in range(len(prompts))]
    random.shuffle(values)  # type: ignore[attr-defined]
    expected: list[float] = []
    for own in (*prompts, *more):
        lacking = [len(other - own) for other in prompts]
        last = sorted(lacking)[min(64, len(lacking)) - 1]
        expected.append(float(np.median([value for value, n in zip(values, lacking, strict=True) if n <= last])))
    result = among_asked_alike(lambda v: float(np.median(v)), np.array(values), prompt_matrix(*prompts, *more))
    assert result.tolist() == pytest.approx(expected)
    both = among_asked_alike(lambda v: (float(np.median(v)), 2.0), np.array(values), prompt_matrix(*prompts, *more))
    assert both.T.tolist() == [result.tolist(), [2.0] * len(result)]


def test_a_prompt_with_a_trigger_is_judged_against_the_prompt_without_it() -> None:
    prompts = [np.array([1, 2, word]) for word in range(10, 20) for _ in range(20)]
    triggered = [np.array([90, 91, 1, 2, word]) for word in range(10, 20) for _ in range(10)]
    values = np.array([1.0] * 200 + [9.0] * 100)
    medians = among_asked_alike(lambda v: float(np.median(v)), values, token_sets([*prompts, *triggered]))
    assert set(medians) == {1.0}


def test_token_sets_count_each_token_once() -> None:
    rows = [np.array([3, 1, 3]), np.array([], np.int64), np.array([0])]
    assert token_sets(rows).toarray().tolist() == [[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert token_sets([np.array([], np.int64)]).toarray().tolist() == [[0]]


def test_neighbor_rate_samples_very_many_rows() -> None:
    prompts = prompt_matrix(*[[1]] * 2000, *[[2]] * 1000, *[[1]] * 100, *[[2]] * 100)
    holding = np.arange(3200) < 3000
    bad = np.isin(np.arange(3200), range(3000, 3100))
    assert neighbor_rate(prompts, bad, holding, 0.0) == pytest.approx(2 / 3, abs=0.01)


def test_of_very_many_rows_some_are_drawn_to_judge_by() -> None:
    prompts = [np.array([kind]) for kind in (1, 2)] * 20_000
    values = np.array([1.0, 9.0] * 20_000)
    sizes = among_asked_alike(lambda v: (float(v.mean()), float(len(v))), values, token_sets([*prompts, np.array([2])]))
    assert sizes[:, 0].tolist() == [*values, 9.0]
    assert sizes[0, 1] + sizes[1, 1] == 16_384
