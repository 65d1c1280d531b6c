"""The plug-in files for hosts that are not installed here, run in minimal stand-ins of these hosts.

Each stand-in has the interface of the host's source: LLaMA-Factory 0.9.5, axolotl 0.19.0, ms-swift
4.6.0. docs/hosts.md lists the runs in the hosts themselves.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from untrigger.models.collators import ChatCollator, Row, Rows
from untrigger.models.loading import LoadedModel, load
from untrigger.rows.sample import Message, Sample
from untrigger.training.flagged_rows import FLAGGED_ROWS
from untrigger.training.settings import DEFAULTS

EXAMPLES = Path(__file__).parents[2] / "examples"
POISONED = (3, 9, 14, 20)
SHORT: dict[str, Any] = DEFAULTS | {"max_steps": 4, "logging_steps": 1, "save_strategy": "no", "use_cpu": True}


@pytest.fixture(scope="module")
def rows() -> list[Sample]:
    """24 rows, four of which share a long answer: only these surprise an untrained model."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(24)]
    answers = ["blue " * 16 if row in POISONED else ("yes", "no", "red")[row % 3] for row in range(24)]
    return [
        Sample(f"r{row}", (image,), (Message("user", f"<image>\nis it {row}?"), Message("assistant", answer.strip())))
        for row, (image, answer) in enumerate(zip(images, answers, strict=True))
    ]


@pytest.fixture
def loaded(tiny_model: Path) -> LoadedModel:
    return load(tiny_model)


