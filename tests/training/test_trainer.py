"""The defended loss and its gradients against plain formulas; the host's own behavior without pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed

from untrigger.defenses import CrossView, Defense, PatchAug, Plain, TwoView
from untrigger.errors import InputError
from untrigger.models.collators import IGNORE, ChatCollator, PairCollator, Row, Rows
from untrigger.models.forward import pair_losses
from untrigger.models.loading import LoadedModel, add_lora, load
from untrigger.rows.sample import read
from untrigger.training.settings import arguments
from untrigger.training.trainer import defended
from untrigger.views.patches import Erase

OFF = {"view_weight": 0.0, "output_weight": 0.0, "feature_weight": 0.0, "entropy_weight": 0.0}
# every hinge of these is active on the random model, so every term has a gradient
TERMS: dict[str, Defense] = {
    "view": CrossView(**(OFF | {"view_weight": 0.7})),
    "output": CrossView(**(OFF | {"output_weight": 3.0}), margin=0.6),
    "feature": CrossView(**(OFF | {"feature_weight": 2.0}), bound=-0.9),
    "entropy high": CrossView(**(OFF | {"entropy_weight": 2.0}), entropy_low=0.0, entropy_high=0.5),
    "entropy low": CrossView(**(OFF | {"entropy_weight": 2.0}), entropy_low=20.0, entropy_high=30.0),
    "all": CrossView(margin=0.6, bound=-0.9, entropy_high=0.5),
    "stop gradient": CrossView(margin=0.6, bound=-0.9, entropy_high=0.5, stop_gradient=True),
    "two-view": TwoView(view_weight=1.5),
}


@pytest.fixture
def exact(tiny_model: Path, sharp: Callable[..., LoadedModel]) -> LoadedModel:
    """The tiny model in float64, where rounding cannot hide a wrong formula, with larger weights on its images."""
    return sharp(tiny_model)


@pytest.fixture(scope="module")
def rows(tiny_data: Path) -> list[Row]:
    data = Rows(read(tiny_data))
    return [data[i] for i in range(6)]


def trainer_of(
    loaded: LoadedModel, defense: Defense, out: Path, data: list[Row], host: type[Trainer] = Trainer, **settings: Any
) -> Any:
    args = arguments(out, use_cpu=True, save_strategy="no", **settings)
    return defended(host)(
        model=loaded.model, args=args, train_dataset=data, data_collator=ChatCollator(loaded.processor), defense=defense
    )


def pair_of(loaded: LoadedModel, defense: Defense, data: list[Row]) -> dict[str, Tensor]:
    assert defense.paired is not None
    return PairCollator(ChatCollator(loaded.processor), defense.paired[0], seed=42)(data)


# --- the naive reference: two forwards, full logits, textbook formulas ---------------------------


def naive_terms(loaded: LoadedModel, pair: dict[str, Tensor], d: Defense) -> dict[str, Tensor]:
    """Sums over the answer tokens, by name; a loop over tokens with -, *, log and nothing of the package."""
    half = len(pair["labels"]) // 2
    labels = pair["labels"][:half]
    images = len(pair["pixel_values"]) // 2
    outputs = []
    for part, pixels in ((slice(0, half), slice(0, images)), (slice(half, None), slice(images, None))):
        out = loaded.model(
            input_ids=pair["input_ids"][part],
            attention_mask=pair["attention_mask"][part],
            pixel_values=pair["pixel_values"][pixels],
            output_hidden_states=True,
        )
        still = isinstance(d, CrossView) and d.stop_gradient and len(outputs) == 1
        outputs.append(tuple(x.detach() if still else x for x in (out.logits, out.hidden_states[-1])))
    (z, h), (z_view, h_view) = outputs
    sums = dict.fromkeys(
        ("ce", "ce_view", "js", "entropy", "separation", "feature", "band", "count"), torch.tensor(0.0)
    )
    sums = {name: value.double() for name, value in sums.items()}
    for b in range(half):
        for t in range(1, labels.shape[1]):
            y = int(labels[b, t])
            if y == IGNORE:
                continue
            p, q = (torch.exp(x[b, t - 1]) / torch.exp(x[b, t - 1]).sum() for x in (z, z_view))
            m = (p + q) / 2
            js = 0.5 * (p * torch.log(p / m)).sum() + 0.5 * (q * torch.log(q / m)).sum()
            entropy = -(p * torch.log(p)).sum()
            u, v = h[b, t - 1], h_view[b, t - 1]
            cosine = (u * v).sum() / torch.sqrt((u * u).sum() * (v * v).sum())
            step = {"ce": -torch.log(p[y]), "ce_view": -torch.log(q[y]), "js": js, "entropy": entropy, "count": 1.0}
            if isinstance(d, CrossView):
                step["separation"] = (d.margin - js).clamp(min=0)
                step["feature"] = (cosine - d.bound).clamp(min=0)
                step["band"] = (entropy - d.entropy_high).clamp(min=0) + (d.entropy_low - entropy).clamp(min=0)
            sums = {name: sums[name] + step.get(name, 0.0) for name in sums}
    return sums


def naive_loss(sums: dict[str, Tensor], d: Any) -> Tensor:
    loss = sums["ce"] + d.view_weight * sums["ce_view"]
    if isinstance(d, CrossView):
        loss = loss + d.output_weight * sums["separation"] + d.feature_weight * sums["feature"]
        loss = loss + d.entropy_weight * sums["band"]
    return loss


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", TERMS)
def test_loss_and_gradients_equal_the_naive_reference(
    exact: LoadedModel, rows: list[Row], tmp_path: Path, name: str
) -> None:
    defense, model = TERMS[name], exact.model.train()
    trainer = trainer_of(exact, defense, tmp_path, rows)
    pair = pair_of(exact, defense, rows[:3])
    items = 11  # of the whole optimizer step: more than this batch holds
    loss = trainer.compute_loss(model, dict(pair), num_items_in_batch=torch.tensor(items))
    ours = gradients(model, loss)
    expected = naive_loss(naive_terms(exact, pair, defense), defense) / items
    expected_gradients = gradients(model, expected)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert ours.keys() == expected_gradients.keys()
    assert max(float(g.abs().max()) for g in ours.values()) > 1e-3
    for key in ours:
        torch.testing.assert_close(ours[key], expected_gradients[key], rtol=1e-7, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", ["output", "feature", "entropy high", "entropy low", "view"])
def test_every_term_has_a_gradient(exact: LoadedModel, rows: list[Row], tmp_path: Path, name: str) -> None:
    trainer = trainer_of(exact, TERMS[name], tmp_path, rows)
    pair = pair_of(exact, TERMS[name], rows[:3])
    model = exact.model.train()
    total = gradients(model, trainer.compute_loss(model, dict(pair), num_items_in_batch=11))
    alone = gradients(model, pair_losses(model, pair, lambda part: ({"ce": part.compared.nll}, {}))[0].total.sum() / 11)
    gap = max(float((total[k] - alone[k]).abs().max()) for k in total)
    assert gap > 1e-4


def test_loss_is_the_batch_mean_without_a_count(exact: LoadedModel, rows: list[Row], tmp_path: Path) -> None:
    trainer = trainer_of(exact, TERMS["all"], tmp_path, rows)
    pair = pair_of(exact, TERMS["all"], rows[:4])
    model = exact.model.train()
    count = int((pair["labels"][:, 1:] != IGNORE).sum())
    mean = trainer.compute_loss(model, dict(pair), num_items_in_batch=None)
    whole = trainer.compute_loss(model, dict(pair), num_items_in_batch=count)
    assert mean.item() == pytest.approx(whole.item(), rel=1e-12)


def test_the_hosts_count_covers_each_answer_token_once(exact: LoadedModel, rows: list[Row], tmp_path: Path) -> None:
    trainer = trainer_of(exact, TERMS["all"], tmp_path, rows, per_device_train_batch_size=6)
    (batch,) = trainer.get_train_dataloader()
    plain = ChatCollator(exact.processor)(rows)
    assert batch["input_ids"].shape[0] == 12
    assert trainer._get_num_items_in_batch([batch], trainer.args.device) == (plain["labels"][:, 1:] != IGNORE).sum()


def test_returns_no_logits_as_outputs(exact: LoadedModel, rows: list[Row], tmp_path: Path) -> None:
    trainer = trainer_of(exact, TERMS["all"], tmp_path, rows)
    loss, outputs = trainer.compute_loss(exact.model.train(), pair_of(exact, TERMS["all"], rows[:2]), True)
    assert loss.requires_grad and outputs == {"loss": loss}


# --- nothing but plain fine-tuning where the weights are zero ------------------------------------


def trajectory(
    tiny_model: Path, out: Path, data: list[Row], defense: Defense | None, **settings: Any
) -> dict[str, Any]:
    set_seed(0)
    loaded = load(str(tiny_model), dtype=torch.float32)
    model = add_lora(loaded.model, rank=4)
    chosen: dict[str, Any] = {"per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-2}
    chosen["logging_steps"] = 1
    args = arguments(out, use_cpu=True, save_strategy="no", **(chosen | settings))
    common = {"model": model, "args": args, "train_dataset": data, "data_collator": ChatCollator(loaded.processor)}
    trainer = Trainer(**common) if defense is None else defended(Trainer)(**common, defense=defense)
    trainer.train()
    weights = {k: v.clone() for k, v in model.state_dict().items() if "lora" in k}
    return {"weights": weights, "losses": [h["loss"] for h in trainer.state.log_history if "loss" in h]}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_zero_weights_give_the_hosts_trajectory_to_the_bit(
    tiny_model: Path, tmp_path: Path, rows: list[Row], accumulate: int
) -> None:
    settings = {"gradient_accumulation_steps": accumulate, "max_steps": 3}
    host = trajectory(tiny_model, tmp_path, rows, None, **settings)
    assert any(float(w.abs().max()) > 1e-3 for k, w in host["weights"].items() if "lora_B" in k)
    for defense in (CrossView(**OFF), TwoView(view_weight=0.0), Plain()):
        ours = trajectory(tiny_model, tmp_path, rows, defense, **settings)
        assert ours["losses"] == host["losses"]
        assert all(torch.equal(ours["weights"][k], host["weights"][k]) for k in host["weights"])


def test_cross_entropy_is_the_hosts_with_views_in_the_batch(tiny_model: Path, tmp_path: Path, rows: list[Row]) -> None:
    loaded = load(str(tiny_model), dtype=torch.float32)
    defense = CrossView(**(OFF | {"output_weight": 1e-30}))
    trainer = trainer_of(loaded, defense, tmp_path, rows)
    model = loaded.model.train()
    plain = ChatCollator(loaded.processor)(rows)
    items = (plain["labels"][:, 1:] != IGNORE).sum()
    host = Trainer.compute_loss(trainer, model, dict(plain), num_items_in_batch=items)
    ours = trainer.compute_loss(model, pair_of(loaded, defense, rows), num_items_in_batch=items)
    assert ours.item() == pytest.approx(host.item(), abs=1e-6)
    ours_grad, host_grad = gradients(model, ours), gradients(model, host)
    assert all(torch.allclose(ours_grad[k], host_grad[k], atol=1e-6) for k in host_grad)


def test_training_is_the_hosts_with_views_in_the_batch(tiny_model: Path, tmp_path: Path, rows: list[Row]) -> None:
    # sgd: adam divides by the size of the gradient, and would amplify rounding to whole steps
    settings = {"optim": "sgd", "learning_rate": 1.0, "gradient_accumulation_steps": 2, "max_steps": 3}
    host = trajectory(tiny_model, tmp_path, rows, None, **settings)
    ours = trajectory(tiny_model, tmp_path, rows, CrossView(**(OFF | {"output_weight": 1e-30})), **settings)
    assert ours["losses"] == pytest.approx(host["losses"], abs=1e-5)
    assert all(torch.allclose(ours["weights"][k], host["weights"][k], atol=1e-6) for k in host["weights"])


# --- evaluation, diagnostics, hosts ---------------------------------------------------------------


class Recording(Trainer):
    """A user's trainer: records the batches of the host's loss, and has its own step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.host_batches: list[tuple[bool, int]] = []
        self.steps: list[int] = []

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.host_batches.append((model.training, inputs["input_ids"].shape[0]))
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.steps.append(inputs["input_ids"].shape[0])
        return super().training_step(model, inputs, *args, **kwargs)


