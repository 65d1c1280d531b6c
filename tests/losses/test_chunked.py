"""Chunked losses at the head: fused equations, and values and gradients equal to those of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from untrigger.losses import chunked, objective
from untrigger.losses.chunked import Losses, Values, compare, losses_at_head

N, D, V = 23, 6, 40


def normal(*shape: int, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def targets(count: int = N, seed: int = 9) -> Tensor:
    return torch.randint(V, (count,), generator=torch.Generator().manual_seed(seed))


def reference_values(logits: Tensor, view_logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    nll, view_nll = objective.token_nll(logits, target), objective.token_nll(view_logits, target)
    return nll, view_nll, objective.js(logits, view_logits), objective.entropy(logits)


def gradients(values: Sequence[Tensor], inputs: Sequence[Tensor], seed: int = 5) -> tuple[Tensor, ...]:
    """Gradients of a randomly weighted sum of all values."""
    weighted = [(value.double() * normal(len(value), seed=seed + i)).sum() for i, value in enumerate(values)]
    return torch.autograd.grad(torch.stack(weighted).sum(), inputs)


# --- the comparison of two views ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-11), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)],
    ids=["float64", "float32", "bfloat16"],
)
@pytest.mark.parametrize("scale", [0.01, 2.0, 30.0])
def test_compare_matches_the_equations(dtype: torch.dtype, tolerance: float, scale: float) -> None:
    """Compare with float64 on the same rounded logits. In bf16 only the final gradient is rounded."""
    p, q = (normal(N, V, seed=seed, scale=scale, dtype=dtype).requires_grad_() for seed in (1, 2))
    exact = [x.detach().double().requires_grad_() for x in (p, q)]
    actual, expected = compare(p, q, targets()), reference_values(exact[0], exact[1], targets())
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(ours.double(), theirs, rtol=min(tolerance, 1e-5), atol=min(tolerance, 1e-5))
    for ours, theirs in zip(gradients(actual, (p, q)), gradients(expected, exact), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("index", range(4))
def test_every_value_has_the_gradient_of_its_equation(index: int) -> None:
    p, q = normal(N, V, seed=1).requires_grad_(), normal(N, V, seed=2).requires_grad_()
    ours = torch.autograd.grad(compare(p, q, targets())[index].sum(), (p, q))
    theirs = torch.autograd.grad(reference_values(p, q, targets())[index].sum(), (p, q), materialize_grads=True)
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-13)


def test_equal_views_have_no_divergence_and_no_gradient() -> None:
    p = normal(N, V, dtype=torch.float32)
    logits, view_logits = p.clone().requires_grad_(), p.clone().requires_grad_()
    divergence = compare(logits, view_logits, targets()).js
    assert not divergence.any()
    for gradient in torch.autograd.grad(divergence.sum(), (logits, view_logits)):
        assert not gradient.any()


def test_small_divergences_are_not_lost_in_rounding() -> None:
    p = normal(N, V, dtype=torch.float32)
    q = p + 1e-4 * normal(N, V, seed=3, dtype=torch.float32)
    expected = objective.js(p.double(), q.double())
    assert float(expected.max()) < 1e-7
    torch.testing.assert_close(compare(p, q, targets()).js.double(), expected, rtol=0.05, atol=0)


def test_forbidden_tokens_get_no_gradient() -> None:
    p, q = normal(N, V, seed=1), normal(N, V, seed=2)
    p[:, 3], q[:, 3], q[:, 4] = -torch.inf, -torch.inf, -torch.inf
    target = torch.full((N,), 7)
    leaves = [x.requires_grad_() for x in (p, q)]
    actual = compare(leaves[0], leaves[1], target)
    for ours, theirs in zip(actual, reference_values(leaves[0], leaves[1], target), strict=True):
        torch.testing.assert_close(ours, theirs)
    dp, dq = gradients(actual, leaves)
    assert dp.isfinite().all() and dq.isfinite().all()
    assert not dp[:, 3].any() and not dq[:, 3:5].any()


def test_one_view_may_need_no_gradient() -> None:
    p, q = normal(N, V, seed=1).requires_grad_(), normal(N, V, seed=2)
    (single,) = gradients(compare(p, q, targets()), (p,))
    both = gradients(compare(p, view := q.clone().requires_grad_(), targets()), (p, view))
    assert torch.equal(single, both[0])


# --- in parts ----------------------------------------------------------------------------------------


def four_terms(part: slice, hidden: Sequence[Tensor], logits: Sequence[Tensor]) -> tuple[Values, Values]:
    views = compare(logits[0], logits[1], targets()[part])
    terms = {
        "ce": views.nll,
        "separation": objective.separation(views.js, 0.5),
        "band": objective.entropy_band(views.entropy, 2.5, 3.0),
        "features": objective.feature_separation(hidden[0], hidden[1], -0.2),
    }
    return terms, {"js": views.js, "place": torch.arange(N)[part]}


def single_term(part: slice, hidden: Sequence[Tensor], logits: Sequence[Tensor]) -> tuple[Values, Values]:
    return {"ce": objective.token_nll(logits[0], targets()[part])}, {}


def weights_of(head: nn.Module) -> list[Tensor]:
    return list(head.parameters())


@pytest.mark.parametrize("tokens", [1, 4, 7, N, 100])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("loss", "views"), [(single_term, 1), (four_terms, 2)])
def test_chunks_add_up_to_the_whole_batch(
    monkeypatch: pytest.MonkeyPatch, tokens: int, trained: bool, loss: Any, views: int
) -> None:
    monkeypatch.setattr(chunked, "_CHUNK_LOGITS", tokens * V)
    torch.manual_seed(0)
    head = nn.Linear(D, V, dtype=torch.float64).requires_grad_(trained)
    hidden = [normal(N, D, seed=seed).requires_grad_() for seed in range(views)]
    losses = losses_at_head(head, hidden, loss, width=V, trained=trained)
    terms, logged = loss(slice(None), hidden, [head(view) for view in hidden])
    whole = torch.stack(list(terms.values())).sum(dim=0)
    torch.testing.assert_close(losses.total, whole)
    for ours, theirs in ((losses.terms, terms), (losses.logged, logged)):
        assert list(ours) == list(theirs) and not any(value.requires_grad for value in ours.values())
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name].detach())
    leaves = [*hidden, *(weights_of(head) if trained else [])]
    for ours, theirs in zip(gradients([losses.total], leaves), gradients([whole], leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)
        assert ours.any()


@given(count=st.integers(0, 40), tokens=st.integers(1, 12))
def test_every_token_is_in_exactly_one_chunk(count: int, tokens: int) -> None:
    head, hidden = nn.Linear(D, V), torch.randn(count, D, requires_grad=True)
    places, sizes = list[int](), list[int]()

    def loss(part: slice, hidden: Sequence[Tensor], logits: Sequence[Tensor]) -> tuple[Values, Values]:
        places.extend(range(count)[part])
        sizes.append(len(logits[0]))
        return {"sum": logits[0].sum(dim=-1)}, {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "_CHUNK_LOGITS", tokens * V)
        losses = losses_at_head(head.requires_grad_(False), [hidden], loss, width=V)
    assert places == list(range(count)) and losses.total.shape == (count,)
    assert max(sizes) <= tokens and max(sizes) - min(sizes) < len(sizes), "chunks must have about equal size"
    losses.total.sum().backward()
    torch.testing.assert_close(hidden.grad, head.weight.sum(dim=0).expand(count, D))


def test_without_gradients_only_values_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_CHUNK_LOGITS", 4 * V)
    head, hidden = nn.Linear(D, V, dtype=torch.float64), [normal(N, D).requires_grad_(), normal(N, D, seed=1)]
    with torch.no_grad():
        values_only = losses_at_head(head, hidden, four_terms, width=V)
    assert not values_only.total.requires_grad
    torch.testing.assert_close(values_only.total, losses_at_head(head, hidden, four_terms, width=V).total.detach())


def test_a_view_without_requires_grad_gets_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_CHUNK_LOGITS", 4 * V)
    head = nn.Linear(D, V, dtype=torch.float64).requires_grad_(False)
    active, frozen = normal(N, D).requires_grad_(), normal(N, D, seed=1)
    losses_at_head(head, [active, frozen], four_terms, width=V).total.sum().backward()
    gradient = active.grad
    active.grad = None
    losses_at_head(head, [active, frozen.clone().requires_grad_()], four_terms, width=V).total.sum().backward()
    torch.testing.assert_close(gradient, active.grad)
    assert frozen.grad is None


class Largest(TorchDispatchMode):
    """Record the size of the largest tensor that any operation returns, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple | list) else (result,)
        self.elements = max(self.elements, *(x.numel() for x in outputs if isinstance(x, Tensor)), 0)
        return result


