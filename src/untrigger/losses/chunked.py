"""Chunked losses at the vocabulary head: the logits of all answer tokens are never in memory at once.

`compare` computes the equations of `untrigger.losses.objective` for two views in one pass, with closed-form gradients.
`losses_at_head` computes any loss that is a sum over tokens, and its gradient, one chunk of tokens at a time. It calls
the head module itself, so the head may be tied, quantized, adapted or on another device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_CHUNK_LOGITS = 1 << 23  # logits of one view per chunk
_CHUNK_LOGITS_GPU = 1 << 26  # larger: reading the head's weights would dominate the time of small chunks
_MAX_HALF_LOG_RATIO = 20.0  # nothing changes beyond: h(20) is ln 2 to within rounding

Values = dict[str, Tensor]
Head = Callable[[Tensor], Tensor]
Loss = Callable[[slice, Sequence[Tensor], Sequence[Tensor]], tuple[Values, Values]]
# (slice of the tokens, hidden states per view, logits per view) -> (terms [n] by name, whose sum is the loss;
# further values [n] to log).


class Compared(NamedTuple):
    """Per token [N], in nats: NLL of the original and of the view, their JS divergence, the entropy of the original."""

    nll: Tensor
    view_nll: Tensor
    js: Tensor
    entropy: Tensor


def compare(logits: Tensor, view_logits: Tensor, target: Tensor) -> Compared:
    """Compute `objective.token_nll` of both views, `objective.js`, and `objective.entropy` of the original.

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
        p, q, index = log_p.exp(), log_q.exp(), target.unsqueeze(-1)
        nll, view_nll = -log_p.gather(-1, index).squeeze(-1), -log_q.gather(-1, index).squeeze(-1)
        entropy = -_dot(p, log_p)
        x = log_q.neg_().add_(log_p).mul_(0.5).clamp_(-_MAX_HALF_LOG_RATIO, _MAX_HALF_LOG_RATIO)
        log_cosh = (x * 0.5).sinh_().square_().mul_(2).log1p_()
        h = x.tanh().mul_(x).sub_(log_cosh)  # see `objective.js`
        js = (_dot(p, h) + _dot(q, h)).mul_(0.5).clamp_(max=math.log(2.0))
        ctx.save_for_backward(log_p, p, q, x, log_cosh, target, entropy)
        ctx.types = logits.dtype, view_logits.dtype
        return nll, view_nll, js, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        log_p, p, q, x, log_cosh, target, entropy = ctx.saved_tensors
        d_nll, d_view, d_js, d_entropy = (grad.unsqueeze(-1) for grad in grads)
        index, input_grads = target.unsqueeze(-1), [None, None]
        if ctx.needs_input_grad[0]:
            g = (x - log_cosh).mul_(0.5)
            g -= _dot(p, g).unsqueeze(-1)
            g = g.mul_(d_js).sub_((log_p + entropy.unsqueeze(-1)).mul_(d_entropy)).add_(d_nll).mul_(p)
            input_grads[0] = g.scatter_add_(-1, index, -d_nll).to(ctx.types[0])
        if ctx.needs_input_grad[1]:
            g = (x + log_cosh).mul_(-0.5)
            g -= _dot(q, g).unsqueeze(-1)
            input_grads[1] = g.mul_(d_js).add_(d_view).mul_(q).scatter_add_(-1, index, -d_view).to(ctx.types[1])
        return input_grads[0], input_grads[1], None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum ``a * b`` over the vocabulary, per token. Not a matrix product, which TF32 would round."""
    return (a * b).sum(dim=-1)


def _log_softmax(logits: Tensor) -> Tensor:
    """Log softmax in fp32 at least; forbidden tokens get a finite floor, so that 0 times it is 0."""
    wide = torch.float32 if logits.dtype in (torch.bfloat16, torch.float16) else logits.dtype
    return torch.log_softmax(logits, dim=-1, dtype=wide).clamp_(min=-1e30)


class Losses(NamedTuple):
    """Unreduced losses per answer token.

    Attributes:
        total: [N], with gradient; the sum of the terms.
        terms: [N] by name, the weighted terms of the loss, for the log.
        logged: [N] by name, further values for the log.
    """

    total: Tensor
    terms: Values
    logged: Values

    @classmethod
    def of(cls, terms: Values, logged: Values | None = None) -> Losses:
        """Sum the terms, at least one, into a total."""
        return cls(torch.stack(list(terms.values())).sum(dim=0), terms, logged or {})


def losses_at_head(head: Head, hidden: Sequence[Tensor], loss: Loss, *, width: int, trained: bool = False) -> Losses:
    """Compute a loss and its gradient into the hidden states, one chunk of tokens at a time.

    Args:
        head: maps hidden states [n, d] to logits [n, V].
        hidden: the hidden states of one view or of two, each [N, d].
        loss: see `Loss`. A token's terms may depend only on that token.
        width: V, at least roughly.
        trained: whether the head has trainable weights. Then logits are recomputed for the gradient; otherwise the
            gradient of a chunk is taken in the forward pass, while its logits are in memory.
    """
    budget = _CHUNK_LOGITS if hidden[0].device.type == "cpu" else _CHUNK_LOGITS_GPU
    chunks = _chunks(len(hidden[0]), max(1, budget // width))
    values: dict[int, tuple[Values, Values]] = {}

    def chunk_loss(chunk: slice, *pieces: Tensor) -> Tensor:
        losses = Losses.of(*loss(chunk, pieces, [head(piece) for piece in pieces]))
        values[chunk.start] = _detached(losses.terms), _detached(losses.logged)
        return losses.total

    if torch.is_grad_enabled() and not trained and any(view.requires_grad for view in hidden):
        total = cast(Tensor, _EagerGradient.apply(chunk_loss, chunks, *hidden))
    else:  # without gradients a checkpoint only calls the function
        total = torch.cat(
            [checkpoint(chunk_loss, chunk, *(view[chunk] for view in hidden), use_reentrant=False) for chunk in chunks]
        )
    terms, logged = (_joined(parts) for parts in zip(*values.values(), strict=True))
    return Losses(total, terms, logged)


class _EagerGradient(torch.autograd.Function):
    """Compute each chunk's loss and its gradient in the forward pass, before the next chunk."""

    @staticmethod
    def forward(ctx: Any, chunk_loss: Callable[..., Tensor], chunks: Sequence[slice], *hidden: Tensor) -> Tensor:
        grads = [
            torch.zeros_like(view) if need else None
            for view, need in zip(hidden, ctx.needs_input_grad[2:], strict=True)
        ]
        totals: list[Tensor] = []
        for chunk in chunks:
            pieces = [
                view[chunk].detach().requires_grad_(grad is not None) for view, grad in zip(hidden, grads, strict=True)
            ]
            active = [(grad, piece) for grad, piece in zip(grads, pieces, strict=True) if grad is not None]
            with torch.enable_grad():
                total = chunk_loss(chunk, *pieces)
                slopes = torch.autograd.grad(total.sum(), [piece for _, piece in active], materialize_grads=True)
            for (grad, _), slope in zip(active, slopes, strict=True):
                grad[chunk] = slope
            totals.append(total.detach())
        ctx.save_for_backward(*grads)
        return torch.cat(totals)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Any, ...]:
        weight = outer[0].unsqueeze(-1)
        grads = cast(Sequence[Tensor | None], ctx.saved_tensors)
        return None, None, *(None if grad is None else (grad * weight).to(grad.dtype) for grad in grads)


def _chunks(count: int, max_size: int) -> list[slice]:
    """Cut ``count`` tokens into chunks of about equal size, at least one.

    Equal sizes, because a small last chunk would read the whole head for a few tokens.
    """
    size = -(-count // max(1, -(-count // max_size)))
    return [slice(start, start + size) for start in range(0, max(1, count), max(1, size))]


def _detached(values: Values) -> Values:
    return {name: value.detach() for name, value in values.items()}


def _joined(parts: Sequence[Values]) -> Values:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