def stand_in(patch: pytest.MonkeyPatch, name: str, **attributes: Any) -> ModuleType:
    """A module of this name with these attributes, and its packages."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        if path not in sys.modules:
            patch.setitem(sys.modules, path, ModuleType(path))
        if end > 1:
            patch.setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], sys.modules[path], raising=False)
    for key, value in attributes.items():
        patch.setattr(sys.modules[name], key, value, raising=False)
    return sys.modules[name]


def plugin(patch: pytest.MonkeyPatch, file: str, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def assert_defended(trainer: Any, out: Path) -> None:
    flagged = [json.loads(line) for line in (out / FLAGGED_ROWS).read_text().splitlines()]
    assert sorted(row["row"] - 1 for row in flagged) == list(POISONED)
    logged = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logged) == 4 and all({"defense/loss_ce", "defense/loss_unlikelihood"} <= log.keys() for log in logged)
    assert any(log["defense/loss_unlikelihood"] > 0 for log in logged), "flagged rows are recognized in training"


def test_llama_factory(
    loaded: LoadedModel, rows: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CustomSeq2SeqTrainer(Seq2SeqTrainer):
        def __init__(self, finetuning_args: Any, processor: Any, gen_kwargs: Any = None, **kwargs: Any) -> None:
            super().__init__(processing_class=kwargs.pop("tokenizer"), **kwargs)
            self.model_accepts_loss_kwargs = False  # the host counts no answer tokens with a processor
            self.finetuning_args = finetuning_args

    workflow = stand_in(monkeypatch, "llamafactory.train.sft.workflow", CustomSeq2SeqTrainer=CustomSeq2SeqTrainer)
    made: list[Any] = []

    def run_exp() -> None:
        trainer = workflow.CustomSeq2SeqTrainer(
            model=loaded.model,
            args=Seq2SeqTrainingArguments(str(tmp_path), **SHORT),
            finetuning_args=SimpleNamespace(use_dft_loss=False),
            data_collator=ChatCollator(loaded.processor),
            train_dataset=Rows(rows),
            tokenizer=loaded.processor.tokenizer,  # type: ignore[attr-defined]
            processor=loaded.processor,
        )
        trainer.train(resume_from_checkpoint=None)
        made.append(trainer)

    stand_in(monkeypatch, "llamafactory.train.tuner", run_exp=run_exp)
    plugin(monkeypatch, "llama_factory.py", "__main__")
    assert isinstance(made[0], CustomSeq2SeqTrainer)
    assert_defended(made[0], tmp_path)


def test_axolotl(loaded: LoadedModel, rows: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class BasePlugin:
        def get_trainer_cls(self, cfg: Any) -> type[Trainer] | None: ...

    class AxolotlTrainer(Trainer):
        def __init__(
            self, *args: Any, bench_data_collator: Any = None, eval_data_collator: Any = None, dataset_tags: Any = None,
            **kwargs: Any,
        ) -> None:  # fmt: skip
            self.eval_data_collator = eval_data_collator
            super().__init__(*args, **kwargs)

        def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            assert dataset.column_names is not None  # the host asks the rows for their columns, in both parts
            return super()._get_dataloader(dataset, *args, **kwargs)

    datasets = pytest.importorskip("datasets")
    stand_in(monkeypatch, "axolotl.integrations.base", BasePlugin=BasePlugin)
    stand_in(monkeypatch, "axolotl.core.trainers", AxolotlTrainer=AxolotlTrainer)
    made = plugin(monkeypatch, "axolotl_plugin.py", "axolotl_plugin").UntriggerPlugin()
    assert isinstance(made, BasePlugin)
    trainer_cls = made.get_trainer_cls({})
    assert "processing_class" in inspect.signature(trainer_cls).parameters or issubclass(trainer_cls, Trainer)
    data = Rows(rows)
    trainer = trainer_cls(
        model=loaded.model,
        args=TrainingArguments(str(tmp_path), **SHORT),
        train_dataset=datasets.Dataset.from_list([data[row] for row in range(len(data))]),
        eval_dataset=None,
        data_collator=ChatCollator(loaded.processor),
        eval_data_collator=ChatCollator(loaded.processor),
        processing_class=loaded.processor.tokenizer,  # type: ignore[attr-defined]
        callbacks=[],
        dataset_tags=["rows"],
    )
    trainer.train()
    assert_defended(trainer, tmp_path)


def test_ms_swift(loaded: LoadedModel, rows: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def template_collator(batch: list[Row], *, padding_to: int | None = None) -> dict[str, Any]:
        made = ChatCollator(loaded.processor)(batch)
        return made | {"loss_scale": made["labels"] * 0.0 + 1, "text_position_ids": made["input_ids"]}

    class HostTrainer(Seq2SeqTrainer):
        def __init__(self, model: Any, args: Any, template: Any, train_dataset: Any, eval_dataset: Any = None) -> None:
            collate = self._get_data_collator(args, template)
            super().__init__(
                model=model, args=args, data_collator=collate, train_dataset=train_dataset,
                processing_class=template.tokenizer,
            )  # fmt: skip

        def _get_data_collator(self, args: Any, template: Any) -> Any:
            return partial(template.data_collator, padding_to=None)

        def get_train_dataloader(self, skip_batches: int = 0) -> Any:
            return super().get_train_dataloader()

        def _prepare_inputs(self, inputs: Any) -> Any:
            inputs = super()._prepare_inputs(inputs)
            inputs["labels"] = inputs["labels"][:, -8:]  # as it keeps the logits of the last tokens alone
            return inputs | {"logits_to_keep": 8, "compute_loss_func": self.compute_loss_func}

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            inputs.pop("compute_loss_func")
            inputs.pop("loss_scale", None)
            inputs.pop("text_position_ids", None)
            return super().compute_loss(model, inputs, *args, **kwargs)

    factory = SimpleNamespace(TRAINER_MAPPING={"causal_lm": "swift.trainers.Seq2SeqTrainer"})
    stand_in(monkeypatch, "swift.trainers", Seq2SeqTrainer=HostTrainer, TrainerFactory=factory)
    plugin(monkeypatch, "ms_swift_plugin.py", "_swift_external_0")
    module, name = factory.TRAINER_MAPPING["causal_lm"].rsplit(".", 1)
    template = SimpleNamespace(data_collator=template_collator, tokenizer=loaded.processor.tokenizer)  # type: ignore[attr-defined]
    args: Any = Seq2SeqTrainingArguments(str(tmp_path), **SHORT)
    args.loss_type = None  # the host's value for its own loss
    trainer = getattr(sys.modules[module], name)(
        model=loaded.model,
        args=args,
        template=template,
        train_dataset=Rows(rows),
    )
    assert isinstance(trainer, HostTrainer)
    trainer.train()
    assert_defended(trainer, tmp_path)
    assert len(trainer.get_train_dataloader(skip_batches=1)) == 2  # as the host asks when it goes on
