"""Losses at the head: the equations in one pass, and the values and gradients of the whole batch in parts."""

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


def by_objective(logits: Tensor, view_logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    nll, view_nll = objective.token_nll(logits, target), objective.token_nll(view_logits, target)
    return nll, view_nll, objective.js(logits, view_logits), objective.entropy(logits)


def gradients(found: Sequence[Tensor], inputs: Sequence[Tensor], seed: int = 5) -> tuple[Tensor, ...]:
    """Of a sum in which every value has a weight of its own."""
    weighted = [(value.double() * normal(len(value), seed=seed + i)).sum() for i, value in enumerate(found)]
    return torch.autograd.grad(torch.stack(weighted).sum(), inputs)


# --- the comparison of two views ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "near"),
    [(torch.float64, 1e-11), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)],
    ids=["float64", "float32", "bfloat16"],
)
@pytest.mark.parametrize("scale", [0.01, 2.0, 30.0])
def test_the_comparison_is_that_of_the_equations(dtype: torch.dtype, near: float, scale: float) -> None:
    """Against float64, of the same rounded logits. In bf16 it is the gradient that is rounded, at the very end."""
    p, q = (normal(N, V, seed=seed, scale=scale, dtype=dtype).requires_grad_() for seed in (1, 2))
    exact = [x.detach().double().requires_grad_() for x in (p, q)]
    found, expected = compare(p, q, targets()), by_objective(exact[0], exact[1], targets())
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(ours.double(), theirs, rtol=min(near, 1e-5), atol=min(near, 1e-5))
    for ours, theirs in zip(gradients(found, (p, q)), gradients(expected, exact), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=near, atol=near)


@pytest.mark.parametrize("which", range(4))
def test_each_value_has_the_gradient_of_its_own_equation(which: int) -> None:
    p, q = normal(N, V, seed=1).requires_grad_(), normal(N, V, seed=2).requires_grad_()
    ours = torch.autograd.grad(compare(p, q, targets())[which].sum(), (p, q))
    theirs = torch.autograd.grad(by_objective(p, q, targets())[which].sum(), (p, q), materialize_grads=True)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


def test_equal_views_are_not_apart_and_nothing_pulls() -> None:
    p = normal(N, V, dtype=torch.float32)
    logits, view_logits = p.clone().requires_grad_(), p.clone().requires_grad_()
    apart = compare(logits, view_logits, targets()).js
    assert not apart.any()
    for gradient in torch.autograd.grad(apart.sum(), (logits, view_logits)):
        assert not gradient.any()


def test_small_divergences_are_not_lost_in_rounding() -> None:
    p = normal(N, V, dtype=torch.float32)
    q = p + 1e-4 * normal(N, V, seed=3, dtype=torch.float32)
    expected = objective.js(p.double(), q.double())
    assert float(expected.max()) < 1e-7
    torch.testing.assert_close(compare(p, q, targets()).js.double(), expected, rtol=0.05, atol=0)


def test_forbidden_tokens_have_no_part_in_it() -> None:
    p, q = normal(N, V, seed=1), normal(N, V, seed=2)
    p[:, 3], q[:, 3], q[:, 4] = -torch.inf, -torch.inf, -torch.inf
    target = torch.full((N,), 7)
    leaves = [x.requires_grad_() for x in (p, q)]
    found = compare(leaves[0], leaves[1], target)
    for ours, theirs in zip(found, by_objective(leaves[0], leaves[1], target), strict=True):
        torch.testing.assert_close(ours, theirs)
    dp, dq = gradients(found, leaves)
    assert dp.isfinite().all() and dq.isfinite().all()
    assert not dp[:, 3].any() and not dq[:, 3:5].any()


def test_one_view_may_be_held_still() -> None:
    p, q = normal(N, V, seed=1).requires_grad_(), normal(N, V, seed=2)
    (alone,) = gradients(compare(p, q, targets()), (p,))
    both = gradients(compare(p, other := q.clone().requires_grad_(), targets()), (p, other))
    assert torch.equal(alone, both[0])


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


def one_term(part: slice, hidden: Sequence[Tensor], logits: Sequence[Tensor]) -> tuple[Values, Values]:
    return {"ce": objective.token_nll(logits[0], targets()[part])}, {}


def weights_of(head: nn.Module) -> list[Tensor]:
    return list(head.parameters())


