"""Layer consistency, after CROW (Min, Pham, Li, Sun, ICML 2025, arXiv 2411.12768)."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from untrigger.defenses.base import Defense, StepDefense, Training
from untrigger.defenses.plain import Plain
from untrigger.errors import InputError
from untrigger.losses import objective
from untrigger.losses.chunked import Losses
from untrigger.models.forward import decoder_layers, forward_answers
from untrigger.models.loading import LoadedModel
from untrigger.rows.sample import Sample


@final
@dataclass(frozen=True)
class CROW(Defense):
    """A backdoor makes hidden states jump between layers; smooth layers cannot carry it.

    Plain training on all rows, then on the trusted ones with `consistency` under a perturbation of the decoder's
    input, text and image tokens, that disturbs it most. docs/paper.md says what differs from the paper.

    Fields:
        weight: alpha (paper: 5.5).
        size: epsilon, how far each coordinate of the input is moved (paper: 0.1).
        passes, rate: over the trusted rows, and the learning rate then as a share of that asked for (code: 5 passes,
            5 times the rate).
    """

    needs_clean_rows: ClassVar[bool] = True
    weight: float = 5.5
    size: float = 0.1
    passes: float = 10.0
    rate: float = 0.5

    def __post_init__(self) -> None:
        self._check(0, math.inf, "weight", "size", "passes", "rate")

    def fine_tune(self, rows: Sequence[Sample], training: Training) -> LoadedModel:
        clean_rows = training.clean_rows
        undefended = training.fit(rows, Plain(), "undefended")
        step = Consistent(self.weight, self.size)
        return training.fit(clean_rows, step, start=undefended, passes=self.passes, rate=self.rate)


@final
@dataclass(frozen=True)
class Consistent(StepDefense):
    """Cross-entropy, and the inconsistency of the layers under the worst small perturbation of their input."""

    weight: float
    size: float

    def step(self, model: nn.Module, inputs: dict[str, Any]) -> Losses:
        answers = forward_answers(model, inputs)
        real = inputs["attention_mask"].bool()
        with _watched(model) as calm:
            forward_answers(model, inputs)
        direction = torch.autograd.grad(consistency(calm.states, real).sum(), calm.start)[0].sign()
        with _watched(model, self.size * direction) as moved:
            forward_answers(model, inputs)
        jump = consistency(moved.states, real)[answers.row]
        terms = {"ce": objective.token_nll(answers.logits, answers.target), "consistency": self.weight * jump}
        return Losses.of(terms)


def consistency(states: Sequence[Tensor], real: Tensor) -> Tensor:
    """Mean of ``1 - cos(h_t^l, h_t^(l-1))`` over a row's real tokens t and all pairs of successive states.

    states: L of [B, T, d], L >= 2; real [B, T], False for padding. Returns [B], in [0, 2].
    Source: Min et al., ICML 2025, arXiv 2411.12768.
    """
    pairs = pairwise(state.to(torch.promote_types(state.dtype, torch.float32)) for state in states)
    apart = torch.stack([1 - torch.nn.functional.cosine_similarity(a, b, dim=-1) for a, b in pairs]).mean(dim=0)
    return (apart * real).sum(dim=1) / real.sum(dim=1)


class _Seen:
    """What a forward pass went through: the decoder's input [B, T, d], and what each layer but the last made of it."""

    start: Tensor
    states: list[Tensor]


@contextmanager
def _watched(model: nn.Module, moved: Tensor | None = None) -> Generator[_Seen]:
    """Watch the decoder of a forward pass, its input ``moved`` by so much.

    Its first layer is where text and image tokens first stand side by side, in every family.

    Raises:
        InputError: fewer than two states to compare.
    """
    first, *others = decoder_layers(model)
    if len(others) < 2:
        raise InputError(f"defense crow: it wants a model of 3 or more layers, and this one has {1 + len(others)}")
    seen = _Seen()
    seen.states = []

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.start = hidden.detach().requires_grad_() if moved is None else hidden + moved
        return ((seen.start, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": seen.start})

    def leave(_: nn.Module, __: object, output: Any) -> None:
        seen.states.append(output[0] if isinstance(output, tuple) else output)

    handles = [first.register_forward_pre_hook(enter, with_kwargs=True)]
    handles += [layer.register_forward_hook(leave) for layer in (first, *others[:-1])]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
