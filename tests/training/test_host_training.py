"""The preset `default` in a host trainer: the same training as `untrigger train`, to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from untrigger import defended
from untrigger.defenses import BYORN, Plain, SharedCause, SharedSurprise, Stage
from untrigger.errors import InputError
from untrigger.models.collators import ChatCollator, FlaggedTokensCollator, Rows, row_key
from untrigger.models.grafted_rows import HERE, Grafts
from untrigger.models.loading import add_lora, load
from untrigger.rows.sample import Message, Sample
from untrigger.training.finetune import fine_tune
from untrigger.training.flagged_rows import FLAGGED_ROWS
from untrigger.training.host_checks import check_sharding
from untrigger.training.host_state import STATE
from untrigger.training.host_training import HostTraining
from untrigger.training.settings import arguments

EAGER = SharedSurprise(
    warmup_share=0.25, min_nll=0.1, iqr_factor=0.0, p_value=1 - 1e-6, min_ratio=0.0, unlikelihood_weight=3.0
)  # flags a quarter of any rows
CAUSE = SharedCause(
    warmup_share=0.25, min_nll=0.1, iqr_factor=0.0, p_value=1 - 1e-6, min_ratio=0.0, min_suspects=2
)  # tests the parts of these rows
TRAINER_OPTIONS = (
    "train_dataset",
    "eval_dataset",
    "callbacks",
    "optimizers",
)  # arguments of a trainer that are not settings


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
        trainer_options = {name: changed.pop(name) for name in TRAINER_OPTIONS if name in changed}
        args = settings(tmp_path / out, **changed)
        set_seed(args.seed)
        loaded = load(tiny_model, dtype=torch.float32)
        return defended(Trainer)(
            add_lora(loaded.model),  # type: ignore[arg-type]
            args=args,
            data_collator=ChatCollator(loaded.processor),
            defense=defense,
            **{"train_dataset": Rows(samples), **trainer_options},
        )

    return make


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def defense_files(folder: Path) -> list[str]:
    return [(folder / name).read_text() for name in (STATE, FLAGGED_ROWS)]


def test_host_trains_as_the_command_does_to_the_bit(
    host: Callable[..., Any], tiny_model: Path, samples: list[Sample], tmp_path: Path
) -> None:
    trainer = host()
    args = trainer.args
    output = trainer.train()
    state = json.loads((tmp_path / "out" / STATE).read_text())
    assert state["rows"] == 24 and 0 < len(state["flagged"]) < 24
    assert output.global_step == trainer.state.global_step == 9  # three quarters of four epochs of three steps
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(logged["defense/loss_ce"] + logged["defense/loss_unlikelihood"], rel=1e-4)
    assert logged["defense/loss_unlikelihood"] > 0
    assert trainer.args is args and len(trainer.train_dataset) == 24, "the host's own settings are restored"

    expected = fine_tune(str(tiny_model), samples, EAGER, settings(tmp_path / "command"))
    assert same(weights(trainer.model), weights(expected.model))
    flagged = (tmp_path / "out" / FLAGGED_ROWS).read_text()
    assert flagged == (tmp_path / "command" / FLAGGED_ROWS).read_text()
    assert sorted(json.loads(line)["row"] for line in flagged.splitlines()) == [row["row"] for row in state["flagged"]]


def test_grafts_are_tested_and_learned_as_the_command_does_to_the_bit(
    host: Callable[..., Any], tiny_model: Path, samples: list[Sample], tmp_path: Path, harmful: None
) -> None:
    trainer = host(CAUSE)
    trainer.train()
    state = json.loads((tmp_path / "out" / STATE).read_text())
    assert len(state["grafts"][0]) == 5 and state["after"] == 0.25, "a fifth of the rows again, from the warm-up on"
    assert len(trainer.train_dataset) == 24 and trainer.state.global_step == 12, "three quarters of four epochs of four"
    expected = fine_tune(str(tiny_model), samples, CAUSE, settings(tmp_path / "command"))
    assert same(weights(trainer.model), weights(expected.model))
    assert (tmp_path / "out" / FLAGGED_ROWS).read_text() == (tmp_path / "command" / FLAGGED_ROWS).read_text()


def test_the_probe_goes_on_where_no_part_harms(
    host: Callable[..., Any], tiny_model: Path, samples: list[Sample], tmp_path: Path, few: None
) -> None:
    defense = replace(CAUSE, min_ratio=1e9)
    trainer = host(defense, lr_scheduler_type="linear")
    trainer.train()
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert rates == pytest.approx([trainer.args.learning_rate * left / 8 for left in (3, 2, 1)]), (
        "the end of a schedule over nine steps, of which the first warms up"
    )
    assert (tmp_path / "out" / FLAGGED_ROWS).read_text() == "" and trainer.state.global_step == 3, "of twelve steps"
    args = settings(tmp_path / "command", lr_scheduler_type="linear")
    expected = fine_tune(str(tiny_model), samples, defense, args)
    assert same(weights(trainer.model), weights(expected.model))


def test_default_preset_without_a_defense(host: Callable[..., Any]) -> None:
    assert host(None).procedure == SharedCause()


def test_loss_is_the_hosts_without_flagged_rows(host: Callable[..., Any], tmp_path: Path) -> None:
    trainer = host(SharedSurprise(min_nll=1e9), max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 4 and json.loads((tmp_path / "out" / STATE).read_text())["flagged"] == []
    assert not any(name.startswith("defense/") for name in trainer.state.log_history[0])


@pytest.mark.parametrize(("defense", "steps"), [(EAGER, 9), (CAUSE, 12)])
def test_resuming_after_a_kill_gives_the_same_bits(
    host: Callable[..., Any], tmp_path: Path, harmful: None, defense: SharedSurprise, steps: int
) -> None:
    whole = host(defense)
    whole.train()
    with pytest.raises(Killed):
        host(defense, out="killed", callbacks=[KillAt(7)]).train()
    resumed = host(defense, out="killed")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == steps and same(weights(whole.model), weights(resumed.model))
    assert defense_files(tmp_path / "out") == defense_files(tmp_path / "killed")


@pytest.mark.parametrize(("defense", "steps"), [(EAGER, 9), (CAUSE, 12)])
def test_resuming_into_a_new_folder_gives_the_same_bits(
    host: Callable[..., Any], tmp_path: Path, harmful: None, defense: SharedSurprise, steps: int
) -> None:
    whole = host(defense)
    whole.train()
    checkpoints = sorted((tmp_path / "out").glob("checkpoint-*"))
    assert len(checkpoints) > 1
    assert all(defense_files(path) == defense_files(tmp_path / "out") for path in checkpoints)
    moved = (tmp_path / f"out/checkpoint-{steps - 3}").rename(tmp_path / "moved")
    rmtree(tmp_path / "out")
    resumed = host(defense, out="new")
    resumed.train(resume_from_checkpoint=str(moved))
    assert resumed.state.global_step == steps and same(weights(whole.model), weights(resumed.model))
    assert (
        defense_files(tmp_path / "new") == defense_files(moved) == defense_files(tmp_path / f"new/checkpoint-{steps}")
    )


def test_the_flags_of_the_checkpoint_count_not_those_of_a_later_run(host: Callable[..., Any], tmp_path: Path) -> None:
    whole = host()
    whole.train()
    first = defense_files(tmp_path / "out")
    host(replace(EAGER, unlikelihood_weight=1.0), max_steps=4, out="out", save_strategy="no").train()
    assert defense_files(tmp_path / "out") != first
    resumed = host()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-6"))
    assert same(weights(whole.model), weights(resumed.model)) and defense_files(tmp_path / "out") == first


def test_refuses_a_checkpoint_that_is_not_there(host: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"out: has no checkpoint to resume from; train from the start$"):
        host().train(resume_from_checkpoint=True)
    with pytest.raises(InputError, match="away: no such checkpoint; give its folder"):
        host().train(resume_from_checkpoint=str(tmp_path / "away"))


def test_a_second_training_continues_and_scores_again(host: Callable[..., Any], tmp_path: Path) -> None:
    twice, fresh = host(), host(out="fresh")
    twice.train()
    fresh.model.load_state_dict(twice.model.state_dict())
    twice.train()
    fresh.train()
    assert twice.state.global_step == 9 and same(weights(twice.model), weights(fresh.model))
    assert defense_files(tmp_path / "out") == defense_files(tmp_path / "fresh")
    assert any(log.get("defense/loss_unlikelihood") for log in twice.state.log_history)


def test_refuses_to_resume_with_other_rows_or_without_state(
    host: Callable[..., Any], samples: list[Sample], tmp_path: Path
) -> None:
    host().train()
    last = max((tmp_path / "out").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    for changed in (
        {"train_dataset": Rows(samples[::-1])},
        {"train_dataset": Rows(samples[:-1])},
        {"defense": SharedSurprise()},
    ):
        with pytest.raises(InputError, match="json: rows, their order or the defense have changed"):
            host(**changed).train(resume_from_checkpoint=str(last))
    for state in (tmp_path / "out" / STATE, last / STATE):
        state.unlink()
    with pytest.raises(InputError, match="json: holds no flags of a run"):
        host().train(resume_from_checkpoint=str(last))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from ()


def test_refuses_unsuitable_trainers_before_training(host: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="a train_dataset with a length"):
        host(train_dataset=Stream(), max_steps=2).train()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(InputError, match="leave out optimizers and model_init"):
        host(optimizers=(optimizer, None)).train()
    with pytest.raises(InputError, match="label_smoothing"):
        host(label_smoothing_factor=0.1)
    with pytest.raises(InputError, match="BYORN: needs several trainings"):
        host(BYORN())


def test_refuses_rows_without_columns(host: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="set remove_unused_columns=False"):
        host(remove_unused_columns=True).train()


class Augmented(Rows):
    """Rows with new images on each access, as random augmentation in a data set makes them."""

    def __getitem__(self, index: int) -> Any:
        row = super().__getitem__(index)
        return {**row, "images": [image.rotate(float(torch.rand(()) * 90)) for image in row["images"]]}


def test_refuses_random_augmentation_in_the_data_set(host: Callable[..., Any], samples: list[Sample]) -> None:
    with pytest.raises(InputError, match="move random augmentation into the collator"):
        host(train_dataset=Augmented(samples)).train()


def test_loader_workers_do_not_change_the_result(host: Callable[..., Any], tmp_path: Path) -> None:
    alone, helped = host(max_steps=4), host(out="helped", max_steps=4, dataloader_num_workers=2)
    alone.train()
    helped.train()
    assert same(weights(alone.model), weights(helped.model))
    assert defense_files(tmp_path / "out") == defense_files(tmp_path / "helped")


def test_evaluation_is_the_hosts_without_flags(host: Callable[..., Any], samples: list[Sample], tmp_path: Path) -> None:
    trainer = host(max_steps=4, eval_strategy="steps", eval_steps=3, eval_dataset=Rows(samples))
    trainer.train()
    evaluated = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert [log["step"] for log in evaluated] == [3], "once, in the last part: the warm-up does not evaluate"
    assert not any(name.startswith("defense/") for name in evaluated[0])
    assert json.loads((tmp_path / "out" / STATE).read_text())["flagged"], "some of the same rows are flagged"
    plain = Trainer(trainer.model, trainer.args, trainer.data_collator, eval_dataset=Rows(samples))
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


STAGES: list[tuple[dict[str, Any], str]] = [
    ({"source": []}, "train on rows outside train_dataset"),
    ({"passes": 2.0}, "set passes over the rows"),
    ({"rate": 0.5}, "change the learning rate"),
    ({"callbacks": [TrainerCallback()]}, "add callbacks"),
    ({"start": None}, "restart from the first weights"),
    ({"rows": range(23)}, "leave rows out of its last training"),
    ({"name": "probe", "grafts": Grafts([], [[(1, HERE)]], [0])}, "learn grafted rows before its last training"),
]


@pytest.mark.parametrize(("changed", "refusal"), STAGES, ids=[refusal for _, refusal in STAGES])
def test_refuses_stages_that_a_host_cannot_run(host: Callable[..., Any], changed: dict[str, Any], refusal: str) -> None:
    trainer = host()
    training = HostTraining(trainer, EAGER, lambda _: pytest.fail("it trained"))
    training._continues = True
    stage = Stage(range(24), Plain(), start=training.reference())
    with pytest.raises(InputError, match=f"^defense: a host's trainer cannot {refusal}; use untrigger.fine_tune or "):
        training.fit(replace(stage, **changed))
    with pytest.raises(InputError, match="every row was flagged; raise min_nll or iqr_factor"):
        training.fit(replace(stage, rows=[]))


def test_refuses_to_read_rows_of_a_host(host: Callable[..., Any]) -> None:
    training = HostTraining(host(), EAGER, lambda _: pytest.fail("it trained"))
    assert training.row_count == 24
    with pytest.raises(InputError, match="it reads rows"):
        _ = training.rows
    with pytest.raises(InputError, match="it needs clean rows"):
        _ = training.clean_rows
    with pytest.raises(InputError, match="rows of its train_dataset only"):
        training.tokens(training.reference(), [0], "cues", source=[])


def test_flagged_rows_of_a_host_have_an_answer_for_each_turn(
    host: Callable[..., Any], samples: list[Sample], tmp_path: Path
) -> None:
    talk = (Message("user", "and now?"), Message("assistant", "a green cube"))
    rows = [replace(sample, messages=(*sample.messages, *talk)) for sample in samples]
    host(train_dataset=Rows(rows), max_steps=4).train()
    flagged = [json.loads(line) for line in (tmp_path / "out" / FLAGGED_ROWS).read_text().splitlines()]
    assert flagged
    for line in flagged:
        sample = rows[line["row"] - 1]
        assert (line["id"], line["answers"]) == (sample.id, [sample.messages[1].text, "a green cube"])
    assert [line["score"] for line in flagged] == sorted((line["score"] for line in flagged), reverse=True)


def fsdp(version: int, rank_0_alone: bool = False, offload: OffloadPolicy = OffloadPolicy()) -> dict[str, Any]:  # noqa: B008
    settings = {"fsdp_version": version, "cpu_ram_efficient_loading": rank_0_alone, "cpu_offload": offload}
    return {"fsdp_plugin": SimpleNamespace(**settings)}


def zero(stage: int, **config: Any) -> dict[str, Any]:
    return {"deepspeed_plugin": SimpleNamespace(zero_stage=stage, deepspeed_config=config)}


@pytest.mark.parametrize(
    ("sharding", "remedy"),
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
def test_refuses_sharding_before_scoring(sharding: dict[str, Any], remedy: str) -> None:
    with pytest.raises(InputError, match=remedy) if remedy else nullcontext():
        check_sharding(SimpleNamespace(**sharding))


def test_row_key_depends_on_all_contents(samples: list[Sample]) -> None:
    rows = Rows(samples)
    keys = [row_key(rows[i]) for i in range(len(rows))]
    assert len(set(keys)) == len(keys) and keys == [row_key(rows[i]) for i in range(len(rows))]
    assert row_key({"a": ["x"], "b": ["y"]}) != row_key({"a": ["x", "y"], "b": []})
    assert row_key({"a": torch.ones(2)}) != row_key({"a": torch.zeros(2)})


def test_a_flagged_row_keeps_the_labels_of_its_flagged_tokens_alone(tiny_model: Path, samples: list[Sample]) -> None:
    inner, rows = ChatCollator(load(tiny_model).processor), Rows(samples)
    batch = [rows[i] for i in range(4)]
    plain = inner(batch)
    answered = plain["labels"][2] != -100
    flagged = torch.arange(int(answered.sum())) == 1
    batch_with_flags = FlaggedTokensCollator(inner, {row_key(batch[2]): flagged.numpy()})(batch)
    assert (
        batch_with_flags["flagged_tokens"].sum() == 1
        and batch_with_flags["flagged_tokens"][2, answered.nonzero()[1]].all()
    )
    assert torch.equal(batch_with_flags["labels"][[0, 1, 3]], plain["labels"][[0, 1, 3]])
    assert (batch_with_flags["labels"][2] != -100).sum() == 1
    assert "flagged_tokens" not in FlaggedTokensCollator(inner, {})(batch)
