"""Implausible answers replaced by the model's own, after BYORn (Sabolić et al., ICML 2026, arXiv 2606.02947)."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import ProcessorMixin, TrainerCallback

from untrigger.defenses.base import Defense, Training, part
from untrigger.defenses.plain import Plain
from untrigger.defenses.relabeled import RelabeledRows
from untrigger.errors import InputError
from untrigger.files import write_text
from untrigger.models.loading import LoadedModel
from untrigger.rows.sample import Sample

_AVERAGE, _ANSWERS = "average.safetensors", "answers.json"  # in a checkpoint


@final
@dataclass(frozen=True)
class BYORN(Defense):
    """Rows whose answers the model, before it is fine-tuned, finds least likely are answered anew while it learns.

    The answers are drawn from a running average of the model, in each pass over the rows. docs/paper.md says what
    differs from the paper.

    Fields:
        suspected: share of the rows that is answered anew (paper: 0.4).
        decay: lambda, how much of the average stays in a step (not published; ours).
    """

    suspected: float = 0.4
    decay: float = 0.99

    def __post_init__(self) -> None:
        self._check(0, 1, "suspected", "decay")

    def fine_tune(self, rows: Sequence[Sample], training: Training) -> LoadedModel:
        reference = training.reference()
        processor, loss = reference.processor, [told.loss for told in training.tokens(reference, rows, "scores")]
        del reference  # two models at a time are one too many
        likeliest_first = sorted(range(len(rows)), key=loss.__getitem__)
        suspected = likeliest_first[len(rows) - part(self.suspected, len(rows)) :]
        training.flag(loss, dict.fromkeys(suspected, "unlikely before fine-tuning"))
        bootstrapped = RelabeledRows(rows, suspected)
        callback = _Bootstrap(bootstrapped, processor, self.decay, training.seed)
        return training.fit(bootstrapped, Plain(), callbacks=[callback])


class _Bootstrap(TrainerCallback):
    """Keeps the running average of what is trained, and has it answer at the start of each pass."""

    def __init__(self, rows: RelabeledRows, processor: ProcessorMixin, decay: float, seed: int) -> None:
        self._rows, self._processor, self._decay, self._seed = rows, processor, decay, seed
        self._average: dict[str, Tensor] = {}
        self._midway = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.dataloader_persistent_workers:  # they would go on with the answers of the first pass
            raise InputError("defense byorn: set dataloader_persistent_workers to false; rows change with each pass")
        self._average = {name: value.detach().clone() for name, value in _trained(kwargs["model"]).items()}
        if state.global_step:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            for name, value in load_file(folder / _AVERAGE).items():
                self._average[name].copy_(value)
            told = json.loads((folder / _ANSWERS).read_text(encoding="utf-8"))
            self._rows.answers = {int(row): texts for row, texts in told.items()}
            self._midway = not float(state.epoch).is_integer()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._midway:  # the answers of this pass came with the checkpoint
            self._midway = False
            return
        model = kwargs["model"]
        device = next(model.parameters()).device
        with self._swapped(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(1_000_003 * self._seed + state.global_step)
            self._rows.answer(LoadedModel(model, self._processor, ""))

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, value in _trained(kwargs["model"]).items():
            self._average[name].lerp_(value, 1 - self._decay)
        self._save(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._save(args, state, control)

    def _save(self, args: Any, state: Any, control: Any) -> None:
        """Before the host saves: a checkpoint counts as complete when its last file is there."""
        if control.should_save and state.is_world_process_zero:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            folder.mkdir(parents=True, exist_ok=True)
            save_file(self._average, folder / _AVERAGE)
            write_text(folder / _ANSWERS, json.dumps(self._rows.answers, ensure_ascii=False))

    @contextmanager
    def _swapped(self, model: nn.Module) -> Generator[None]:
        """The model with the average in the place of its weights."""
        weights = {name: value.detach().clone() for name, value in _trained(model).items()}
        _copy(model, self._average)
        try:
            yield
        finally:
            _copy(model, weights)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


@torch.no_grad()
def _copy(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, parameter in _trained(model).items():
        parameter.copy_(values[name])
