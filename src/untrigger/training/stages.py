"""The stages of a fine-tuning run in this project's trainer: each a training of its own, stored once it is finished."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME

from untrigger.defenses import Plain, Stage, StepDefense
from untrigger.errors import InputError
from untrigger.files import file_lock, write_text
from untrigger.memory import give_memory_back
from untrigger.models.collators import ChatCollator, Row, Rows
from untrigger.models.forward import explain_token_mismatch
from untrigger.models.grafted_rows import GraftedRows, Grafts, can_be_grafted, picture
from untrigger.models.loading import LoadedModel, base_model, embedded_model_path, embedded_models, processor_of
from untrigger.models.quantized import is_quantized
from untrigger.models.scoring import BATCH_ROWS, TokenScores, row_answers, row_tokens
from untrigger.models.tower_cache import reuse_tower_outputs, tower_outputs
from untrigger.rows.images import pixels_sha256
from untrigger.rows.sample import Sample, select_rows
from untrigger.training.checkpoints import last_checkpoint
from untrigger.training.hub_push import without_hub
from untrigger.training.memory_callback import MemoryGivenBack
from untrigger.training.processes import share_of
from untrigger.training.progress_callback import TrainingProgress
from untrigger.training.row_scorer import RowScorer
from untrigger.training.run_folder import absolute
from untrigger.training.schedule import clock, shorten
from untrigger.training.settings import NO_DEEPSPEED, settings_of, versions
from untrigger.training.stage_models import load_base, read_weights
from untrigger.training.trainer import defended
from untrigger.training.tuning import Tuning

_MARK = "stage.json"  # in the folder of a finished stage, written last
# how writers outside Python report a full disk
_UNWRITTEN = ("os error", "inline_container", "PytorchStreamWriter", "iostream error")


Elsewhere = Callable[[RowScorer, Sequence[int], Path], list[TokenScores]]
"""Scores the rows with these numbers; a path without suffix for what a resumed run need not compute again."""


class Stages:
    """A run of stages in this project's trainer (a `untrigger.defenses.Training`).

    Checkpoints of the last stage lie in the output folder, those of the others in ``stages/NAME``. With a ``shelf``,
    a folder shared by runs and processes, stages that start from the base model are stored there and reused: the same
    training on the same rows runs once.

    Args:
        rows: to train on, none of them trusted. clean_rows: known to be clean.
        args: the host's. Nothing is pushed to the hub, whatever they say: a stage is not the result.
        title: of the progress meters and of errors.
        claim: called before the first training, so that a mistyped model or setting leaves no output folder behind.
            Returns the checkpoint from which the last stage resumes.
        elsewhere: scores the run's rows on other machines; by default the processes of this run do.

    Attributes:
        history: the host's log of the last stage.
        seconds: time that the stages took where they were trained. ``waited``: time that they took in this run.
        scores: how suspicious each row is. flagged: of the flagged rows, by number from 0, a text that says why. Both
            are empty if the defense scores no rows.

    Raises:
        InputError: the arguments set DeepSpeed, which serves one trainer in a process.
    """

    def __init__(
        self,
        model: str,
        rows: Sequence[Sample],
        args: TrainingArguments,
        tuning: Tuning,
        *,
        clean_rows: Sequence[Sample] = (),
        title: str = "training",
        claim: Callable[[], Path | None] = lambda: None,
        shelf: Path | None = None,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        if args.deepspeed or args.deepspeed_plugin:  # accelerate's launcher sets the second alone
            raise InputError(NO_DEEPSPEED)
        self.rows, self._clean_rows = rows, clean_rows
        self.history, self.seconds, self.waited = list[dict[str, float]](), 0.0, 0.0
        self.scores, self.flagged = list[float](), dict[int, str]()
        self._model, self._args, self._tuning, self._title = model, without_hub(args), tuning, title
        self._out, self._shelf = Path(str(args.output_dir)), shelf
        self._claim, self._claimed, self._checkpoint = claim, False, None
        self._tower_outputs = tower_outputs()
        self._elsewhere = elsewhere
        self._folders = WeakKeyDictionary[nn.Module, Path]()  # of trained models: the stage that they are stored in

    @property
    def row_count(self) -> int:
        return len(self.rows)

    @property
    def clean_rows(self) -> Sequence[Sample]:
        if not len(self._clean_rows):
            raise InputError("defense: it needs rows known to be clean; name some (--clean-data DATA)")
        return self._clean_rows

    @property
    def seed(self) -> int:
        return self._args.seed

    def reference(self) -> LoadedModel:
        return self._to_device(self._load())

    def fit(self, stage: Stage) -> LoadedModel:
        if not len(stage.rows):
            raise InputError(f"{self._title}: the defense leaves no rows to train on; choose milder settings")
        args = copy.copy(self._args)
        args.learning_rate *= stage.rate
        if stage.passes is not None:
            args.num_train_epochs, args.max_steps = stage.passes, -1
        else:
            shorten(args, stage.share, stage.after)
        set_seed(args.seed)
        loaded = stage.start or self._adapted()
        started = clock()
        rows = select_rows(self.rows if stage.source is None else stage.source, stage.rows)
        flagged = {at: stage.flagged_tokens[row] for at, row in enumerate(stage.rows) if row in stage.flagged_tokens}
        dataset: Dataset[Row] = Rows(rows, flagged)
        if stage.grafts:
            dataset = ConcatDataset([dataset, GraftedRows(Rows(self.rows), stage.grafts)])
        train = partial(self._train, loaded, dataset, stage, args)
        give_memory_back()
        if self._shelf and not (stage.start or stage.callbacks or stage.grafts or flagged):
            folder = self._shelf / self._key(rows, stage.defense, args)
            with file_lock(folder.with_suffix(".lock")):
                self.seconds += self._once(loaded, folder, train)
        elif stage.name:
            folder = self._out / "stages" / stage.name
            self.seconds += self._once(loaded, folder, train)
        else:
            folder = self._out
            self.seconds += train(folder)
        give_memory_back()
        self._folders[loaded.model] = folder
        self.waited += clock() - started
        return loaded

    def flag(self, scores: Sequence[float], rows: Mapping[int, str]) -> None:
        self.scores, self.flagged = list(scores), dict(sorted(rows.items()))

    def tokens(
        self, model: LoadedModel, rows: Sequence[int], name: str, source: Sequence[Sample] | None = None
    ) -> list[TokenScores]:
        samples = select_rows(self.rows if source is None else source, rows)
        if not self._claimed:
            self._check_settings(model, samples)
            self._take()
        if self._elsewhere and source is None:
            scorer = self._row_scorer(weights=self._folders.get(model.model))
            return self._elsewhere(scorer, rows, self._out / "stages" / name)
        return self._score(model, Rows(samples), name)

    def can_be_grafted(self, row: int) -> bool:
        return can_be_grafted(Rows(self.rows)[row])

    def picture(self, row: int) -> NDArray[np.uint8] | None:
        return picture(Rows(self.rows)[row])

    def graft_tokens(self, model: LoadedModel, grafts: Grafts, name: str) -> list[TokenScores]:
        return self._score(model, GraftedRows(Rows(self.rows), grafts), name)

    def answer_tokens(self, rows: Sequence[int]) -> list[NDArray[np.int64]]:
        if self._elsewhere:
            scorer = self._row_scorer(answers_only=True)
            return [scores.ids for scores in self._elsewhere(scorer, rows, self._out / "stages" / "answers")]
        share = share_of(self._args, len(rows), BATCH_ROWS)
        own = select_rows(self.rows, [rows[at] for at in share.rows])
        return share.gathered(row_answers(processor_of(self._model), own))

    def _row_scorer(self, weights: Path | None = None, *, answers_only: bool = False) -> RowScorer:
        precision = str(self._precision).removeprefix("torch.")
        return RowScorer(
            absolute(self._model), weights and weights.resolve(), self._tuning, precision, answers_only=answers_only
        )

    def _score(self, model: LoadedModel, rows: Dataset[Row], name: str) -> list[TokenScores]:
        """Score the rows; each process scores its share of them, in the batches of one process."""
        share = share_of(self._args, len(cast(Any, rows)), BATCH_ROWS)
        folder = self._out / "stages" / name
        if share.processes > 1:
            rows, folder = Subset(rows, share.rows), folder / f"{share.index}-of-{share.processes}"
        with reuse_tower_outputs(model.model, self._tower_outputs):
            return share.gathered(row_tokens(model, rows, BATCH_ROWS, cache=folder))

    # --- one stage ----------------------------------------------------------------------------------

    def _once(self, loaded: LoadedModel, folder: Path, train: Callable[[Path], float]) -> float:
        """Train, or load the finished stage from its folder; returns the seconds that its training took."""
        if (folder / _MARK).is_file():
            self._take()
            read_weights(loaded.model, folder)
            self._to_device(loaded)
            return json.loads((folder / _MARK).read_text())["seconds"]
        seconds = train(folder)
        if self._args.process_index == 0:
            write_text(folder / _MARK, json.dumps({"seconds": round(seconds, 2)}) + "\n")
        return seconds

    def _take(self) -> None:
        """Claim the output folder, unless this run has done so."""
        if not self._claimed:
            with self._args.main_process_first(local=False, desc="claiming the output folder"):
                self._checkpoint = self._claim()
            self._claimed = True

    def _train(
        self, loaded: LoadedModel, rows: Dataset[Row], stage: Stage, args: TrainingArguments, folder: Path
    ) -> float:
        """Train in ``folder``; returns the seconds that it took."""
        trainer = _trainer(loaded, rows, stage.defense, args, stage.callbacks)
        trainer.schedule = stage.schedule
        self._take()
        args.output_dir = str(folder)  # only now: the host creates it at once, and a claimed folder must be empty
        checkpoint = self._checkpoint if folder == self._out else last_checkpoint(folder)
        trainer.remove_callback(PrinterCallback)
        progress = TrainingProgress(f"{self._title}, {stage.name}" if stage.name else self._title)
        trainer.add_callback(progress)
        trainer.add_callback(MemoryGivenBack())
        # a sharded tower must run in all processes at once, and a compiled one has no place for stored outputs
        is_apart = trainer.is_fsdp_enabled or args.torch_compile
        reuse = nullcontext() if is_apart else reuse_tower_outputs(loaded.model, self._tower_outputs)
        started = clock()
        try:
            with _host_errors(folder, checkpoint), explain_token_mismatch(loaded.model), reuse:
                state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)) if checkpoint else None
                if state and state.global_step >= state.max_steps:  # the host would train one step more
                    trainer._load_from_checkpoint(str(checkpoint))
                    trainer.state = state
                else:
                    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            progress.stop()
        seconds = clock() - started
        # accelerate leaves the forward pass in mixed precision; a stage loaded from disk is scored without it
        trainer.accelerator.unwrap_model(loaded.model, keep_fp32_wrapper=False)
        with _host_errors(folder, checkpoint):
            trainer.save_model(str(folder))
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; the run's record holds the settings
        trainer.save_state()
        self.history = trainer.state.log_history
        return seconds

    # --- models -------------------------------------------------------------------------------------

    def _load(self) -> LoadedModel:
        return load_base(self._model, self._tuning, self._precision, self._args.device)

    @property
    def _precision(self) -> torch.dtype:
        return torch.bfloat16 if self._args.bf16 else torch.float16 if self._args.fp16 else torch.float32

    def _to_device(self, loaded: LoadedModel) -> LoadedModel:
        if not is_quantized(base_model(loaded.model)):
            loaded.model.to(self._args.device)  # type: ignore[arg-type]
        return loaded

    def _check_settings(self, reference: LoadedModel, rows: Sequence[Sample]) -> None:
        """Let the host refuse settings before rows are scored; a quantized model is trained only with an adapter."""
        model, args = cast(PreTrainedModel, reference.model), copy.copy(self._args)
        if not is_quantized(model):
            _trainer(reference, Rows(rows), Plain(), args, ())
            return
        adapted = self._tuning.adapt(model)
        _trainer(replace(reference, model=adapted), Rows(rows), Plain(), args, ())
        if isinstance(adapted, PeftModel):
            cast(Any, adapted).unload()

    def _adapted(self) -> LoadedModel:
        loaded = self._load()
        return replace(loaded, model=self._tuning.adapt(cast(PreTrainedModel, loaded.model)))

    def _key(self, rows: Sequence[Sample], defense: StepDefense, args: TrainingArguments) -> str:
        """A digest of everything that the weights depend on, the rows' pixels included."""
        source = embedded_model_path(self._model) if self._model in embedded_models() else Path(self._model)
        files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(source.glob("*.safetensors"))]
        parts = {
            "model": [self._model, files],
            "defense": [type(defense).__name__, asdict(defense)],
            "tuning": asdict(self._tuning),
            "arguments": settings_of(args),
            "versions": versions(),
        }
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
        for i in range(len(rows)):
            sample = rows[i]
            digest.update(repr((sample.id, sample.messages, [*map(pixels_sha256, sample.images)])).encode())
        return digest.hexdigest()[:24]


