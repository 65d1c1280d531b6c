"""Properties that each equation has for all inputs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors import entropy_band, gradients, leaf, normal, separation
from torch import Tensor

from untrigger.losses.objective import LN2, entropy, feature_separation, js, reduce, token_nll


@st.composite
def logit_pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    rows, vocabulary = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    numbers = st.lists(st.floats(-60, 60), min_size=rows * vocabulary, max_size=rows * vocabulary)
    p, q = (torch.tensor(draw(numbers), dtype=torch.float64).view(rows, vocabulary) for _ in range(2))
    return p, q


# properties


@given(logit_pairs())
def test_js_bounds_and_symmetry(pair: tuple[Tensor, Tensor]) -> None:
    p, q = pair
    value = js(p, q)
    assert ((value >= 0) & (value <= LN2)).all()
    torch.testing.assert_close(value, js(q, p), rtol=1e-12, atol=1e-15)


@given(logit_pairs())
def test_js_is_zero_if_and_only_if_the_distributions_are_equal(pair: tuple[Tensor, Tensor]) -> None:
    """TV^2 / 2 <= JS <= ln 2 TV (Pinsker; Lin 1991), so one is zero exactly if the other is."""
    p, q = pair
    distance = (p.softmax(-1) - q.softmax(-1)).abs().sum(-1) / 2
    value = js(p, q)
    assert (value >= distance.square() / 2 - 1e-12).all()
    assert (value <= LN2 * distance + 1e-12).all()
    assert (js(p, p) == 0).all()


@given(logit_pairs(), st.floats(-100, 100), st.floats(-100, 100))
def test_shifting_all_logits_changes_nothing(pair: tuple[Tensor, Tensor], a: float, b: float) -> None:
    p, q = pair
    torch.testing.assert_close(js(p + a, q + b), js(p, q), rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(entropy(p + a), entropy(p), rtol=1e-6, atol=1e-10)
    target = torch.zeros(len(p), dtype=torch.long)
    torch.testing.assert_close(token_nll(p + a, target), token_nll(p, target), rtol=1e-6, atol=1e-10)


@given(logit_pairs())
def test_rows_are_independent(pair: tuple[Tensor, Tensor]) -> None:
    p, q = pair
    for f in (js, lambda p, q: entropy(p), lambda p, q: feature_separation(p, q, 0.1)):
        torch.testing.assert_close(f(p.flip(0), q.flip(0)), f(p, q).flip(0), rtol=1e-12, atol=1e-15)


@given(logit_pairs())
def test_token_order_does_not_matter(pair: tuple[Tensor, Tensor]) -> None:
    p, q = pair
    torch.testing.assert_close(js(p.flip(1), q.flip(1)), js(p, q), rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(entropy(p.flip(1)), entropy(p), rtol=1e-9, atol=1e-14)


@given(logit_pairs(), st.floats(0, LN2))
def test_separation_is_zero_exactly_beyond_the_margin(pair: tuple[Tensor, Tensor], margin: float) -> None:
    p, q = pair
    loss, far = separation(p, q, margin), js(p, q) >= margin
    assert ((loss == 0) == far).all()
    assert ((loss >= 0) & (loss <= margin)).all()
    for gradient in gradients(lambda p, q: separation(p, q, margin), p, q):
        assert (gradient[far] == 0).all()


@given(logit_pairs(), st.floats(0, 2), st.floats(0, 2))
def test_entropy_bounds_and_band(pair: tuple[Tensor, Tensor], a: float, b: float) -> None:
    p, (low, high) = pair[0], sorted((a, b))
    h, loss = entropy(p), entropy_band(p, low, high)
    assert ((h >= 0) & (h <= math.log(p.shape[1]) + 1e-12)).all()
    assert (loss >= 0).all()
    assert ((loss == 0) == ((low <= h) & (h <= high))).all()


@given(logit_pairs(), st.floats(-1, 1), st.floats(0.01, 100))
def test_feature_separation_bounds_and_scale(pair: tuple[Tensor, Tensor], bound: float, scale: float) -> None:
    h, k = pair[0] + 100, pair[1] + 100  # away from the zero vector, where no cosine exists
    loss = feature_separation(h, k, bound)
    assert ((loss >= 0) & (loss <= 1 - bound + 1e-12)).all()
    torch.testing.assert_close(feature_separation(scale * h, k, bound), loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(feature_separation(k, h, bound), loss, rtol=1e-9, atol=1e-12)


# reduction


@pytest.mark.parametrize("cut", [[1] * 8, [3, 5], [8], [0, 8]])
@pytest.mark.parametrize("num_items", [8, torch.tensor(8)])
def test_reduce_of_chunks_adds_up_to_the_batch(cut: list[int], num_items: int | Tensor) -> None:
    """Gradient accumulation: one batch of 8 tokens, or 8 of one."""
    p, q = normal(8, 5), normal(8, 5, seed=1)
    whole = leaf(p)
    reduce(separation(whole, q, LN2), num_items).backward()
    parts, total = leaf(p), 0.0
    for rows, view in zip(parts.split(cut), q.split(cut), strict=True):
        loss = reduce(separation(rows, view, LN2), num_items)
        loss.backward(retain_graph=True)
        total += loss.item()
    assert total == pytest.approx(reduce(separation(p, q, LN2), num_items).item(), rel=1e-12)
    assert whole.grad is not None and parts.grad is not None
    torch.testing.assert_close(parts.grad, whole.grad)


def test_reduce_accumulates_half_precision_in_fp32() -> None:
    ones = torch.ones(1000, dtype=torch.bfloat16)
    assert reduce(ones, 1).dtype == torch.float32
    assert reduce(ones, 1).item() == 1000.0  # a bf16 result would be rounded to a multiple of 4 or 8
    assert reduce(torch.full((1001,), 1.0, dtype=torch.bfloat16), 1).item() == 1001.0


def test_no_rows_give_zero_loss_and_zero_gradient() -> None:
    logits = leaf(torch.zeros(0, 5))
    loss = reduce(js(logits, logits), 3)
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None
