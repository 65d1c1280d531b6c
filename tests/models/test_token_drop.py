"""Dropping image tokens equals masking them, with the same position ids but a shorter input."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from untrigger.defenses import CrossView, TwoView
from untrigger.errors import InputError
from untrigger.losses import objective
from untrigger.models.collators import IGNORE, ChatCollator, DropCollator, Rows
from untrigger.models.forward import Pair, decoder, pair_losses
from untrigger.models.loading import LoadedModel, add_lora, embedded_models, load
from untrigger.models.token_drop import image_token_id, keep_positions, positions_after_drop, with_image_features
from untrigger.rows.sample import Message, Sample, read

IMAGE = 7


@given(st.integers(0, 12), st.floats(0, 1), st.integers(0, 2**16))
def test_only_the_last_image_tokens_are_dropped(count: int, ratio: float, seed: int) -> None:
    make = torch.Generator().manual_seed(seed)
    ids = torch.tensor([[1, *[IMAGE] * count, 2, 3], [IMAGE, 2, 3, *[4] * count]])
    order = torch.rand(ids.shape, generator=make)
    remaining = positions_after_drop(ids, order, IMAGE, ratio)
    assert remaining[ids != IMAGE].all()
    for row in range(2):
        image = ids[row] == IMAGE
        dropped = int((~remaining[row]).sum())
        assert dropped == int(torch.tensor(ratio * int(image.sum())).round())
        if dropped:
            first = order[row][remaining[row] & image]
            assert not len(first) or order[row][~remaining[row]].min() >= first.max()


@pytest.fixture
def samples(tiny_data: Path) -> list[Sample]:
    """A row with one image, a row with two, and a row without, in this order."""
    rows = list(read(tiny_data))
    answer = Message("assistant", "no, not the same")
    two = Sample("two", (rows[1].images[0], rows[2].images[0]), (Message("user", "<image> <image> same?"), answer))
    return [rows[0], two, Sample("none", (), (Message("user", "hello?"), Message("assistant", "yes")))]


@pytest.fixture
def exact(tiny_model: Path, sharp: Callable[..., LoadedModel]) -> LoadedModel:
    return sharp(tiny_model)


def batch_of(loaded: LoadedModel, samples: list[Sample], epoch: int = 0, seed: int = 0) -> dict[str, Tensor]:
    collate = DropCollator(ChatCollator(loaded.processor), seed)
    collate.epoch = epoch
    rows = Rows(samples)
    return collate([rows[i] for i in range(len(rows))])


def masked(loaded: LoadedModel, batch: dict[str, Tensor], positions: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and hidden states at the answers with the dropped tokens masked: the full-length reference."""
    inputs = {name: value for name, value in batch.items() if name not in ("order", "labels", "attention_mask")}
    mask = batch["attention_mask"] * positions
    places = torch.arange(mask.shape[1]).expand_as(mask)
    out = loaded.model(**inputs, attention_mask=mask, position_ids=places, output_hidden_states=True)
    keep = batch["labels"][:, 1:] != IGNORE
    return out.logits[:, :-1][keep], out.hidden_states[-1][:, :-1][keep]


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("ratio", [0.25, 0.75, 1.0])
@pytest.mark.parametrize("stop_gradient", [False, True])
def test_dropping_equals_masking_in_values_and_gradients(
    exact: LoadedModel, samples: list[Sample], ratio: float, stop_gradient: bool
) -> None:
    batch, model = batch_of(exact, samples), exact.model.train()
    positions = positions_after_drop(batch["input_ids"], batch["order"], image_token_id(model), ratio)
    assert positions.sum(dim=1).unique().numel() == 3, "rows have paddings of different lengths"
    defense = CrossView(view="drop", ratio=ratio, margin=0.6, bound=-0.9, entropy_high=0.5, stop_gradient=stop_gradient)
    assert (defense.dropped, defense.paired, defense.has_loss) == (ratio, None, True)
    step = defense.step(model, batch)
    ours = gradients(model, step.total.sum())

    target = batch["labels"][:, 1:][batch["labels"][:, 1:] != IGNORE]
    logits, hidden = masked(exact, batch, torch.ones_like(positions))
    view_logits, view_hidden = (x.detach() if stop_gradient else x for x in masked(exact, batch, positions))
    terms = defense.terms(Pair(target, logits, view_logits, hidden, view_hidden, target))
    torch.testing.assert_close(step.total, torch.stack(list(terms.values())).sum(dim=0))
    assert torch.any(step.logged["js"] > 1e-4), "the view differs"
    theirs = gradients(model, torch.stack(list(terms.values())).sum())
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-7, atol=1e-11, msg=name)


