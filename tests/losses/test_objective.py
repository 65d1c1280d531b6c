"""Each equation against an independent float64 formula: values, gradients, extremes."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensors import entropy_band, gradients, leaf, normal, separation
from torch import Tensor

from untrigger.losses import objective
from untrigger.losses.objective import LN2, entropy, feature_separation, js, token_nll, token_unlikelihood

ROOT = Path(__file__).parents[2]
INF = math.inf


def naive_js(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """The textbook form, through probabilities, in float64."""
    p, q = p_logits.double().softmax(-1), q_logits.double().softmax(-1)
    m = (p + q) / 2
    kl_p = torch.where(p > 0, p * torch.log(p / m), 0.0).sum(-1)
    kl_q = torch.where(q > 0, q * torch.log(q / m), 0.0).sum(-1)
    return (kl_p + kl_q) / 2


def naive_js_gradient(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """dJS / d p_logits = 1/2 p (log(p/m) - KL(p || m)), derived by hand."""
    p, q = p_logits.double().softmax(-1), q_logits.double().softmax(-1)
    ratio = torch.where(p > 0, torch.log(p / ((p + q) / 2)), 0.0)
    return p * (ratio - (p * ratio).sum(-1, keepdim=True)) / 2


def naive_entropy(logits: Tensor) -> Tensor:
    p = logits.double().softmax(-1)
    return -torch.where(p > 0, p * torch.log(p), 0.0).sum(-1)


# values


def test_token_nll_is_cross_entropy() -> None:
    logits, target = normal(7, 11, dtype=torch.float32), torch.arange(7)
    expected = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    assert torch.equal(token_nll(logits, target), expected)


def test_token_nll_refuses_ignored_ids_and_unequal_rows() -> None:
    with pytest.raises((IndexError, RuntimeError)):
        token_nll(normal(2, 5), torch.tensor([1, -100]))
    with pytest.raises(ValueError, match="rows do not match"):
        token_nll(normal(3, 5), torch.tensor([1, 2]))


def test_token_unlikelihood_is_exact_at_both_ends() -> None:
    logits, target = normal(7, 11), torch.arange(7)
    rest = 1 - logits.softmax(-1).gather(-1, target[:, None])[:, 0]
    torch.testing.assert_close(token_unlikelihood(logits, target), -rest.log())
    for dtype in (torch.float32, torch.bfloat16):
        ends = torch.tensor([[-40.0, 0.0, -torch.inf], [40.0, 0.0, -torch.inf], [1e4, 0.0, 0.0]], dtype=dtype)
        ends.requires_grad_()
        losses = token_unlikelihood(ends, torch.zeros(3, dtype=torch.int64))
        torch.testing.assert_close(losses, torch.tensor([math.exp(-40), 40.0, 1e4 - math.log(2)]), rtol=4e-3, atol=0)
        losses.sum().backward()
        assert ends.grad is not None and ends.grad.isfinite().all() and ends.grad.abs().max() <= 1
    assert token_unlikelihood(torch.tensor([[0.0, -INF]]), torch.tensor([0])).item() == INF
    with pytest.raises(ValueError, match="rows do not match"):
        token_unlikelihood(normal(3, 5), torch.tensor([1, 2]))


def test_js_equals_the_textbook_form() -> None:
    p, q = normal(20, 13), normal(20, 13, seed=1)
    torch.testing.assert_close(js(p, q), naive_js(p, q), rtol=1e-12, atol=1e-15)


def test_entropy_equals_the_textbook_form() -> None:
    logits = normal(20, 13)
    torch.testing.assert_close(entropy(logits), naive_entropy(logits))
    assert entropy(torch.zeros(1, 8)).item() == pytest.approx(math.log(8))


def test_entropy_band_is_the_distance_from_the_band() -> None:
    logits = torch.zeros(3, 8, dtype=torch.float64)
    logits[:, 0] = torch.tensor([0.0, 20.0, 2.0])  # flat, sharp, in between
    h = naive_entropy(logits).tolist()
    assert h[1] < 0.5 < h[2] < 1.9 < h[0]
    expected = torch.tensor([h[0] - 1.9, 0.5 - h[1], 0.0], dtype=torch.float64)
    torch.testing.assert_close(entropy_band(logits, 0.5, 1.9), expected)


def test_feature_separation_is_a_hinged_cosine() -> None:
    h = torch.tensor([[1.0, 0.0], [3.0, 0.0], [1.0, 1.0], [-2.0, 0.0]], dtype=torch.float64)
    k = torch.tensor([[5.0, 0.0], [0.0, 7.0], [2.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([0.75, 0.0, math.sqrt(0.5) - 0.25, 0.0], dtype=torch.float64)
    torch.testing.assert_close(feature_separation(h, k, 0.25), expected)


@pytest.mark.parametrize("f", [js, lambda p, q: feature_separation(p, q, 0.0)])
def test_unequal_rows_are_refused_not_broadcast(f: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="rows do not match"):
        f(normal(3, 5), normal(1, 5))


# gradients

TARGET = torch.tensor([0, 3, 1, 4])
MARGINS = torch.tensor([0.65, 0.66, 0.67, 0.68])
EQUATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "token_nll": lambda p, _: token_nll(p, TARGET),
    "token_unlikelihood": lambda p, _: token_unlikelihood(p, TARGET),
    "js": js,
    "separation": lambda p, q: separation(p, q, 0.65),
    "separation, a margin per row": lambda p, q: separation(p, q, MARGINS),
    "entropy": lambda p, _: entropy(p),
    "entropy_band, below": lambda p, _: entropy_band(p, 5.0, 6.0),
    "entropy_band, above": lambda p, _: entropy_band(p, 0.0, 0.1),
    "feature_separation": lambda p, q: feature_separation(p, q, -1.0),
}
CROSS_VIEW = ("js", "separation", "separation, a margin per row", "feature_separation")


@pytest.mark.parametrize("name", EQUATIONS)
def test_gradcheck(name: str) -> None:
    p, q = leaf(normal(4, 5)), leaf(normal(4, 5, seed=1))
    assert torch.autograd.gradcheck(EQUATIONS[name], (p, q))


@pytest.mark.parametrize("name", EQUATIONS)
def test_every_term_has_a_gradient_in_every_row_and_view(name: str) -> None:
    """Guards against a consistency loss that is detached or reaches only one of the views."""
    p, q = leaf(normal(4, 5)), leaf(normal(4, 5, seed=1))
    EQUATIONS[name](p, q).sum().backward()
    for view in (p, q) if name in CROSS_VIEW else (p,):
        assert view.grad is not None
        assert (view.grad.abs().sum(-1) > 1e-3).all()


def test_token_nll_gradient() -> None:
    logits = normal(4, 5)
    (gradient,) = gradients(lambda p: token_nll(p, TARGET), logits)
    torch.testing.assert_close(gradient, logits.softmax(-1) - torch.nn.functional.one_hot(TARGET, 5))


def test_token_unlikelihood_gradient() -> None:
    """The target's logit gets its probability, the other logits minus their shares of it."""
    logits = normal(4, 5)
    (gradient,) = gradients(lambda p: token_unlikelihood(p, TARGET), logits)
    p, target = logits.softmax(-1), torch.nn.functional.one_hot(TARGET, 5)
    p_target = (p * target).sum(-1, keepdim=True)
    torch.testing.assert_close(gradient, p_target * target - p_target * p * (1 - target) / (1 - p_target))


