"""Tensors, gradients and the two bounded terms, as tests of the equations need them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from untrigger.losses import objective
from untrigger.losses.objective import entropy, js


def normal(*shape: int, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def separation(logits: Tensor, view_logits: Tensor, margin: float | Tensor) -> Tensor:
    return objective.separation(js(logits, view_logits), margin)


def entropy_band(logits: Tensor, low: float, high: float) -> Tensor:
    return objective.entropy_band(entropy(logits), low, high)


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def gradients(f: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [leaf(x) for x in inputs]
    return torch.autograd.grad(f(*leaves).sum(), leaves)