def test_evaluation_in_training_is_the_hosts(tiny_model: Path, tmp_path: Path, rows: list[Row]) -> None:
    loaded = load(str(tiny_model), dtype=torch.float32)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 1, "max_steps": 2, "learning_rate": 0.0}
    args = arguments(
        tmp_path,
        use_cpu=True,
        save_strategy="no",
        per_device_train_batch_size=2,
        per_device_eval_batch_size=6,
        **settings,
    )
    common = {"model": loaded.model, "args": args, "data_collator": ChatCollator(loaded.processor)}
    trainer = defended(Recording)(**common, train_dataset=rows, eval_dataset=rows, defense=TERMS["all"])
    trainer.train()
    assert trainer.steps == [4, 4]  # two rows and their views; the user's own training_step has run
    assert trainer.host_batches == [(False, 6), (False, 6)]
    host = Trainer(**common, eval_dataset=rows).evaluate()["eval_loss"]
    history = trainer.state.log_history
    assert [h["eval_loss"] for h in history if "eval_loss" in h] == [host, host]
    assert not any(k.startswith("defense/") for h in history if "eval_loss" in h for k in h)
    assert trainer.data_collator is common["data_collator"]
    assert isinstance(trainer, Recording) and defended(Recording) is type(trainer)


def test_unpaired_training_uses_the_hosts_loss(tiny_model: Path, tmp_path: Path, rows: list[Row]) -> None:
    loaded = load(str(tiny_model), dtype=torch.float32)
    for defense in (Plain(), PatchAug()):
        trainer = trainer_of(loaded, defense, tmp_path, rows, Recording, per_device_train_batch_size=3, max_steps=1)
        trainer.train()
        assert trainer.host_batches == [(True, 3)]


