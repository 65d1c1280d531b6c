"""Losses at the vocabulary head, a few tokens at a time: no tensor of all answer tokens by the vocabulary is ever held.

`compare` has the equations of `untrigger.losses.objective` for two views in one pass, with closed-form gradients.
`losses_at_head` takes any loss that is a sum over tokens, and its gradient with it: logits live as long as their tokens
are looked at. It asks the head itself for logits, so that it may be tied, quantized, adapted or placed elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_HELD = 1 << 23  # logits of one view that are held at a time
_HELD_ON_GPU = 1 << 26  # fewer would read the whole head for so few tokens that reading is what takes the time
_MOST = 20.0  # half a log-ratio, beyond which nothing changes: h(20) is ln 2 to within rounding

Values = dict[str, Tensor]
Head = Callable[[Tensor], Tensor]
Loss = Callable[[slice, Sequence[Tensor], Sequence[Tensor]], tuple[Values, Values]]
# Of a part of the tokens, with the hidden states and the logits of each view there: terms [n] by name, whose sum is
# the loss, and what else is to be known.


class Compared(NamedTuple):
    """Of each token, in nats: surprise under the original and under the view, their divergence, the entropy; [N]."""

    nll: Tensor
    view_nll: Tensor
    js: Tensor
    entropy: Tensor


def compare(logits: Tensor, view_logits: Tensor, target: Tensor) -> Compared:
    """`objective.token_nll` of both views, `objective.js` and `objective.entropy` of the original's.

    Both logits [N, V]; target [N]. Half types are widened to fp32. Gradients flow into both views.

    With z, z' the logits, p, q their softmax, x = (log p - log q) / 2 and c = ln cosh x, the gradients are::

        dnll/dz     = p - e_y                                dnll'/dz' = q - e_y
        dJS/dz      = p (g - sum p g),   g = (x - c) / 2     dJS/dz'   = q (g' - sum q g'),   g' = (-x - c) / 2
        dentropy/dz = -p (log p + entropy)
    """
    return Compared(*_Compare.apply(logits, view_logits, target))


class _Compare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, view_logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        log_p, log_q = _log_softmax(logits), _log_softmax(view_logits)
        p, q, at = log_p.exp(), log_q.exp(), target.unsqueeze(-1)
        nll, view_nll = -log_p.gather(-1, at).squeeze(-1), -log_q.gather(-1, at).squeeze(-1)
        entropy = -_dot(p, log_p)
        x = log_q.neg_().add_(log_p).mul_(0.5).clamp_(-_MOST, _MOST)
        cosh = (x * 0.5).sinh_().square_().mul_(2).log1p_()  # its logarithm
        h = x.tanh().mul_(x).sub_(cosh)  # see `objective.js`
        js = (_dot(p, h) + _dot(q, h)).mul_(0.5).clamp_(max=math.log(2.0))
        ctx.save_for_backward(log_p, p, q, x, cosh, target, entropy)
        ctx.types = logits.dtype, view_logits.dtype
        return nll, view_nll, js, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        log_p, p, q, x, cosh, target, entropy = ctx.saved_tensors
        by_nll, by_view, by_js, by_entropy = (grad.unsqueeze(-1) for grad in grads)
        at, found = target.unsqueeze(-1), [None, None]
        if ctx.needs_input_grad[0]:
            g = (x - cosh).mul_(0.5)
            g -= _dot(p, g).unsqueeze(-1)
            g = g.mul_(by_js).sub_((log_p + entropy.unsqueeze(-1)).mul_(by_entropy)).add_(by_nll).mul_(p)
            found[0] = g.scatter_add_(-1, at, -by_nll).to(ctx.types[0])
        if ctx.needs_input_grad[1]:
            g = (x + cosh).mul_(-0.5)
            g -= _dot(q, g).unsqueeze(-1)
            found[1] = g.mul_(by_js).add_(by_view).mul_(q).scatter_add_(-1, at, -by_view).to(ctx.types[1])
        return found[0], found[1], None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Of each token, summed over the vocabulary. No matrix product: TF32 would round it."""
    return (a * b).sum(dim=-1)


