"""The loss equations of the defenses: pure, unreduced, differentiable, independent of model and batch.

Shapes: ``logits`` and ``view_logits`` are [N, V], one row per answer token, in nats before the softmax; hidden states
are [N, d]. Every equation returns [N]; any leading shape [...] works in place of [N]. Only ``reduce`` sums rows.

Types: bf16 and fp16 are widened to fp32 before any arithmetic and the result is fp32; float64 stays float64.
Gradients flow into *every* tensor argument, so into both views. For a stop-gradient the caller detaches.

A logit of -inf is a forbidden token: probability 0, gradient 0. A row needs at least one finite logit.

Source: Fang et al., arXiv 2604.04488. Only its abstract was available, which names the ingredients
(separation of the views' outputs and features, output entropy constraint) but no formula. The forms below are
this project's reading of it; docs/paper.md says how far each one can be trusted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LN2 = math.log(2.0)
"""The largest Jensen-Shannon divergence, in nats, reached by two distributions without a common token."""


def token_nll(logits: Tensor, target: Tensor) -> Tensor:
    """Negative log-likelihood of each target: ``-log softmax(logits)[target]``, the cross-entropy of plain fine-tuning.

    logits [N, V]; target [N], integer ids in [0, V). Select the answer tokens first: -100 is an index error.
    Returns [N], nats, in [0, inf]; inf where the target is a forbidden token.
    Source: standard SFT loss (abstract: the defense acts during supervised fine-tuning).
    """
    _same_shape(logits[..., 0], target)
    return -torch.log_softmax(_wide(logits), dim=-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)


def token_unlikelihood(logits: Tensor, target: Tensor) -> Tensor:
    """Unlikelihood loss of each target: ``-log(1 - softmax(logits)[target])``, small where the target is unlikely.

    logits [N, V]; target [N], as for `token_nll`. Returns [N], nats, in [0, inf]; inf if the target is the only token
    with a finite logit. The gradient by the target's logit is the target's probability: at most 1, and about 0 where
    the target is unlikely already. Computed as ``softplus(logit of the target - logsumexp of the rest)``, exact at both
    ends.
    Source: Welleck et al., "Neural text generation with unlikelihood training", ICLR 2020, arXiv 1908.04319.
    """
    _same_shape(logits[..., 0], target)
    logits, index = _wide(logits), target.unsqueeze(-1)
    rest = logits.scatter(-1, index, -torch.inf).logsumexp(dim=-1)
    return torch.nn.functional.softplus(logits.gather(-1, index).squeeze(-1) - rest)


def js(logits: Tensor, view_logits: Tensor) -> Tensor:
    """Jensen-Shannon divergence of the two views' next-token distributions.

    With p = softmax(logits), q = softmax(view_logits) and m = (p + q) / 2::

        JS(p, q) = 1/2 KL(p || m) + 1/2 KL(q || m) = sum_v m_v h(x_v),
        h(x) = x tanh x - ln cosh x,        x_v = (log p_v - log q_v) / 2

    (put p = m(1 + tanh x), q = m(1 - tanh x) into the first form). The second form is computed: its terms are never
    negative, and nothing cancels when p is close to q, where the first form leaves only rounding noise.

    Both arguments [N, V]. Returns [N], nats, in [0, ln 2]; symmetric; exactly 0 where both rows are equal.
    The gradient at p = q is exactly 0: repulsion is weakest where the model is perfectly invariant.
    Source: Lin, Divergence measures based on the Shannon entropy, 1991. The abstract says that the views' output
    distributions are pulled apart; that the divergence is JS is inferred.
    """
    _same_shape(logits, view_logits)
    log_p, log_q = _finite_log_softmax(logits), _finite_log_softmax(view_logits)
    # h(20) = ln 2 to within float64 rounding, and the clamp keeps sinh from overflowing.
    x = ((log_p - log_q) / 2).clamp(-20.0, 20.0)
    h = x * torch.tanh(x) - torch.log1p(2 * torch.sinh(x / 2).square())
    # Rounding can lift the sum a few ulp above ln 2, where the true gradient vanishes anyway.
    return ((log_p.exp() + log_q.exp()) / 2 * h).sum(dim=-1).clamp(max=LN2)


def separation(divergence: Tensor, margin: float | Tensor) -> Tensor:
    """Cross-view separation: ``[margin - JS(p, q)]_+``, a hinge, because -JS alone has no point where it stops.

    divergence [N], from `js`; margin in nats, a number or one per row [N]. Sensible margins lie in (0, ln 2): from ln 2
    on the hinge is never satisfied. Returns [N], nats, in [0, margin].
    Gradient is -dJS while JS < margin, and 0 beyond.
    Source: abstract (pull the views' outputs apart); JS is inferred, the hinge is ours.
    """
    return torch.relu(margin - divergence)


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy ``H(p) = -sum_v p_v log p_v`` of each next-token distribution.

    logits [N, V]. Returns [N], nats, in [0, ln V].
    Source: abstract (an output entropy constraint).
    """
    log_p = _finite_log_softmax(logits)
    return -(log_p.exp() * log_p).sum(dim=-1)


def entropy_band(entropies: Tensor, low: float, high: float) -> Tensor:
    """Entropy constraint: ``[H(p) - high]_+ + [low - H(p)]_+``, the distance of H(p) from [low, high].

    entropies [N], from `entropy`; 0 <= low <= high, nats. Returns [N], nats, in [0, max(low, ln V - high)].
    Gradient is +dH above the band, -dH below it, 0 inside. Where p is one-hot to rounding, dH is 0 too: the lower edge
    cannot lift a row that has already collapsed.
    Source: abstract (entropy constraints against over-suppression). Sign and form are unknown; the band covers both
    signs.
    """
    return torch.relu(entropies - high) + torch.relu(low - entropies)


def feature_separation(hidden: Tensor, view_hidden: Tensor, bound: float) -> Tensor:
    """Feature separation: ``[cos(h, h') - bound]_+`` of the two views' hidden states.

    Both arguments [N, d], any scale; bound in [-1, 1]. Returns [N], in [0, 1 - bound].
    Gradient is dcos while cos > bound, and 0 below; at h = h' dcos is 0 to rounding, as for JS.
    Source: abstract (constraints on the feature representation as well); cosine, hinge and layer are inferred.
    """
    _same_shape(hidden, view_hidden)
    cosine = torch.nn.functional.cosine_similarity(_wide(hidden), _wide(view_hidden), dim=-1)
    return torch.relu(cosine - bound)


def reduce(per_token: Tensor, num_items: int | Tensor) -> Tensor:
    """Reduce token losses to ``sum(per_token) / num_items``, a scalar.

    per_token [N]; num_items > 0 is the number of answer tokens of the *whole* optimizer step, over all chunks,
    accumulation steps and processes. So chunk losses add up to the batch loss for any split; chunk means would not.
    Source: convention (``num_items_in_batch`` of transformers' Trainer).
    """
    return _wide(per_token).sum() / num_items


def _wide(x: Tensor) -> Tensor:
    """Widen half types to fp32, because half-precision sums over a vocabulary are biased."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _finite_log_softmax(logits: Tensor) -> Tensor:
    """Log softmax with -inf raised to a finite floor, so that 0 * log 0 and its gradient are 0."""
    return torch.log_softmax(_wide(logits), dim=-1).clamp(min=-1e30)


def _same_shape(a: Tensor, b: Tensor) -> None:
    """Refuse unequal shapes: broadcasting or gathering would silently compare the wrong tokens."""
    if a.shape != b.shape:
        raise ValueError(f"rows do not match: shapes {tuple(a.shape)} and {tuple(b.shape)}")