def test_patch_augmentation_replaces_its_share_of_images(tiny_model: Path, tmp_path: Path, rows: list[Row]) -> None:
    loaded = load(str(tiny_model), dtype=torch.float32)
    plain = ChatCollator(loaded.processor)(rows)["pixel_values"]
    for share, expected in ((0.0, 0), (1.0, 6)):
        trainer = trainer_of(loaded, PatchAug(share=share), tmp_path, rows, per_device_train_batch_size=6)
        (batch,) = trainer.get_train_dataloader()
        changed = sum(not any(torch.equal(image, original) for original in plain) for image in batch["pixel_values"])
        assert changed == expected


def test_logged_terms_are_averages_since_the_last_log(exact: LoadedModel, tmp_path: Path, rows: list[Row]) -> None:
    defense = TERMS["all"]
    trainer = trainer_of(
        exact, defense, tmp_path, rows, per_device_train_batch_size=1, gradient_accumulation_steps=3, max_steps=2,
        logging_steps=2, learning_rate=0.0, optim="sgd",
    )  # fmt: skip
    trainer.train()
    (log,) = [h for h in trainer.state.log_history if "loss" in h]
    sums = naive_terms(exact, pair_of(exact, defense, rows), defense)
    mean = {name: (value / sums["count"]).item() for name, value in sums.items()}
    assert isinstance(defense, CrossView)
    expected = {
        "js": mean["js"],
        "entropy": mean["entropy"],
        "ce": mean["ce"],
        "ce_view": mean["ce_view"],
        "loss_ce": mean["ce"],
        "loss_ce_view": defense.view_weight * mean["ce_view"],
        "loss_separation": defense.output_weight * mean["separation"],
        "loss_feature_separation": defense.feature_weight * mean["feature"],
        "loss_entropy_band": defense.entropy_weight * mean["band"],
    }
    logged = {k.removeprefix("defense/"): v for k, v in log.items() if k.startswith("defense/")}
    assert logged == pytest.approx(expected, abs=2e-6)
    assert 1e-3 < logged["js"] < math.log(2)


