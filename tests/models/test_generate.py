"""Answers come in order, do not depend on the batch, and the prompt never holds the row's own answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from untrigger.models import prefix_cache
from untrigger.models.generate import answers
from untrigger.models.loading import LoadedModel, base_model
from untrigger.models.prefix_cache import cache_image_features
from untrigger.rows.sample import Message, Sample, read


@pytest.fixture(scope="module")
def model(tiny_model: Path, sharp: Callable[..., LoadedModel]) -> LoadedModel:
    return sharp(tiny_model, torch.float32, 5)


@pytest.fixture(scope="module")
def samples(tiny_data: Path) -> list[Sample]:
    """Prompts of different lengths, with no, one and two images."""
    data = read(tiny_data)
    first, second, third = (data[i] for i in range(3))
    user, assistant = (lambda text: Message("user", text)), (lambda text: Message("assistant", text))
    return [
        first,
        Sample(
            "long", second.images, (user("<image>\nwhat is this? is it red, or is it blue? tell me"), assistant("red"))
        ),
        Sample("text", (), (user("hello"), assistant("hello"))),
        Sample(
            "two",
            (*second.images, *third.images),
            (user("<image>\nwhat?"), assistant("a"), user("<image> and?"), assistant("b")),
        ),
        third,
    ]


def test_batched_answers_equal_single_ones_in_order(model: LoadedModel, samples: list[Sample]) -> None:
    alone = [next(answers(model, [sample], max_new_tokens=8)) for sample in samples]
    assert len(set(alone)) >= 4  # different enough for a wrong order to fail
    for size in (2, 5):
        assert list(answers(model, samples, batch_size=size, max_new_tokens=8)) == alone
    assert list(answers(model, samples[::-1], batch_size=3, max_new_tokens=8)) == alone[::-1]


def test_the_prompt_has_earlier_turns_but_not_the_last_answer(model: LoadedModel, samples: list[Sample]) -> None:
    two = samples[3]

    def answer(*messages: Message) -> str:
        return next(answers(model, [Sample("s", two.images, messages)], max_new_tokens=8))

    truth = answer(*two.messages)
    assert answer(*two.messages[:-1], Message("assistant", "something else")) == truth
    assert answer(*two.messages[:-1]) == truth
    earlier = (two.messages[0], Message("assistant", "two blue stars"), *two.messages[2:])
    assert answer(*earlier) != truth


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_restored_after_use_an_error_and_an_early_close(
    model: LoadedModel, samples: list[Sample], training: bool
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


def test_answers_are_greedy_and_leave_no_gradient_behind(model: LoadedModel, samples: list[Sample]) -> None:
    torch.manual_seed(0)
    first = list(answers(model, samples, max_new_tokens=4))
    torch.manual_seed(1)
    assert list(answers(model, samples, max_new_tokens=4)) == first
    assert all(p.grad is None for p in model.model.parameters())
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_no_rows_give_no_answers(model: LoadedModel) -> None:
    assert list(answers(model, [])) == []


class FixedFeatures(nn.Module):
    """A model whose tower returns a fixed output."""

    def __init__(self, output: BaseModelOutputWithPooling) -> None:
        super().__init__()
        self.output = output

    @property
    def base_model(self) -> FixedFeatures:
        return self

    def get_image_features(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        return self.output


def test_other_tower_outputs_are_not_cached() -> None:
    blocks = torch.zeros(2, 3, 4)
    more = BaseModelOutputWithPooling(pooler_output=blocks)  # type: ignore[arg-type]
    more["indicators"] = blocks
    for output in (more, BaseModelOutputWithPooling(last_hidden_state=blocks)):  # type: ignore[arg-type]
        model = FixedFeatures(output)
        with cache_image_features(model), cache_image_features(model):
            for _ in range(2):
                assert model.get_image_features(torch.rand(2, 3, 8, 8)) is output
        assert model.get_image_features(blocks) is output


def test_an_image_passes_through_the_tower_once(
    model: LoadedModel, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner: Any = base_model(model.model).base_model
    images_per_pass: list[int] = []

    def count(module: object, args: tuple[torch.Tensor, ...]) -> None:
        images_per_pass.append(len(args[0]))

    def generate(rows: list[Sample]) -> list[str]:
        images_per_pass.clear()
        return list(answers(model, rows, batch_size=2, max_new_tokens=8))

    handle = inner.vision_tower.register_forward_pre_hook(count)
    alone, again = generate(samples), generate(samples[::-1])
    images = {id(image) for sample in samples for image in sample.images}
    assert sum(images_per_pass) > len(images)
    with cache_image_features(model.model):
        assert generate(samples) == alone and sum(images_per_pass) == len(images)
        assert generate(samples[::-1]) == again and not images_per_pass
        monkeypatch.setattr(prefix_cache, "_CACHE_BYTES", 0)
        assert generate(samples[:1]) == alone[:1] and not images_per_pass
        assert generate(samples[:1]) == alone[:1] and sum(images_per_pass) == 1  # evicted: the cache has no room
    assert generate(samples[:1]) == alone[:1] and "get_image_features" not in vars(inner)
    handle.remove()


def test_prompts_with_the_same_image_share_a_prefix(model: LoadedModel, samples: list[Sample]) -> None:
    first, other = samples[0].images, samples[1].images
    prompts = ["what?", "is this red, or is it blue? tell me", "what is this?", "which shape?", "how many, and where?"]
    rows = [
        Sample(str(i), image, (Message("user", f"<image>\n{text}"),))
        for i, (text, image) in enumerate(zip(prompts, (first, other, first, first, other), strict=True))
    ]
    read: list[torch.Size] = []
    language = cast(Any, base_model(model.model).base_model).language_model
    handle = language.register_forward_pre_hook(
        lambda _, args, how: read.append(how["inputs_embeds"].shape[:2]), with_kwargs=True
    )

    def generate(rows: list[Sample], size: int) -> list[str]:
        read.clear()
        return list(answers(model, rows, batch_size=size, max_new_tokens=6))

    alone = generate(rows, 1)
    whole = max(shape[1] for shape in read)
    assert len(set(alone)) >= 4
    assert generate(rows, 5) == alone
    (prefixes, prefix), (count, rest), *_ = read
    assert (prefixes, count) == (2, 5) and prefix + rest == whole
    assert generate(rows[:2], 2) == alone[:2] and read[0] == (2, whole)  # no repeated image: unchanged
    for extra in (samples[2], samples[3]):  # no image, and two
        mixed = [*rows, extra]
        assert generate(mixed, 6) == generate(mixed, 1)
    later = Sample("later", first, (Message("user", "look: <image>\nwhat?"),))  # text before the image
    mixed = [*rows, later]
    assert generate(mixed, 6) == generate(mixed, 1)
    handle.remove()
