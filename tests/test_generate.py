"""Answers come in order, do not depend on the batch, and never see the answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from untrigger.generate import answers
from untrigger.models import Loaded
from untrigger.sample import Message, Sample, read


@pytest.fixture(scope="module")
def model(tiny_model: Path, sharp: Callable[..., Loaded]) -> Loaded:
    return sharp(tiny_model, torch.float32, 5)


@pytest.fixture(scope="module")
def samples(tiny_data: Path) -> list[Sample]:
    """Prompts of different lengths, with no, one and two images."""
    data = read(tiny_data)
    first, second, third = (data[i] for i in range(3))
    ask, tell = (lambda text: Message("user", text)), (lambda text: Message("assistant", text))
    return [
        first,
        Sample("long", second.images, (ask("<image>\nwhat is this? is it red, or is it blue? tell me"), tell("red"))),
        Sample("text", (), (ask("hello"), tell("hello"))),
        Sample(
            "two", (*second.images, *third.images), (ask("<image>\nwhat?"), tell("a"), ask("<image> and?"), tell("b"))
        ),
        third,
    ]


def test_batched_answers_equal_one_by_one_in_order(model: Loaded, samples: list[Sample]) -> None:
    alone = [next(answers(model, [sample], max_new_tokens=8)) for sample in samples]
    assert len(set(alone)) >= 4  # they can be told apart, so order is seen
    for size in (2, 5):
        assert list(answers(model, samples, batch_size=size, max_new_tokens=8)) == alone
    assert list(answers(model, samples[::-1], batch_size=3, max_new_tokens=8)) == alone[::-1]


def test_the_last_answer_is_not_shown_and_earlier_turns_are(model: Loaded, samples: list[Sample]) -> None:
    two = samples[3]

    def said(*messages: Message) -> str:
        return next(answers(model, [Sample("s", two.images, messages)], max_new_tokens=8))

    truth = said(*two.messages)
    assert said(*two.messages[:-1], Message("assistant", "something else")) == truth
    assert said(*two.messages[:-1]) == truth
    earlier = (two.messages[0], Message("assistant", "two blue stars"), *two.messages[2:])
    assert said(*earlier) != truth


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_restored_after_use_failure_and_early_leave(
    model: Loaded, samples: list[Sample], training: bool
) -> None:
    model.model.train(training)
    list(answers(model, samples[:1], max_new_tokens=1))
    assert model.model.training is training
    stream = answers(model, samples, batch_size=1, max_new_tokens=1)
    next(stream)
    stream.close()
    assert model.model.training is training
    with pytest.raises(AttributeError):
        list(answers(model, [None], max_new_tokens=1))  # type: ignore[list-item]
    assert model.model.training is training
    model.model.eval()


def test_answers_are_greedy_and_leave_no_gradient_behind(model: Loaded, samples: list[Sample]) -> None:
    torch.manual_seed(0)
    first = list(answers(model, samples, max_new_tokens=4))
    torch.manual_seed(1)
    assert list(answers(model, samples, max_new_tokens=4)) == first
    assert all(p.grad is None for p in model.model.parameters())
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_no_samples_no_answers(model: Loaded) -> None:
    assert list(answers(model, [])) == []
