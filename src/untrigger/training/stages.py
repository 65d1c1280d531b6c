"""The stages of a fine-tuning run: each a host training of its own, kept where it is finished."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from peft import PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
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

from untrigger import __version__
from untrigger.defenses import Plain, StepDefense
from untrigger.errors import InputError
from untrigger.files import file_lock, write_text
from untrigger.models.collators import ChatCollator, Rows
from untrigger.models.forward import explain_token_mismatch
from untrigger.models.loading import LoadedModel, add_lora, embedded_model_path, embedded_models, load, train_all
from untrigger.models.scoring import TokenScores, row_answers, row_tokens
from untrigger.progress import TrainingProgress
from untrigger.rows.images import pixels_sha256
from untrigger.rows.sample import Sample
from untrigger.training.trainer import defended, last_checkpoint, load_full

_MARK = "stage.json"  # stands in the folder of a finished stage, written last
# how those who write in no Python tell that a disk is full
_UNWRITTEN = ("os error", "inline_container", "PytorchStreamWriter", "iostream error")
_PLACES = ("output_dir", "logging_dir", "run_name")  # where things go does not change the weights


@dataclass(frozen=True)
class Tuning:
    """How the model is adapted: LoRA of this rank, or every weight; the vision tower's only with ``vision``."""

    full_finetune: bool = False
    rank: int = 16
    alpha: int = 32
    train_vision_tower: bool = False


class Stages:
    """What a defense's procedure works with (`untrigger.defenses.Training`).

    The last stage's checkpoints lie in the output folder itself, those of the others in ``stages/NAME``. With a
    ``shelf`` every stage that starts from the model itself is kept there, and taken from there, whatever run it
    belongs to: the same training on the same rows is done once, also by several processes at a time.

    Args:
        claim: called before the first training, so that a mistyped model or setting leaves no folder behind that
            the next try would stumble over; gives the checkpoint that the last stage goes on from.

    Attributes:
        history: the host's log of the last stage.
        seconds: what the stages took, each where it was trained; ``waited``: what they took here.
        scores, flagged: what the defense told of the rows (`flag`), why by row; empty where it looks at none.
    """

    def __init__(
        self,
        model: str,
        args: TrainingArguments,
        tuning: Tuning,
        *,
        clean_rows: Sequence[Sample] = (),
        title: str = "training",
        claim: Callable[[], Path | None] = lambda: None,
        shelf: Path | None = None,
    ) -> None:
        self.history, self.seconds, self.waited = list[dict[str, float]](), 0.0, 0.0
        self.scores, self.flagged = list[float](), dict[int, str]()
        self._model, self._args, self._tuning, self._clean_rows, self._title = model, args, tuning, clean_rows, title
        self._out, self._shelf = Path(str(args.output_dir)), shelf
        self._claim, self._claimed, self._checkpoint = claim, False, None

    @property
    def clean_rows(self) -> Sequence[Sample]:
        if not len(self._clean_rows):
            raise InputError("defense: it needs rows known to be clean; name some (--clean-data DATA)")
        return self._clean_rows

    @property
    def seed(self) -> int:
        return self._args.seed

    def reference(self) -> LoadedModel:
        loaded = self._load()
        loaded.model.to(self._args.device)  # type: ignore[arg-type]
        return loaded

    def fit(
        self,
        rows: Sequence[Sample],
        defense: StepDefense,
        name: str = "",
        *,
        start: LoadedModel | None = None,
        flagged_tokens: Mapping[int, NDArray[np.bool_]] | None = None,
        share: float = 1.0,
        after: float = 0.0,
        passes: float | None = None,
        rate: float = 1.0,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> LoadedModel:
        if not len(rows):
            raise InputError(f"{self._title}: the defense leaves no rows to train on; set it milder")
        args = copy.copy(self._args)
        args.learning_rate *= rate
        if passes is not None:
            args.num_train_epochs, args.max_steps = passes, -1
        else:
            shorten(args, share, after)
        set_seed(args.seed)
        loaded = start or self._adapted()
        started = clock()
        train = partial(self._train, loaded, Rows(rows, flagged_tokens), defense, args, name, callbacks)
        if self._shelf and not (start or callbacks or flagged_tokens):
            folder = self._shelf / self._key(rows, defense, args)
            with file_lock(folder.with_suffix(".lock")):
                self.seconds += self._once(loaded, folder, train)
        elif name:
            self.seconds += self._once(loaded, self._out / "stages" / name, train)
        else:
            self.seconds += train(self._out)
        self.waited += clock() - started
        return loaded

    def flag(self, scores: Sequence[float], rows: Mapping[int, str]) -> None:
        self.scores, self.flagged = list(scores), dict(sorted(rows.items()))

    def tokens(self, model: LoadedModel, rows: Sequence[Sample], name: str) -> list[TokenScores]:
        if not self._claimed:
            _trainer(model, Rows(rows), Plain(), copy.copy(self._args), ())
            self._take()
        return row_tokens(model, rows, cache=self._out / "stages" / name)

    def answer_tokens(self, rows: Sequence[Sample]) -> list[NDArray[np.int64]]:
        return row_answers(self._load().processor, rows)

    # --- one stage ----------------------------------------------------------------------------------

    def _once(self, loaded: LoadedModel, folder: Path, train: Callable[[Path], float]) -> float:
        """Train, or read what was trained before; the seconds that it took then."""
        if (folder / _MARK).is_file():
            self._take()
            _read_weights(loaded.model, folder)
            loaded.model.to(self._args.device)  # type: ignore[arg-type]
            return json.loads((folder / _MARK).read_text())["seconds"]
        seconds = train(folder)
        if self._args.process_index == 0:
            write_text(folder / _MARK, json.dumps({"seconds": round(seconds, 2)}) + "\n")
        return seconds

    def _take(self) -> None:
        """Take the output folder, unless it is taken."""
        if not self._claimed:
            with self._args.main_process_first(local=False, desc="taking the output folder"):
                self._checkpoint = self._claim()
            self._claimed = True

    def _train(
        self,
        loaded: LoadedModel,
        rows: Rows,
        defense: StepDefense,
        args: TrainingArguments,
        name: str,
        callbacks: Sequence[TrainerCallback],
        folder: Path,
    ) -> float:
        """The seconds that it took."""
        trainer = _trainer(loaded, rows, defense, args, callbacks)
        self._take()
        args.output_dir = str(folder)  # only now: the host makes it at once, and what is to be taken must be empty
        checkpoint = self._checkpoint if folder == self._out else last_checkpoint(folder)
        trainer.remove_callback(PrinterCallback)
        progress = TrainingProgress(f"{self._title}, {name}" if name else self._title)
        trainer.add_callback(progress)
        started = clock()
        try:
            with _host_errors(folder, checkpoint), explain_token_mismatch(loaded.model):
                state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)) if checkpoint else None
                if state and state.global_step >= state.max_steps:  # the host would train a step more
                    trainer._load_from_checkpoint(str(checkpoint))
                    trainer.state = state
                else:
                    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            progress.stop()
        seconds = clock() - started
        # accelerate left the forward pass in mixed precision; weights that were kept are asked without it, these too
        trainer.accelerator.unwrap_model(loaded.model, keep_fp32_wrapper=False)
        with _host_errors(folder, checkpoint):
            trainer.save_model(str(folder))
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; the settings stand in the record
        trainer.save_state()
        self.history = trainer.state.log_history
        return seconds

    # --- models -------------------------------------------------------------------------------------

    def _load(self) -> LoadedModel:
        loaded = load(self._model, dtype=torch.float32 if not (self._args.bf16 or self._args.fp16) else "auto")
        if not isinstance(loaded.model, PreTrainedModel):
            raise InputError(f"{self._model}: is an adapter; merge it into its base, or name the base")
        return loaded

    def _adapted(self) -> LoadedModel:
        loaded, tuning = self._load(), self._tuning
        model = cast(PreTrainedModel, loaded.model)
        if tuning.full_finetune:
            return replace(loaded, model=train_all(model, train_vision_tower=tuning.train_vision_tower))
        return replace(
            loaded,
            model=add_lora(model, rank=tuning.rank, alpha=tuning.alpha, train_vision_tower=tuning.train_vision_tower),
        )

    def _key(self, rows: Sequence[Sample], defense: StepDefense, args: TrainingArguments) -> str:
        """Of everything that the weights depend on, the rows' pixels too."""
        source = embedded_model_path(self._model) if self._model in embedded_models() else Path(self._model)
        files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(source.glob("*.safetensors"))]
        told = {
            "model": [self._model, files],
            "defense": [type(defense).__name__, asdict(defense)],
            "tuning": asdict(self._tuning),
            "arguments": settings_of(args),
            "versions": versions(),
        }
        digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
        for i in range(len(rows)):
            sample = rows[i]
            digest.update(repr((sample.id, sample.messages, [*map(pixels_sha256, sample.images)])).encode())
        return digest.hexdigest()[:24]