@pytest.mark.parametrize("family", embedded_models())
def test_every_embedded_family_can_drop_image_tokens(family: str, samples: list[Sample]) -> None:
    loaded = load(family)
    model = add_lora(loaded.model, rank=2).train()
    batch = batch_of(LoadedModel(cast(Any, model), loaded.processor, family), samples[:2])
    lengths: list[int] = []
    handle = (
        decoder(model)
        .layers[0]
        .register_forward_pre_hook(  # type: ignore[operator, union-attr]
            lambda _, args: lengths.append(args[0].shape[1])
        )
    )
    losses, _ = pair_losses(model, batch, lambda pair: ({"js": pair.compared.js}, {}), drop=0.75)
    handle.remove()
    losses.total.sum().backward()
    assert lengths[0] < lengths[1] == batch["input_ids"].shape[1]
    assert losses.total.isfinite().all() and (losses.total > 0).any()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    whole, _ = pair_losses(model, batch, lambda pair: ({"js": pair.compared.js}, {}), drop=1e-9)
    assert float(whole.total.detach().abs().max()) < 1e-5, "a view without dropped tokens equals the original"


def test_both_views_share_one_pass_through_the_tower(exact: LoadedModel, samples: list[Sample]) -> None:
    if "mm_encoder_outputs" not in inspect.signature(exact.model.forward).parameters:
        pytest.skip("transformers before 5.22 takes no features of the tower: it runs in each pass")
    tower_passes: list[int] = []
    tower = cast(Any, exact.model).model.vision_tower
    handle = tower.register_forward_hook(lambda *_: tower_passes.append(1))
    CrossView(view="drop").step(exact.model, batch_of(exact, samples))
    assert len(tower_passes) == 1

    class Wrapped(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **inputs: Any) -> Any:
            return self.module(**inputs)

    step = CrossView(view="drop").step(Wrapped(exact.model), batch_of(exact, samples))
    handle.remove()
    assert len(tower_passes) == 3, "a wrapped model runs its tower in each pass"
    torch.testing.assert_close(step.total, CrossView(view="drop").step(exact.model, batch_of(exact, samples)).total)


def test_views_of_rows_without_images_equal_the_originals(exact: LoadedModel, samples: list[Sample]) -> None:
    batch = batch_of(exact, [samples[2], samples[2]])
    assert "pixel_values" not in batch and with_image_features(exact.model, batch) is batch
    assert not CrossView(view="drop").step(exact.model, batch).logged["js"].any()


def test_the_order_depends_on_seed_epoch_and_row_only(exact: LoadedModel, samples: list[Sample]) -> None:
    order, mask = (batch_of(exact, samples)[name] for name in ("order", "attention_mask"))
    alone = batch_of(exact, samples[:1])["order"][0]
    assert torch.equal(order[0, : len(alone)], alone)
    assert (order[mask == 0] == 1).all() and (order[mask == 1] < 1).all()
    for other in (batch_of(exact, samples, epoch=1), batch_of(exact, samples, seed=1)):
        assert not torch.equal(other["order"], order)


def test_a_family_with_unknown_tensor_inputs_raises(exact: LoadedModel, samples: list[Sample]) -> None:
    batch = batch_of(exact, samples)
    positions = positions_after_drop(batch["input_ids"], batch["order"], image_token_id(exact.model), 0.5)
    language = decoder(exact.model)
    with (
        keep_positions(exact.model, language, positions),
        pytest.raises(InputError, match="LlavaForConditionalGeneration: its image tokens cannot be dropped"),
    ):
        language(inputs_embeds=torch.zeros(*positions.shape, 32), where_images_are=positions)
    assert not language._forward_pre_hooks  # pyright: ignore[reportPrivateUsage]


def test_two_view_can_drop_tokens_too(exact: LoadedModel, samples: list[Sample]) -> None:
    step = TwoView(view="drop", ratio=0.5).step(exact.model, batch_of(exact, samples))
    torch.testing.assert_close(step.total, step.logged["ce"] + step.logged["ce_view"])
    assert objective.reduce(step.total, 3).requires_grad