@pytest.mark.parametrize("trained", [False, True])
def test_full_logits_are_never_in_memory(monkeypatch: pytest.MonkeyPatch, trained: bool) -> None:
    monkeypatch.setattr(chunked, "_CHUNK_LOGITS", 4 * V)
    head = nn.Linear(D, V, dtype=torch.float64).requires_grad_(trained)
    hidden = [normal(N, D, seed=seed).requires_grad_() for seed in range(2)]

    def run(step: Callable[[], Losses]) -> int:
        with Largest() as largest:
            step().total.sum().backward()
        return largest.elements

    assert run(lambda: losses_at_head(head, hidden, four_terms, width=V, trained=trained)) <= max(4, D) * V
    monkeypatch.setattr(chunked, "_CHUNK_LOGITS", N * V)
    assert run(lambda: losses_at_head(head, hidden, four_terms, width=V, trained=trained)) >= N * V, (
        "the probe must detect full logits"
    )


def test_half_types_round_gradients_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token's gradient is rounded once for any chunk size: no sum runs in bf16."""
    head = nn.Linear(D, V, dtype=torch.bfloat16).requires_grad_(False)
    results: list[Tensor] = []
    for tokens in (1, N):
        monkeypatch.setattr(chunked, "_CHUNK_LOGITS", tokens * V)
        hidden = [normal(N, D, seed=seed, dtype=torch.bfloat16).requires_grad_() for seed in range(2)]
        total = losses_at_head(head, hidden, four_terms, width=V).total
        assert total.dtype == torch.float32
        (total.sum() / 1000).backward()
        results.append(torch.cat([view.grad for view in hidden if view.grad is not None]))
    assert results[0].dtype == torch.bfloat16 and results[0].any()
    torch.testing.assert_close(results[0], results[1], rtol=2e-2, atol=1e-5)


class Int8(nn.Module):
    """A quantized head: no parameters, int8 weights and one scale per token."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ (self.weight.to(hidden.dtype) * self.scale).T


def test_a_quantized_head_works_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_CHUNK_LOGITS", 4 * V)
    torch.manual_seed(0)
    head = Int8(nn.Linear(D, V, dtype=torch.float64))
    hidden = [normal(N, D, seed=seed).requires_grad_() for seed in range(2)]
    losses = losses_at_head(head, hidden, four_terms, width=V)
    terms, _ = four_terms(slice(None), hidden, [head(view) for view in hidden])
    whole = torch.stack(list(terms.values())).sum(dim=0)
    torch.testing.assert_close(losses.total, whole)
    for ours, theirs in zip(gradients([losses.total], hidden), gradients([whole], hidden), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)
