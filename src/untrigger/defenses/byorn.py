"""Replace unlikely answers by the model's own, after BYORn (Sabolić et al., ICML 2026, arXiv 2606.02947)."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import ProcessorMixin, TrainerCallback

from untrigger.defenses.base import Defense, Stage, Training, part
from untrigger.defenses.plain import Plain
from untrigger.defenses.relabeled import RelabeledRows
from untrigger.errors import InputError
from untrigger.files import write_text
from untrigger.models.loading import LoadedModel

_AVERAGE, _ANSWERS = "average.safetensors", "answers.json"  # in a checkpoint


@final
@dataclass(frozen=True)
class BYORN(Defense):
    """Relabel the rows whose answers are least likely before fine-tuning, with answers of the model being trained.

    In each pass over the rows the answers are sampled from a running average of the model. docs/paper.md lists the
    differences from the paper.

    Fields:
        suspected: share of the rows that is relabeled (paper: 0.4).
        decay: lambda, share of the average that stays in each step (not published; ours).
    """

    suspected: float = 0.4
    decay: float = 0.99

    def __post_init__(self) -> None:
        self._check(0, 1, "suspected", "decay")

    def fine_tune(self, training: Training) -> LoadedModel:
        rows = range(training.row_count)
        reference = training.reference()
        processor, loss = reference.processor, [scores.loss for scores in training.tokens(reference, rows, "scores")]
        del reference  # frees its memory before the next model is loaded
        likeliest_first = sorted(rows, key=loss.__getitem__)
        suspected = likeliest_first[len(rows) - part(self.suspected, len(rows)) :]
        training.flag(loss, dict.fromkeys(suspected, "unlikely before fine-tuning"))
        relabeled = RelabeledRows(training.rows, suspected)
        callback = _Bootstrap(relabeled, processor, self.decay, training.seed)
        return training.fit(Stage(rows, Plain(), source=relabeled, callbacks=[callback]))


class _Bootstrap(TrainerCallback):
    """Update the running average of the trained weights, and relabel the rows with it at the start of each pass."""

    def __init__(self, rows: RelabeledRows, processor: ProcessorMixin, decay: float, seed: int) -> None:
        self._rows, self._processor, self._decay, self._seed = rows, processor, decay, seed
        self._average: dict[str, Tensor] = {}
        self._midway = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.dataloader_persistent_workers:  # workers would keep the answers of the first pass
            raise InputError("defense byorn: rows change with each pass; set dataloader_persistent_workers to false")
        self._average = {name: value.detach().clone() for name, value in _trained(kwargs["model"]).items()}
        if state.global_step:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            for name, value in load_file(folder / _AVERAGE).items():
                self._average[name].copy_(value)
            stored = json.loads((folder / _ANSWERS).read_text(encoding="utf-8"))
            self._rows.answers = {int(row): texts for row, texts in stored.items()}
            self._midway = not float(state.epoch).is_integer()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._midway:  # the checkpoint holds the answers of this pass
            self._midway = False
            return
        model = kwargs["model"]
        device = next(model.parameters()).device
        with self._swapped(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(1_000_003 * self._seed + state.global_step)
            self._rows.relabel(LoadedModel(model, self._processor, ""))

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, value in _trained(kwargs["model"]).items():
            self._average[name].lerp_(value, 1 - self._decay)
        self._save(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._save(args, state, control)

    def _save(self, args: Any, state: Any, control: Any) -> None:
        """Write before the host does: a checkpoint counts as complete once the host's last file is there."""
        if control.should_save and state.is_world_process_zero:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            folder.mkdir(parents=True, exist_ok=True)
            save_file(self._average, folder / _AVERAGE)
            write_text(folder / _ANSWERS, json.dumps(self._rows.answers, ensure_ascii=False))

    @contextmanager
    def _swapped(self, model: nn.Module) -> Generator[None]:
        """Replace the model's weights by the average while the block runs."""
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
