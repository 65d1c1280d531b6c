"""``defended(Trainer)``: add a defense to the training step of any transformers Trainer.

The mixin changes three things: the collator of the *training* loader, the loss of a *training* step, and the loading
of a full model's checkpoint. Evaluation, logging, saving and distribution stay the host's.
"""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from untrigger.defenses import Defense, Plain, SharedCause, SharedSurprise, StepDefense
from untrigger.errors import InputError
from untrigger.losses import objective
from untrigger.losses.chunked import Losses
from untrigger.models.collators import (
    AugmentCollator,
    DropCollator,
    FlaggedTokensCollator,
    PairCollator,
    SeededCollator,
)
from untrigger.models.loading import base_model
from untrigger.models.versions import IN_HOST, require_transformers
from untrigger.training.checkpoints import load_full
from untrigger.training.host_state import STATE, copy_flags
from untrigger.training.host_training import HostTraining

if TYPE_CHECKING:
    _Host = Trainer
else:
    _Host = object


class _EpochCallback(TrainerCallback):
    """Tell the collator its epoch, so that each epoch draws new views and a resumed epoch draws the same ones."""

    def __init__(self, collator: SeededCollator) -> None:
        self.collator = collator

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.collator.epoch = int(state.epoch or 0)


class DefendedMixin(_Host):
    """The methods that ``defended`` overrides in a host trainer."""

    def __init__(self, *args: Any, defense: Defense | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        chosen = defense or SharedCause()
        if not chosen.runs_in_host:
            raise InputError(
                f"defense {type(chosen).__name__}: needs several trainings; use untrigger.fine_tune or "
                "`untrigger train`"
            )
        self.procedure = None if isinstance(chosen, StepDefense) else cast(SharedSurprise, chosen)
        self.defense = chosen if isinstance(chosen, StepDefense) else Plain()
        # which answer tokens [n] of flagged rows are flagged, by `row_key`
        self.flagged_tokens: dict[bytes, NDArray[np.bool_]] = {}
        self.schedule = (0.0, 1.0)  # `Stage.schedule` of this training
        self._sums: dict[str, Tensor] = {}
        check_arguments(chosen, self.args, self.compute_loss_func)

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """The host's schedule; for a part of a longer training that part of it."""
        start, end = self.schedule
        scheduler = super().create_scheduler(round(num_training_steps / (end - start)), *args, **kwargs)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # earlier stages made these steps
            for _ in range(round(num_training_steps * start / (end - start))):
                scheduler.step()
        return scheduler

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The host's training; with the preset ``default`` the scoring of rows and both parts of the training."""
        if self.procedure is None:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        host_train = super().train
        return HostTraining(
            self, self.procedure, lambda checkpoint: host_train(checkpoint, *args, **kwargs), resume_from_checkpoint
        ).run()

    # --- data -----------------------------------------------------------------------------------

    def get_train_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        """The host's loader with views of the rows; evaluation keeps the host's collator."""
        inner = self.data_collator
        collator = self._collator(inner)
        if isinstance(collator, SeededCollator):
            self.add_callback(_EpochCallback(collator))
        self.data_collator = collator
        try:
            return super().get_train_dataloader(*args, **kwargs)
        finally:
            self.data_collator = inner

    def _collator(self, inner: Any) -> Any:
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        if self.flagged_tokens:
            return FlaggedTokensCollator(inner, self.flagged_tokens)
        if self.defense.dropped:
            return DropCollator(inner, seed)
        if self.defense.paired is not None:
            return PairCollator(inner, self.defense.paired[0], seed, self.defense.paired[1])
        if self.defense.replaced is not None:
            return AugmentCollator(inner, self.defense.replaced[0], seed, self.defense.replaced[1])
        return inner

    # --- loss -----------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The defense's loss on a training batch if it has one; otherwise the host's own."""
        if not self.defense.has_loss or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        step = self.defense.step(model, inputs)
        total = step.total
        if num_items_in_batch is None:  # the host itself divides by the accumulated steps
            loss = objective.reduce(total, max(1, total.numel()))
        else:
            loss = objective.reduce(total, num_items_in_batch)
            if self.args.average_tokens_across_devices:  # the count is over all processes, gradients are averaged
                loss = loss * self.accelerator.num_processes
        self._add(step)
        return (loss, {"loss": loss}) if return_outputs else loss  # without logits

    # --- diagnostics ----------------------------------------------------------------------------

    @torch.no_grad()
    def _add(self, step: Losses) -> None:
        """Add the step's terms to the sums of the next log."""
        for name, value in ({f"loss_{name}": value for name, value in step.terms.items()} | step.logged).items():
            entry = torch.stack([value.detach().sum().float(), torch.tensor(float(value.numel()), device=value.device)])
            self._sums[name] = self._sums[name] + entry if name in self._sums else entry

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The host's log plus the averages of the terms over all processes since the last log."""
        if self._sums and "loss" in logs:
            table = self.accelerator.reduce(torch.stack(list(self._sums.values())), reduction="sum")
            for name, (total, count) in zip(self._sums, cast(Tensor, table).tolist(), strict=True):
                logs[f"defense/{name}"] = round(total / max(count, 1.0), 6)
            self._sums = {}
        super().log(logs, start_time)

    # --- resume ---------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any, *args: Any, **kwargs: Any) -> None:
        """The host's checkpoint, with the flags that a resumed run needs, also one with another output folder."""
        out = Path(str(self.args.output_dir))
        if self.procedure is not None and self.args.process_index == 0 and (out / STATE).is_file():
            # first: a complete checkpoint has them, whenever the run is killed
            copy_flags(
                out, Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            )
        super()._save_checkpoint(model, trial, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load full models through ``from_pretrained``: the host's own loading skips renamed keys silently."""
        target = self._full_model(model)
        if target is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[arg-type]
        else:
            load_full(target, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """As `_load_from_checkpoint`: the host would keep the last model instead of the best, with a warning."""
        target = None if self.is_deepspeed_enabled else self._full_model()
        if target is None:
            super()._load_best_model()
        else:
            load_full(target, cast(str, self.state.best_model_checkpoint))

    def _full_model(self, model: nn.Module | None = None) -> PreTrainedModel | None:
        """The model, if its checkpoints hold all its weights under the names that ``from_pretrained`` reads."""
        target = base_model(cast(nn.Module, self.model) if model is None else model)
        partial = isinstance(self.model, PeftModel) or self.is_fsdp_enabled
        return target if isinstance(target, PreTrainedModel) and not partial else None


def check_arguments(defense: Defense, args: TrainingArguments, own_loss: object = None) -> None:
    """Refuse settings that replace a defense's loss, or that compute the host's loss without logits.

    Raises:
        InputError: names the setting to change.
    """
    if (getattr(args, "loss_type", None) or "nll") != "nll" or args.use_liger_kernel:
        raise InputError(
            "defense: the host's fused loss computes no logits; set loss_type='nll' and use_liger_kernel=False"
        )
    if not defense.has_loss:
        return
    if args.label_smoothing_factor or own_loss is not None:
        raise InputError(
            "defense: its loss replaces the host's; leave out label_smoothing_factor and compute_loss_func"
        )
    if args.n_gpu > 1:
        raise InputError("defense: DataParallel would split pairs of views; run one process per GPU with torchrun")


def defended(trainer: type[Trainer]) -> type[Any]:
    """The trainer class with a defense: ``defended(SFTTrainer)(model, ...)``; choose one with ``defense=CrossView()``.

    Without ``defense`` it is the preset ``default`` (`untrigger.defenses.SharedCause`): rows are scored and tested,
    and the training has up to three parts, all within ``train()``. Flagged rows are listed in ``flagged_rows.jsonl`` of
    the output folder.

    Works with ``transformers.Trainer`` and any subclass that trains on rows of images and messages. With
    ``transformers.Trainer`` itself set ``remove_unused_columns=False``, or the host drops the images.

    Raises:
        InputError: it is not a class that derives from ``transformers.Trainer``, it is defended already, or
            transformers is too old.
    """
    require_transformers(IN_HOST, "defended")
    check_class(trainer)
    return _subclass(trainer)


def check_class(trainer: object) -> None:
    """Refuse what `defended` cannot subclass.

    Raises:
        InputError: says what was given, and what to give.
    """
    if not isinstance(trainer, type):
        kind = type(trainer).__name__
        mend = (
            f"wrap its class before you make it: defended({kind})(...)"
            if isinstance(trainer, Trainer)
            else ("give a class that derives from transformers.Trainer")
        )
        raise InputError(f"defended: {_short(trainer)} is no class; {mend}")
    if not issubclass(trainer, Trainer):
        raise InputError(
            f"defended: {trainer.__name__} does not derive from transformers.Trainer; give a class that does"
        )
    if issubclass(trainer, DefendedMixin):
        raise InputError(f"defended: {trainer.__name__} is defended already; call defended once")


def _short(value: object) -> str:
    """What a value is, in a few words on one line."""
    name = getattr(value, "__name__", None)
    return f"{type(value).__name__} {name}" if name else f"an object of type {type(value).__name__}"


@cache
def _subclass(trainer: type[Trainer]) -> type[Any]:
    return type(f"Defended{trainer.__name__}", (DefendedMixin, trainer), {})
