"""The preset `default` in the user's own trainer: the same training as that of `untrigger train`, to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from untrigger import defended
from untrigger.defenses import BYORN, SharedSurprise
from untrigger.errors import InputError
from untrigger.models.collators import ChatCollator, FlaggedTokensCollator, Rows, row_key
from untrigger.models.loading import add_lora, load
from untrigger.rows.sample import Sample
from untrigger.training.finetune import fine_tune
from untrigger.training.host_training import JUDGED, _check_parting
from untrigger.training.settings import arguments

EAGER = SharedSurprise(
    warmup_share=0.25, min_nll=0.1, iqr_factor=0.0, p_value=1 - 1e-6, unlikelihood_weight=3.0
)  # doubts a quarter of any rows
HELD = ("train_dataset", "eval_dataset", "callbacks", "optimizers")  # what a trainer is given beside settings


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Killed


def settings(out: Path, **changed: Any) -> TrainingArguments:
    return arguments(
        out,
        **{
            "num_train_epochs": 4,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "seed": 3,
            "logging_steps": 1,
            "save_steps": 3,
            "remove_unused_columns": False,
            **changed,
        },
    )


@pytest.fixture
def host(tiny_model: Path, samples: list[Sample], tmp_path: Path) -> Callable[..., Any]:
    def make(defense: Any = EAGER, out: str = "out", **changed: Any) -> Any:
        told = {name: changed.pop(name) for name in HELD if name in changed}
        args = settings(tmp_path / out, **changed)
        set_seed(args.seed)
        loaded = load(tiny_model, dtype=torch.float32)
        return defended(Trainer)(
            add_lora(loaded.model),  # type: ignore[arg-type]
            args=args,
            data_collator=ChatCollator(loaded.processor),
            defense=defense,
            **{"train_dataset": Rows(samples), **told},
        )

    return make


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_trains_to_the_bit_as_the_command_does(
    host: Callable[..., Any], tiny_model: Path, samples: list[Sample], tmp_path: Path
) -> None:
    trainer = host()
    args = trainer.args
    output = trainer.train()
    told = json.loads((tmp_path / "out" / JUDGED).read_text())
    assert told["rows"] == 24 and 0 < len(told["distrusted"]) < 24
    assert output.global_step == trainer.state.global_step == 9  # three quarters of four epochs of three steps
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(logged["defense/loss_ce"] + logged["defense/loss_unlikelihood"], rel=1e-4)
    assert logged["defense/loss_unlikelihood"] > 0
    assert trainer.args is args and len(trainer.train_dataset) == 24, "the host's own settings are as they were"

    theirs = fine_tune(str(tiny_model), samples, EAGER, settings(tmp_path / "command"))
    assert same(weights(trainer.model), weights(theirs.model))
    flagged = [json.loads(line) for line in (tmp_path / "command/distrusted.jsonl").read_text().splitlines()]
    same_rows = [(row["row"], row["why"], [row["answer"]]) for row in told["distrusted"]]
    assert same_rows == [(row["row"], row["why"], row["answers"]) for row in flagged]


def test_left_out_it_is_the_default(host: Callable[..., Any]) -> None:
    assert host(None).procedure == SharedSurprise()


def test_where_nothing_is_doubted_the_loss_is_the_hosts(host: Callable[..., Any], tmp_path: Path) -> None:
    trainer = host(SharedSurprise(min_nll=1e9), max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 4 and json.loads((tmp_path / "out" / JUDGED).read_text())["distrusted"] == []
    assert not any(name.startswith("defense/") for name in trainer.state.log_history[0])


def test_killed_and_resumed_it_ends_in_the_same_bits(host: Callable[..., Any], tmp_path: Path) -> None:
    whole = host()
    whole.train()
    with pytest.raises(Killed):
        host(out="killed", callbacks=[KillAt(7)]).train()
    resumed = host(out="killed")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 9 and same(weights(whole.model), weights(resumed.model))
    assert (tmp_path / "out" / JUDGED).read_text() == (tmp_path / "killed" / JUDGED).read_text()


def test_a_second_training_goes_on_from_the_model_and_judges_again(host: Callable[..., Any], tmp_path: Path) -> None:
    twice, fresh = host(), host(out="fresh")
    twice.train()
    fresh.model.load_state_dict(twice.model.state_dict())
    twice.train()
    fresh.train()
    assert twice.state.global_step == 9 and same(weights(twice.model), weights(fresh.model))
    assert (tmp_path / "out" / JUDGED).read_text() == (tmp_path / "fresh" / JUDGED).read_text()
    assert any(log.get("defense/loss_unlikelihood") for log in twice.state.log_history)


def test_it_does_not_go_on_with_other_rows_or_without_a_judgment(
    host: Callable[..., Any], samples: list[Sample], tmp_path: Path
) -> None:
    host().train()
    last = max((tmp_path / "out").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    for changed in (
        {"train_dataset": Rows(samples[::-1])},
        {"train_dataset": Rows(samples[:-1])},
        {"defense": SharedSurprise()},
    ):
        with pytest.raises(InputError, match="json: rows or defense are others now"):
            host(**changed).train(resume_from_checkpoint=str(last))
    (tmp_path / "out" / JUDGED).unlink()
    with pytest.raises(InputError, match="json: holds no judgment"):
        host().train(resume_from_checkpoint=str(last))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from ()


def test_what_it_cannot_work_with_is_said_before_anything_is_trained(host: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="a train_dataset with a length"):
        host(train_dataset=Stream(), max_steps=2).train()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(InputError, match="leave out optimizers and model_init"):
        host(optimizers=(optimizer, None)).train()
    with pytest.raises(InputError, match="label_smoothing"):
        host(label_smoothing_factor=0.1)
    with pytest.raises(InputError, match="Byorn: works in several trainings"):
        host(BYORN())


def test_without_its_columns_a_row_cannot_be_judged(host: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="set remove_unused_columns=False"):
        host(remove_unused_columns=True).train()


class Restless(Rows):
    """Rows whose images are others each time, as augmentation in a data set makes them."""

    def __getitem__(self, index: int) -> Any:
        row = super().__getitem__(index)
        return {**row, "images": [image.rotate(float(torch.rand(()) * 90)) for image in row["images"]]}


def test_rows_that_would_not_be_known_again_are_refused(host: Callable[..., Any], samples: list[Sample]) -> None:
    with pytest.raises(InputError, match="draw what is random in the collator"):
        host(train_dataset=Restless(samples)).train()


def test_loader_workers_change_nothing(host: Callable[..., Any], tmp_path: Path) -> None:
    alone, helped = host(max_steps=4), host(out="helped", max_steps=4, dataloader_num_workers=2)
    alone.train()
    helped.train()
    assert same(weights(alone.model), weights(helped.model))
    assert (tmp_path / "out" / JUDGED).read_text() == (tmp_path / "helped" / JUDGED).read_text()


def test_evaluation_is_the_hosts_and_doubts_nothing(
    host: Callable[..., Any], samples: list[Sample], tmp_path: Path
) -> None:
    trainer = host(max_steps=4, eval_strategy="steps", eval_steps=3, eval_dataset=Rows(samples))
    trainer.train()
    evaluated = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert [log["step"] for log in evaluated] == [3], "once, in the rest of the training: the early part is silent"
    assert not any(name.startswith("defense/") for name in evaluated[0])
    assert json.loads((tmp_path / "out" / JUDGED).read_text())["distrusted"], "some of the same rows are doubted"
    theirs = Trainer(trainer.model, trainer.args, trainer.data_collator, eval_dataset=Rows(samples))
    assert trainer.evaluate()["eval_loss"] == theirs.evaluate()["eval_loss"]


def everywhere(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return batch | {"labels": batch["input_ids"].clone()}


def packed(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return batch | {"attention_mask": batch["attention_mask"].cumsum(dim=1)}


def flattened(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in batch.items() if name != "attention_mask"}


@pytest.mark.parametrize(
    ("changed", "mend"),
    [(everywhere, "assistant_only_loss=True"), (packed, "packing=False"), (flattened, "packing=False")],
)
def test_batches_in_which_rows_cannot_be_judged_are_refused(host: Callable[..., Any], changed: Any, mend: str) -> None:
    trainer = host()
    inner = trainer.data_collator

    def collate(rows: list[Any]) -> Any:
        return changed(inner(rows))

    collate.processor = inner.processor  # type: ignore[attr-defined]
    trainer.data_collator = collate
    with pytest.raises(InputError, match=mend):
        trainer.train()


def fsdp(version: int, rank_0_alone: bool = False, offload: OffloadPolicy = OffloadPolicy()) -> dict[str, Any]:  # noqa: B008
    told = {"fsdp_version": version, "cpu_ram_efficient_loading": rank_0_alone, "cpu_offload": offload}
    return {"fsdp_plugin": SimpleNamespace(**told)}


def zero(stage: int, **config: Any) -> dict[str, Any]:
    return {"deepspeed_plugin": SimpleNamespace(zero_stage=stage, deepspeed_config=config)}


@pytest.mark.parametrize(
    ("parting", "mend"),
    [
        (fsdp(2), ""),
        (fsdp(1), "set version to 2"),
        (fsdp(2, True), "cpu_ram_efficient_loading and offload_params to false"),
        (fsdp(2, offload=CPUOffloadPolicy()), "offload_params to false"),
        (zero(2, optimizer={}), ""),
        (zero(3), "set stage to 2"),
        (zero(1, scheduler={}), "set lr_scheduler_type"),
    ],
)
def test_only_a_model_that_is_whole_when_it_is_asked_is_judged(parting: dict[str, Any], mend: str) -> None:
    with pytest.raises(InputError, match=mend) if mend else nullcontext():
        _check_parting(SimpleNamespace(**parting))


def test_rows_are_known_by_what_they_hold(samples: list[Sample]) -> None:
    rows = Rows(samples)
    keys = [row_key(rows[i]) for i in range(len(rows))]
    assert len(set(keys)) == len(keys) and keys == [row_key(rows[i]) for i in range(len(rows))]
    assert row_key({"a": ["x"], "b": ["y"]}) != row_key({"a": ["x", "y"], "b": []})
    assert row_key({"a": torch.ones(2)}) != row_key({"a": torch.zeros(2)})


def test_a_marked_row_keeps_the_labels_of_its_doubted_words_alone(tiny_model: Path, samples: list[Sample]) -> None:
    inner, rows = ChatCollator(load(tiny_model).processor), Rows(samples)
    batch = [rows[i] for i in range(4)]
    plain = inner(batch)
    told = plain["labels"][2] != -100
    marks = torch.arange(int(told.sum())) == 1
    made = FlaggedTokensCollator(inner, {row_key(batch[2]): marks.numpy()})(batch)
    assert made["flagged_tokens"].sum() == 1 and made["flagged_tokens"][2, told.nonzero()[1]].all()
    assert torch.equal(made["labels"][[0, 1, 3]], plain["labels"][[0, 1, 3]])
    assert (made["labels"][2] != -100).sum() == 1
    assert "flagged_tokens" not in FlaggedTokensCollator(inner, {})(batch)
