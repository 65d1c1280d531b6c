"""``defended(Trainer)``: any transformers Trainer with a defense in its training step.

The mixin touches three things: the collator of the *training* loader, the loss of a *training* step, and the
loading of a full model's checkpoint. Evaluation, logging, saving and distribution stay the host's.
"""

from __future__ import annotations

import json
import zipfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from untrigger.defenses import Defense, Plain, SharedSurprise, StepDefense
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
from untrigger.models.loading import base_model, quiet_loading

if TYPE_CHECKING:
    _Host = Trainer
else:
    _Host = object


class _EpochTold(TrainerCallback):
    """Tells the view collator which epoch it is in, so that each epoch sees other views and a resumed one the same."""

    def __init__(self, collator: SeededCollator) -> None:
        self.collator = collator

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.collator.epoch = int(state.epoch or 0)


class DefendedMixin(_Host):
    """What ``defended`` puts before the host trainer; see there."""

    def __init__(self, *args: Any, defense: Defense | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        chosen = defense or SharedSurprise()
        if not isinstance(chosen, StepDefense | SharedSurprise):
            raise InputError(
                f"defense {type(chosen).__name__}: works in several trainings; use untrigger.fine_tune, or "
                "`untrigger train`"
            )
        self.procedure = chosen if isinstance(chosen, SharedSurprise) else None
        self.defense = Plain() if isinstance(chosen, SharedSurprise) else chosen
        self.flagged_tokens: dict[
            bytes, NDArray[np.bool_]
        ] = {}  # which answer tokens of rows by `row_key` are not believed
        self._sums: dict[str, Tensor] = {}
        check_arguments(chosen, self.args, self.compute_loss_func)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The host's training; of the preset ``default`` both parts of it, and the judgments before them."""
        if self.procedure is None:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        from untrigger.training.host_training import HostTraining  # which needs what is defined here

        host_train = super().train
        return HostTraining(
            self, self.procedure, lambda checkpoint: host_train(checkpoint, *args, **kwargs), resume_from_checkpoint
        ).run()

    # --- data -----------------------------------------------------------------------------------

    def get_train_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        """The host's loader with views of the rows; evaluation keeps the collator as it is."""
        inner = self.data_collator
        collator = self._collator(inner)
        if isinstance(collator, SeededCollator):
            self.add_callback(_EpochTold(collator))
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
        """The defense's loss on a training batch, where it has one; otherwise the host's own."""
        if not self.defense.has_loss or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        step = self.defense.step(model, inputs)
        total = step.total
        if num_items_in_batch is None:  # the host then divides by the accumulated steps itself
            loss = objective.reduce(total, max(1, total.numel()))
        else:
            loss = objective.reduce(total, num_items_in_batch)
            if self.args.average_tokens_across_devices:  # the count is over all processes, gradients are averaged
                loss = loss * self.accelerator.num_processes
        self._note(step)
        return (loss, {"loss": loss}) if return_outputs else loss  # no logits are kept

    # --- diagnostics ----------------------------------------------------------------------------

    @torch.no_grad()
    def _note(self, step: Losses) -> None:
        for name, value in ({f"loss_{name}": value for name, value in step.terms.items()} | step.logged).items():
            entry = torch.stack([value.detach().sum().float(), torch.tensor(float(value.numel()), device=value.device)])
            self._sums[name] = self._sums[name] + entry if name in self._sums else entry

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The host's log with the averages over all processes since the last one."""
        if self._sums and "loss" in logs:
            table = self.accelerator.reduce(torch.stack(list(self._sums.values())), reduction="sum")
            for name, (total, count) in zip(self._sums, cast(Tensor, table).tolist(), strict=True):
                logs[f"defense/{name}"] = round(total / max(count, 1.0), 6)
            self._sums = {}
        super().log(logs, start_time)

    # --- resume ---------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Full models are read through ``from_pretrained``: the host's own loading skips renamed keys silently."""
        target = self._whole(model)
        if target is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[arg-type]
        else:
            load_full(target, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """As `_load_from_checkpoint`: the host leaves the last model in the place of the best, with a warning."""
        target = None if self.is_deepspeed_enabled else self._whole()
        if target is None:
            super()._load_best_model()
        else:
            load_full(target, cast(str, self.state.best_model_checkpoint))

    def _whole(self, model: nn.Module | None = None) -> PreTrainedModel | None:
        """The model whose checkpoints hold all its weights, each under the name that ``from_pretrained`` reads."""
        target = base_model(cast(nn.Module, self.model) if model is None else model)
        partly = isinstance(self.model, PeftModel) or self.is_fsdp_enabled
        return target if isinstance(target, PreTrainedModel) and not partly else None


def check_arguments(defense: Defense, args: TrainingArguments, own_loss: object = None) -> None:
    """Refuse what would take the place of a defense's loss, or keep the logits from it.

    Raises:
        InputError: one line that names the setting.
    """
    if (getattr(args, "loss_type", None) or "nll") != "nll" or args.use_liger_kernel:
        raise InputError(
            "defense: the host's fused loss gives no logits; set loss_type='nll' and use_liger_kernel=False"
        )
    if not (isinstance(defense, SharedSurprise) or (isinstance(defense, StepDefense) and defense.has_loss)):
        return
    if args.label_smoothing_factor or own_loss is not None:
        raise InputError(
            "defense: its loss takes the host's place; leave out label_smoothing_factor and compute_loss_func"
        )
    if args.n_gpu > 1:
        raise InputError("defense: DataParallel would part the pairs; run one process per GPU with torchrun")


def load_full(model: PreTrainedModel, folder: str) -> None:
    """Read a model's weights from a folder, every one of them.

    Raises:
        InputError: some are missing.
    """
    with quiet_loading():
        saved, report = cast(Any, type(model)).from_pretrained(
            folder, dtype=model.dtype, use_safetensors=True, output_loading_info=True
        )
    if report["missing_keys"] or report["mismatched_keys"]:
        raise InputError(f"{folder}: weights are missing; delete the folder to resume from another")
    model.load_state_dict(saved.state_dict(), strict=True)


@cache
def defended(trainer: type[Trainer]) -> type[Any]:
    """The trainer class with a defense: ``defended(SFTTrainer)(model, ...)``, or another ``defense=CrossView()``.

    Without one it is the preset ``default`` (`untrigger.defenses.SharedSurprise`): rows are scored, and the
    training has two parts, all within ``train()``. Flagged rows are listed in ``flagged_rows.jsonl`` of
    the output folder.

    Works with ``transformers.Trainer`` and any subclass that trains on rows of images and messages. With
    ``transformers.Trainer`` itself set ``remove_unused_columns=False``, or the host drops the images.
    """
    return type(f"Defended{trainer.__name__}", (DefendedMixin, trainer), {})


def last_checkpoint(folder: Path) -> Path | None:
    """The newest *complete* checkpoint: the host writes its state file last, and whole shards before it."""
    return next((p for p in reversed(checkpoints(folder)) if _complete(p)), None)


def checkpoints(folder: Path) -> list[Path]:
    """The host's checkpoint folders, complete or not, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if step_of(p) >= 0]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint folder's name; -1 for another name."""
    digits = checkpoint.name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1


def _complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
        for weights in checkpoint.glob("*.safetensors"):
            load_file(weights)
    except (OSError, ValueError, SafetensorError):
        return False
    states = [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]  # torch's files are zip archives, index last
    return all(zipfile.is_zipfile(state) for state in states)