def test_js_gradient_in_both_views() -> None:
    p, q = normal(20, 13), normal(20, 13, seed=1)
    dp, dq = gradients(js, p, q)
    torch.testing.assert_close(dp, naive_js_gradient(p, q), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(dq, naive_js_gradient(q, p), rtol=1e-10, atol=1e-14)


def test_separation_repels_inside_the_margin_only() -> None:
    p, q = normal(30, 13), normal(30, 13, seed=1)
    p = torch.cat([p, p])
    q = torch.cat([q, p[30:] + 0.1 * q])
    inside = naive_js(p, q) < 0.3
    assert inside.any() and not inside.all()
    dp, dq = gradients(lambda p, q: separation(p, q, 0.3), p, q)
    torch.testing.assert_close(dp[inside], -naive_js_gradient(p, q)[inside])
    torch.testing.assert_close(dq[inside], -naive_js_gradient(q, p)[inside])
    assert (dp[~inside] == 0).all() and (dq[~inside] == 0).all()


def test_a_gradient_step_moves_every_term_in_its_direction() -> None:
    p, q = normal(8, 13), normal(8, 13, seed=1)
    close = p + 0.3 * q

    def step(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return x - 1e-3 * gradients(f, x)[0]

    assert (js(step(lambda x: separation(x, close, LN2), p), close) > js(p, close)).all()
    assert (js(p, step(lambda x: separation(p, x, LN2), close)) > js(p, close)).all()
    assert (entropy(step(lambda x: entropy_band(x, 5.0, 6.0), p)) > entropy(p)).all()
    assert (entropy(step(lambda x: entropy_band(x, 0.0, 0.0), p)) < entropy(p)).all()
    cosine = torch.nn.functional.cosine_similarity
    assert (cosine(step(lambda x: feature_separation(x, close, 0.0), p), close) < cosine(p, close)).all()


def test_entropy_band_gradient() -> None:
    logits = normal(12, 9)
    p, h = logits.softmax(-1), naive_entropy(logits)
    expected = -p * (torch.log(p) + h[:, None])  # dH / d logits, by hand
    low, high = sorted(h.tolist())[3] + 1e-6, sorted(h.tolist())[8] - 1e-6
    (gradient,) = gradients(lambda x: entropy_band(x, low, high), logits)
    sign = (h > high).double() - (h < low).double()
    assert sorted(sign.unique().tolist()) == [-1.0, 0.0, 1.0]
    torch.testing.assert_close(gradient, sign[:, None] * expected)


def test_feature_separation_gradient() -> None:
    h, k = normal(12, 9), normal(12, 9, seed=1)
    unit_h = h / h.norm(dim=-1, keepdim=True)
    unit_k = k / k.norm(dim=-1, keepdim=True)
    cosine = (unit_h * unit_k).sum(-1, keepdim=True)
    bound = cosine.median().item() + 1e-6
    dh, dk = gradients(lambda h, k: feature_separation(h, k, bound), h, k)
    active = (cosine > bound).double()
    assert active.unique().numel() == 2
    torch.testing.assert_close(dh, active * (unit_k - cosine * unit_h) / h.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(dk, active * (unit_h - cosine * unit_k) / k.norm(dim=-1, keepdim=True))


# exactness and extremes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_js_of_equal_views_is_exactly_zero_and_so_is_its_gradient(dtype: torch.dtype, scale: float) -> None:
    logits = normal(6, 50, scale=scale, dtype=dtype)
    assert (js(logits, logits.clone()) == 0).all()
    for gradient in gradients(js, logits, logits.clone()):
        assert (gradient == 0).all()


def test_js_stays_accurate_in_fp32_where_the_views_nearly_agree() -> None:
    p = normal(50, 200, dtype=torch.float32)
    q = p + normal(50, 200, seed=1, scale=1e-3, dtype=torch.float32)
    expected = naive_js(p, q)
    assert expected.max() < 1e-6
    torch.testing.assert_close(js(p, q).double(), expected, rtol=1e-2, atol=0)


def test_js_accuracy_in_fp32_over_a_large_vocabulary() -> None:
    p, q = normal(3, 50_000, dtype=torch.float32), normal(3, 50_000, seed=1, dtype=torch.float32)
    torch.testing.assert_close(js(p, q).double(), naive_js(p, q), rtol=1e-5, atol=0)
    far_p, far_q = 30 * p[:, :300], 30 * q[:, :300]
    torch.testing.assert_close(js(far_p, far_q).double(), naive_js(far_p, far_q), rtol=0, atol=5e-6)


EXTREMES = {
    "one-hot, another token": ([1e4, -1e4, -1e4], [-1e4, 1e4, -1e4], LN2),
    "one-hot, the same token": ([1e4, -1e4, -1e4], [1e4, -1e4, -1e4], 0.0),
    "one-hot against uniform": ([1e4, -1e4], [0.0, 0.0], None),
    "the same tokens masked": ([1.0, 2.0, -INF], [2.0, 1.0, -INF], None),
    "different tokens masked": ([1.0, 2.0, -INF], [-INF, 2.0, 1.0], None),
    "disjoint masks": ([1.0, 2.0, -INF, -INF], [-INF, -INF, 3.0, 1.0], LN2),
    "one token left": ([0.0, -INF, -INF], [0.0, -INF, -INF], 0.0),
    "a vocabulary of one": ([3.0], [-2.0], 0.0),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", EXTREMES)
def test_extreme_and_masked_logits_give_finite_values_and_gradients(case: str, dtype: torch.dtype) -> None:
    p, q, expected = EXTREMES[case]
    p, q = torch.tensor([p], dtype=dtype), torch.tensor([q], dtype=dtype)
    value = js(p, q)
    torch.testing.assert_close(value.double(), naive_js(p, q), rtol=1e-5, atol=1e-6)
    if expected is not None:
        assert value.item() == pytest.approx(expected, abs=1e-6)
    assert 0 <= value.item() <= LN2 * (1 + 1e-7)
    assert torch.isfinite(entropy(p)).all()
    torch.testing.assert_close(entropy(p).double(), naive_entropy(p), rtol=1e-5, atol=1e-6)

    target = p.argmax(-1)
    for f in (
        js,
        lambda p, q: separation(p, q, 0.7) + separation(q, p, 0.1),
        lambda p, q: entropy(p) + entropy(q),
        lambda p, q: entropy_band(p, 2.0, 3.0) + entropy_band(q, 0.0, 0.0),
        lambda p, q: token_nll(p, target) + token_nll(q.where(q > -INF, 0), target),
    ):
        for gradient in gradients(f, p, q):
            assert torch.isfinite(gradient).all()
    masked = (p == -INF) & (q == -INF)
    for gradient in gradients(js, p, q):
        assert (gradient[masked] == 0).all()


def test_masked_tokens_do_not_change_the_others() -> None:
    p, q = normal(4, 5), normal(4, 5, seed=1)
    pad = torch.full((4, 2), -INF, dtype=torch.float64)
    masked_p, masked_q = torch.cat([p, pad], -1), torch.cat([q, pad], -1)
    torch.testing.assert_close(js(masked_p, masked_q), js(p, q))
    torch.testing.assert_close(gradients(js, masked_p, masked_q)[0][:, :5], gradients(js, p, q)[0])
    torch.testing.assert_close(entropy(masked_p), entropy(p))


def test_token_nll_of_a_forbidden_target_is_infinite() -> None:
    assert token_nll(torch.tensor([[0.0, -INF]]), torch.tensor([1])).item() == INF


@pytest.mark.parametrize("name", EQUATIONS)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_before_any_arithmetic(name: str, half: torch.dtype) -> None:
    f = EQUATIONS[name]
    p, q = leaf(normal(4, 5, dtype=half)), leaf(normal(4, 5, seed=1, dtype=half))
    value = f(p, q)
    assert value.requires_grad and value.shape == (4,)
    assert value.dtype == torch.float32
    assert torch.equal(value, f(p.float(), q.float()))
    assert f(p.double(), q.double()).dtype == torch.float64
    value.sum().backward()
    assert p.grad is not None and p.grad.dtype == half and (p.grad != 0).any()


# the documents


def test_paper_map_points_at_things_that_exist() -> None:
    """docs/paper.md: every `name` in the table is a function of objective.py, every `file::test` a test."""
    text = (ROOT / "docs/paper.md").read_text()
    named = re.findall(r"`(src/[\w/]+\.py|tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 10
    for path in {path for path, _ in named}:
        tree = ast.parse((ROOT / path).read_text())
        defined = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        missing = {name for p, name in named if p == path} - defined
        assert not missing, f"docs/paper.md names what {path} does not hold: {missing}"
    public = {n for n, f in vars(objective).items() if getattr(f, "__module__", "") == objective.__name__}
    mapped = {name for path, name in named if path == "src/untrigger/losses/objective.py"}
    assert {name for name in public if not name.startswith("_")} <= mapped