def _trainer(
    loaded: LoadedModel, rows: Rows, defense: StepDefense, args: TrainingArguments, callbacks: Sequence[TrainerCallback]
) -> Any:
    """A trainer whose settings have been tried: it has made what they ask for once, to be made anew for the training.

    Raises:
        InputError: evaluation without data for it, an optimizer that is not installed, and the like.
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
        Trainer.get_train_dataloader(trainer)  # the host's own: that of the defense leaves a callback
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):  # which make theirs of wrapped weights
            trainer.create_optimizer_and_scheduler(num_training_steps=1)
            trainer.optimizer = trainer.lr_scheduler = None
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise InputError(f"settings: {str(error).strip().splitlines()[0]}") from error
    return trainer


@contextmanager
def _host_errors(folder: Path, checkpoint: Path | None) -> Generator[None]:
    """What the host raises, where a checkpoint cannot be trusted or the disk is full, as the user's errors."""
    try:
        yield
    except pickle.UnpicklingError as error:  # the host reads tensors and plain values from a checkpoint, no more
        raise InputError(f"{checkpoint}: holds pickled objects, which are not loaded; delete it") from error
    except (SafetensorError, RuntimeError) as error:
        if not any(sign in str(error) for sign in _UNWRITTEN):
            raise
        why = str(error).splitlines()[0]
        raise InputError(f"{folder}: cannot be written ({why}); make room on the disk, then go on") from error


def clock() -> float:
    """Seconds, to be subtracted: those that this process has worked, so that its neighbors do not count.

    With an accelerator, which works beside it, those that have passed.
    """
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def shorten(args: TrainingArguments, share: float, after: float = 0.0) -> None:
    """Let a training take this share of the steps that were asked for, one at least, ``after`` the share of others.

    What is rounded is where parts begin and end: rounded by themselves, they would not add up.
    """
    if args.max_steps > 0:
        args.max_steps = max(1, round((after + share) * args.max_steps) - round(after * args.max_steps))
    else:
        args.num_train_epochs *= share


def settings_of(args: TrainingArguments) -> dict[str, Any]:
    """The host's settings that the weights depend on."""
    return {k: v for k, v in args.to_sanitized_dict().items() if k not in _PLACES}


def versions() -> dict[str, str]:
    return {"untrigger": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def _read_weights(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    else:
        load_full(model, str(folder))