def test_each_epoch_draws_new_views(tiny_model: Path, tmp_path: Path, rows: list[Row]) -> None:
    loaded = load(str(tiny_model), dtype=torch.float32)
    batches: list[Tensor] = []

    class Watching(Trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            batches.append(inputs["pixel_values"])
            return super().training_step(model, inputs, *args, **kwargs)

    trainer_of(
        loaded, TwoView(), tmp_path, rows[:1], Watching, num_train_epochs=3, per_device_train_batch_size=1
    ).train()
    assert len(batches) == 3
    assert all(torch.equal(batch[0], batches[0][0]) for batch in batches)
    assert len({batch[1].numpy().tobytes() for batch in batches}) == 3


@pytest.mark.parametrize("defense", [Plain(), CrossView()], ids=repr)
def test_loads_the_best_full_model_at_the_end(
    defense: Defense, tiny_model: Path, tmp_path: Path, rows: list[Row]
) -> None:
    loaded = load(str(tiny_model), dtype=torch.float32)
    args = arguments(
        tmp_path, use_cpu=True, max_steps=4, learning_rate=0.3, eval_strategy="steps", eval_steps=1, save_steps=1,
        load_best_model_at_end=True, lr_scheduler_type="constant", save_total_limit=None,
    )  # fmt: skip
    trainer = defended(Trainer)(
        model=loaded.model, args=args, train_dataset=rows, eval_dataset=rows[:4],
        data_collator=ChatCollator(loaded.processor), defense=defense,
    )  # fmt: skip
    trainer.train()
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert losses[-1] > min(losses) + 0.1, "the last is not the best"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


# --- refusals -------------------------------------------------------------------------------------


@dataclass
class FusedArguments(TrainingArguments):
    loss_type: str = "chunked_nll"


class Liger(Trainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.args.use_liger_kernel = True


def test_refuses_fused_losses(tiny_model: Path, tmp_path: Path, rows: list[Row]) -> None:
    loaded = load(str(tiny_model), dtype=torch.float32)
    with pytest.raises(InputError, match="set loss_type='nll' and use_liger_kernel=False"):
        trainer_of(loaded, CrossView(), tmp_path, rows, Liger)
    args = FusedArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(InputError, match="set loss_type='nll'"):
        defended(Trainer)(model=loaded.model, args=args, defense=CrossView())


def test_refuses_settings_that_the_defended_loss_ignores(tiny_model: Path, tmp_path: Path, rows: list[Row]) -> None:
    loaded = load(str(tiny_model), dtype=torch.float32)
    with pytest.raises(InputError, match="label_smoothing_factor"):
        trainer_of(loaded, CrossView(), tmp_path, rows, label_smoothing_factor=0.1)
    trainer_of(loaded, Plain(), tmp_path, rows, label_smoothing_factor=0.1)
    own: Callable[..., Tensor] = lambda outputs, labels, num_items_in_batch: outputs.logits.sum()  # noqa: E731
    args = arguments(tmp_path, use_cpu=True)
    with pytest.raises(InputError, match="compute_loss_func"):
        defended(Trainer)(model=loaded.model, args=args, defense=CrossView(), compute_loss_func=own)


def test_refuses_views_that_change_the_tokens() -> None:
    def collate(rows: list[Row]) -> dict[str, Tensor]:
        ids = torch.tensor([[r["images"][0].getpixel((0, 0))[0]] for r in rows])
        return {"input_ids": ids, "labels": ids}

    from PIL import Image

    with pytest.raises(ValueError, match="tokens"):
        PairCollator(collate, Erase(ratio=1.0), 0)([{"images": [Image.new("RGB", (8, 8))], "messages": []}])