def _trainer(
    loaded: LoadedModel,
    rows: Dataset[Row],
    defense: StepDefense,
    args: TrainingArguments,
    callbacks: Sequence[TrainerCallback],
) -> Any:
    """A trainer whose settings are checked: it builds loader and optimizer once, and again when it trains.

    Raises:
        InputError: the host refuses a setting (evaluation without data, an optimizer that is not installed).
    """
    try:
        trainer = defended(Trainer)(
            model=loaded.model,
            args=args,
            train_dataset=rows,
            data_collator=ChatCollator(loaded.processor),
            defense=defense,
            callbacks=list(callbacks),
        )
        Trainer.get_train_dataloader(trainer)  # the host's own loader: the defense's adds a callback
        if not trainer.is_fsdp_enabled:  # it builds it from wrapped weights
            trainer.create_optimizer_and_scheduler(num_training_steps=1)
            trainer.optimizer = trainer.lr_scheduler = None
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise InputError(f"settings: {str(error).strip().splitlines()[0]}") from error
    return trainer


@contextmanager
def _host_errors(folder: Path, checkpoint: Path | None) -> Generator[None]:
    """Turn the host's errors about an unsafe checkpoint or a full disk into InputErrors."""
    try:
        yield
    except pickle.UnpicklingError as error:  # the host loads tensors and plain values only
        raise InputError(f"{checkpoint}: holds pickled objects, which are not loaded; delete it") from error
    except (SafetensorError, RuntimeError) as error:
        if not any(sign in str(error) for sign in _UNWRITTEN):
            raise
        why = str(error).splitlines()[0]
        raise InputError(f"{folder}: cannot be written ({why}); free disk space, then resume") from error