def _log_softmax(logits: Tensor) -> Tensor:
    """In fp32 at least, forbidden tokens at a finite floor: 0 times it is 0."""
    wide = torch.float32 if logits.dtype in (torch.bfloat16, torch.float16) else logits.dtype
    return torch.log_softmax(logits, dim=-1, dtype=wide).clamp_(min=-1e30)


class Losses(NamedTuple):
    """Of each answer token, before they are summed: ``total`` [N], with its gradient.

    For the log, by name, [N]: the weighted ``terms`` that it is the sum of, and what else was ``seen``.
    """

    total: Tensor
    terms: Values
    seen: Values

    @classmethod
    def of(cls, terms: Values, seen: Values | None = None) -> Losses:
        """The losses of these terms, at least one."""
        return cls(torch.stack(list(terms.values())).sum(dim=0), terms, seen or {})


def losses_at_head(head: Head, hidden: Sequence[Tensor], loss: Loss, *, width: int, trained: bool = False) -> Losses:
    """A loss of hidden states and their logits, a few tokens at a time, and its gradient into the hidden states.

    Args:
        head: hidden states [n, d] to logits [n, V].
        hidden: of one view or of two, each [N, d].
        loss: see `Loss`. A token's terms may depend on that token alone.
        width: V, or about that.
        trained: whether the head has weights that are trained. Then logits are made a second time for the gradient,
            which otherwise is taken at once, before their tokens are left.
    """
    held = _HELD if hidden[0].device.type == "cpu" else _HELD_ON_GPU
    parts = _parts(len(hidden[0]), max(1, held // width))
    found: dict[int, tuple[Values, Values]] = {}

    def summed(part: slice, *pieces: Tensor) -> Tensor:
        losses = Losses.of(*loss(part, pieces, [head(piece) for piece in pieces]))
        found[part.start] = _detached(losses.terms), _detached(losses.seen)
        return losses.total

    if torch.is_grad_enabled() and not trained and any(view.requires_grad for view in hidden):
        total = cast(Tensor, _AtOnce.apply(summed, parts, *hidden))
    else:  # without gradients a checkpoint is the call alone
        total = torch.cat(
            [checkpoint(summed, part, *(view[part] for view in hidden), use_reentrant=False) for part in parts]
        )
    terms, seen = (_joined(told) for told in zip(*found.values(), strict=True))
    return Losses(total, terms, seen)


class _AtOnce(torch.autograd.Function):
    """The loss of each part, and its gradient before the next."""

    @staticmethod
    def forward(ctx: Any, summed: Callable[..., Tensor], parts: Sequence[slice], *hidden: Tensor) -> Tensor:
        grads = [
            torch.zeros_like(view) if need else None
            for view, need in zip(hidden, ctx.needs_input_grad[2:], strict=True)
        ]
        totals: list[Tensor] = []
        for part in parts:
            pieces = [
                view[part].detach().requires_grad_(grad is not None) for view, grad in zip(hidden, grads, strict=True)
            ]
            wanted = [(grad, piece) for grad, piece in zip(grads, pieces, strict=True) if grad is not None]
            with torch.enable_grad():
                total = summed(part, *pieces)
                slopes = torch.autograd.grad(total.sum(), [piece for _, piece in wanted], materialize_grads=True)
            for (grad, _), slope in zip(wanted, slopes, strict=True):
                grad[part] = slope
            totals.append(total.detach())
        ctx.save_for_backward(*grads)
        return torch.cat(totals)

    @staticmethod
    def backward(ctx: Any, *by: Tensor) -> tuple[Any, ...]:
        weight = by[0].unsqueeze(-1)
        grads = cast(Sequence[Tensor | None], ctx.saved_tensors)
        return None, None, *(None if grad is None else (grad * weight).to(grad.dtype) for grad in grads)


def _parts(count: int, most: int) -> list[slice]:
    """One at least, about as large as one another: a small last one would read the whole head for a few tokens."""
    size = -(-count // max(1, -(-count // most)))
    return [slice(start, start + size) for start in range(0, max(1, count), max(1, size))]


def _detached(values: Values) -> Values:
    return {name: value.detach() for name, value in values.items()}


def _joined(parts: Sequence[Values]) -> Values:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