@pytest.mark.parametrize("tokens", [1, 4, 7, N, 100])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("loss", "views"), [(one_term, 1), (four_terms, 2)])
def test_parts_are_the_whole(
    monkeypatch: pytest.MonkeyPatch, tokens: int, trained: bool, loss: Any, views: int
) -> None:
    monkeypatch.setattr(chunked, "_CHUNK_LOGITS", tokens * V)
    torch.manual_seed(0)
    head = nn.Linear(D, V, dtype=torch.float64).requires_grad_(trained)
    hidden = [normal(N, D, seed=seed).requires_grad_() for seed in range(views)]
    found = losses_at_head(head, hidden, loss, width=V, trained=trained)
    terms, seen = loss(slice(None), hidden, [head(view) for view in hidden])
    whole = torch.stack(list(terms.values())).sum(dim=0)
    torch.testing.assert_close(found.total, whole)
    for ours, theirs in ((found.terms, terms), (found.seen, seen)):
        assert list(ours) == list(theirs) and not any(value.requires_grad for value in ours.values())
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name].detach())
    leaves = [*hidden, *(weights_of(head) if trained else [])]
    for ours, theirs in zip(gradients([found.total], leaves), gradients([whole], leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)
        assert ours.any()


@given(count=st.integers(0, 40), tokens=st.integers(1, 12))
def test_no_token_is_lost_or_seen_twice(count: int, tokens: int) -> None:
    head, hidden = nn.Linear(D, V), torch.randn(count, D, requires_grad=True)
    places, sizes = list[int](), list[int]()

    def loss(part: slice, hidden: Sequence[Tensor], logits: Sequence[Tensor]) -> tuple[Values, Values]:
        places.extend(range(count)[part])
        sizes.append(len(logits[0]))
        return {"sum": logits[0].sum(dim=-1)}, {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "_CHUNK_LOGITS", tokens * V)
        found = losses_at_head(head.requires_grad_(False), [hidden], loss, width=V)
    assert places == list(range(count)) and found.total.shape == (count,)
    assert max(sizes) <= tokens and max(sizes) - min(sizes) < len(sizes), "a small last part reads the whole head too"
    found.total.sum().backward()
    torch.testing.assert_close(hidden.grad, head.weight.sum(dim=0).expand(count, D))


def test_without_gradients_only_values_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_CHUNK_LOGITS", 4 * V)
    head, hidden = nn.Linear(D, V, dtype=torch.float64), [normal(N, D).requires_grad_(), normal(N, D, seed=1)]
    with torch.no_grad():
        still = losses_at_head(head, hidden, four_terms, width=V)
    assert not still.total.requires_grad
    torch.testing.assert_close(still.total, losses_at_head(head, hidden, four_terms, width=V).total.detach())


def test_a_view_that_is_held_still_gets_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_CHUNK_LOGITS", 4 * V)
    head = nn.Linear(D, V, dtype=torch.float64).requires_grad_(False)
    free, still = normal(N, D).requires_grad_(), normal(N, D, seed=1)
    losses_at_head(head, [free, still], four_terms, width=V).total.sum().backward()
    moved = free.grad
    free.grad = None
    losses_at_head(head, [free, still.clone().requires_grad_()], four_terms, width=V).total.sum().backward()
    torch.testing.assert_close(moved, free.grad)
    assert still.grad is None


class Largest(TorchDispatchMode):
    """How large the largest tensor is that any operation gives, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        made = given if isinstance(given, tuple | list) else (given,)
        self.elements = max(self.elements, *(x.numel() for x in made if isinstance(x, Tensor)), 0)
        return given


@pytest.mark.parametrize("trained", [False, True])
def test_the_logits_of_all_tokens_are_never_there(monkeypatch: pytest.MonkeyPatch, trained: bool) -> None:
    monkeypatch.setattr(chunked, "_CHUNK_LOGITS", 4 * V)
    head = nn.Linear(D, V, dtype=torch.float64).requires_grad_(trained)
    hidden = [normal(N, D, seed=seed).requires_grad_() for seed in range(2)]

    def run(step: Callable[[], Losses]) -> int:
        with Largest() as largest:
            step().total.sum().backward()
        return largest.elements

    assert run(lambda: losses_at_head(head, hidden, four_terms, width=V, trained=trained)) <= max(4, D) * V
    monkeypatch.setattr(chunked, "_CHUNK_LOGITS", N * V)
    assert run(lambda: losses_at_head(head, hidden, four_terms, width=V, trained=trained)) >= N * V, "it can be seen"


def test_half_types_keep_their_gradients_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token's gradient is rounded once, whatever the parts: no sum runs in bf16."""
    head = nn.Linear(D, V, dtype=torch.bfloat16).requires_grad_(False)
    found: list[Tensor] = []
    for tokens in (1, N):
        monkeypatch.setattr(chunked, "_CHUNK_LOGITS", tokens * V)
        hidden = [normal(N, D, seed=seed, dtype=torch.bfloat16).requires_grad_() for seed in range(2)]
        total = losses_at_head(head, hidden, four_terms, width=V).total
        assert total.dtype == torch.float32
        (total.sum() / 1000).backward()
        found.append(torch.cat([view.grad for view in hidden if view.grad is not None]))
    assert found[0].dtype == torch.bfloat16 and found[0].any()
    torch.testing.assert_close(found[0], found[1], rtol=2e-2, atol=1e-5)


class Int8(nn.Module):
    """A quantized head, as such are: no parameter, whole numbers and a scale for each word."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ (self.weight.to(hidden.dtype) * self.scale).T


def test_a_quantized_head_is_asked_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_CHUNK_LOGITS", 4 * V)
    torch.manual_seed(0)
    head = Int8(nn.Linear(D, V, dtype=torch.float64))
    hidden = [normal(N, D, seed=seed).requires_grad_() for seed in range(2)]
    found = losses_at_head(head, hidden, four_terms, width=V)
    terms, _ = four_terms(slice(None), hidden, [head(view) for view in hidden])
    whole = torch.stack(list(terms.values())).sum(dim=0)
    torch.testing.assert_close(found.total, whole)
    for ours, theirs in zip(gradients([found.total], hidden), gradients([whole], hidden), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)
