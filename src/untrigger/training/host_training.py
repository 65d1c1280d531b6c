"""The presets ``default`` and ``words`` inside a host's own ``train()``: score the rows, then train in parts."""

from __future__ import annotations

import copy
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from transformers import DefaultFlowCallback, PreTrainedModel, ProgressCallback, TrainingArguments, set_seed
from transformers.trainer_utils import TrainOutput

from untrigger.defenses import Plain, SharedSurprise, Stage
from untrigger.errors import InputError
from untrigger.files import write_text
from untrigger.models.collators import Collate, Row, row_key
from untrigger.models.forward import evaluating
from untrigger.models.grafted_rows import Graft, GraftedRows, Grafts, can_be_grafted, picture
from untrigger.models.loading import LoadedModel
from untrigger.models.processors import special_tokens
from untrigger.models.scoring import TokenScores, batch_answers, batch_tokens
from untrigger.progress import tracked
from untrigger.rows.sample import Sample
from untrigger.training.flagged_rows import FlaggedRow, write_flagged_rows
from untrigger.training.host_checks import (
    check_batch,
    check_host,
    check_labels,
    check_stage,
    image_token,
)
from untrigger.training.host_rows import column_prompts, decoded_turns, image_names, is_reordered, own_row, row_id
from untrigger.training.host_state import STATE, copy_flags, flags_folder
from untrigger.training.processes import share_of
from untrigger.training.schedule import shorten

_SILENT = {
    "save_strategy": "no",
    "eval_strategy": "no",
    "eval_on_start": False,
    "load_best_model_at_end": False,
    "push_to_hub": False,
}
_RANDOM_ROWS = (
    "defense: train_dataset returns different data for the same index; move random augmentation into the collator, and "
    "with ms-swift, which replaces a row that it cannot read by a random one, mend such rows (--strict true names them)"
)
_log = logging.getLogger(__name__)


class HostTraining:
    """Run a `SharedSurprise` in a host trainer (a `untrigger.defenses.Training`).

    Row numbers are those of the host's ``train_dataset``.

    Args:
        host: a trainer of class `untrigger.training.trainer.defended`.
        train: the host's own training, given the checkpoint to resume from.
        checkpoint: the host's ``resume_from_checkpoint``.

    Raises:
        InputError: the host's settings do not allow to score rows.
    """

    def __init__(
        self, host: Any, defense: SharedSurprise, train: Callable[[Any], TrainOutput], checkpoint: Any = None
    ) -> None:
        check_host(host)
        processor = host.processing_class or getattr(host.data_collator, "processor", None)
        if processor is None:
            raise InputError("defense: it writes flagged tokens as text; give processing_class=processor")
        self.host, self.defense, self.seed, self._processor = host, defense, int(host.args.seed), processor
        self._train, self._checkpoint = train, checkpoint
        self._special = special_tokens(processor)
        self._folder = Path(host.args.output_dir)
        self._keys: dict[int, bytes] = {}  # `row_key` of each scored row
        self._scores: Sequence[float] = ()
        self._texts: Mapping[int, str] = {}
        self._continues = False

    def run(self) -> TrainOutput:
        """The whole training; from a checkpoint on, the last stage with the flags that are stored in it."""
        if self._checkpoint:
            self._fit_last(self._read_state())
        else:
            if self.host.is_fsdp_enabled or self.host.is_deepspeed_enabled:
                self.host.model.to(self.host.args.device)  # the host leaves this to their set-up, which comes later
            self.defense.fine_tune(self)
        return self._output

    # --- a defense's view of the training ----------------------------------------------------------------

    @property
    def row_count(self) -> int:
        return len(self.host.train_dataset)

    @property
    def rows(self) -> NoReturn:
        raise InputError(
            "defense: it reads rows, and a host's trainer has them in a form of its own; use untrigger.fine_tune or "
            "`untrigger train`"
        )

    @property
    def clean_rows(self) -> NoReturn:
        raise InputError("defense: it needs clean rows, and a host's trainer takes none; use untrigger.fine_tune")

    def reference(self) -> LoadedModel:
        return LoadedModel(self.host.model, self._processor, "")

    def tokens(
        self, model: LoadedModel, rows: Sequence[int], name: str, source: Sequence[Sample] | None = None
    ) -> list[TokenScores]:
        if source is not None:
            raise InputError("defense: a host's trainer scores rows of its train_dataset only; use `untrigger scan`")
        scores = self._score(model, self.host.train_dataset, rows, name)
        if any(self._keys.setdefault(row, key) != key for row, (key, _) in zip(rows, scores, strict=True)):
            raise InputError(_RANDOM_ROWS)
        return [tokens for _, tokens in scores]

    def can_be_grafted(self, row: int) -> bool:
        return can_be_grafted(self.host.train_dataset[row])

    def picture(self, row: int) -> NDArray[np.uint8] | None:
        return picture(self.host.train_dataset[row])

    def graft_tokens(self, model: LoadedModel, grafts: Grafts, name: str) -> list[TokenScores]:
        rows = GraftedRows(self.host.train_dataset, grafts)
        return [tokens for _, tokens in self._score(model, rows, range(len(rows)), name)]

    def _score(
        self, model: LoadedModel, dataset: Any, rows: Sequence[int], name: str
    ) -> list[tuple[bytes, TokenScores]]:
        """The key and the scores of each row; each process scores its share of the rows."""
        args = self.host.args
        share = share_of(args, len(rows), args.per_device_eval_batch_size)
        numbers, own = [rows[at] for at in share.rows], list[tuple[bytes, TokenScores]]()
        loader = self._loader(numbers, dataset)
        with evaluating(cast(PreTrainedModel, model.model)) as scoring:
            for loaded in tracked(loader, f"scoring, {name}", len(loader)):
                check_batch(loaded.batch, scoring, len(loaded.keys))
                if dataset is self.host.train_dataset:  # grafted rows have the labels of rows checked before
                    of_batch = numbers[len(own) : len(own) + len(loaded.keys)]
                    check_labels(loaded.batch, of_batch, scoring, self._special)
                own += zip(loaded.keys, batch_tokens(scoring, loaded.batch), strict=True)
        _reshard(model.model)
        return share.gathered(own)

    def answer_tokens(self, rows: Sequence[int]) -> list[NDArray[np.int64]]:
        loader = self._loader(rows)
        batches = tracked(loader, "reading answers", len(loader))
        return [ids for loaded in batches for ids in batch_answers(loaded.batch)]

    def flag(self, scores: Sequence[float], rows: Mapping[int, str]) -> None:
        self._scores, self._texts = scores, rows

    def fit(self, stage: Stage) -> LoadedModel:
        check_stage(stage, self.row_count, self._continues)
        if stage.name:
            self._fit_silently(stage)
        else:
            self._write_flags(stage)
            self._fit_last(stage)
        self._continues = True
        return self.reference()

    # --- the parts of the training -----------------------------------------------------------------------

    def _fit_silently(self, stage: Stage) -> None:
        """An intermediate stage, which leaves weights only: no checkpoint, evaluation or report."""
        host, handler = self.host, self.host.callback_handler
        dataset, callbacks, args = host.train_dataset, handler.callbacks, copy.copy(host.args)
        for name, value in _SILENT.items():
            setattr(args, name, type(getattr(args, name))(value))
        # some hosts read the columns of the data set, which a Subset lacks
        host.train_dataset = dataset.select(stage.rows) if hasattr(dataset, "select") else Subset(dataset, stage.rows)
        handler.callbacks = [
            callback for callback in callbacks if isinstance(callback, DefaultFlowCallback | ProgressCallback)
        ]
        try:
            self._run(stage, args, None)
        finally:
            host.train_dataset, handler.callbacks = dataset, callbacks
        if host.is_deepspeed_enabled:  # an engine serves one training
            host.model_wrapped.destroy()
            host.model_wrapped = host.model

    def _fit_last(self, stage: Stage) -> None:
        host, dataset = self.host, self.host.train_dataset
        if stage.grafts:
            host.train_dataset = ConcatDataset([dataset, GraftedRows(dataset, stage.grafts)])
        try:
            self._output = self._run(stage, copy.copy(host.args), self._checkpoint)
        finally:
            host.train_dataset = dataset

    def _run(self, stage: Stage, args: TrainingArguments, checkpoint: Any) -> TrainOutput:
        host, own_args = self.host, self.host.args
        host.defense, host.schedule = stage.defense, stage.schedule
        host.flagged_tokens = {self._keys[row]: flagged for row, flagged in stage.flagged_tokens.items()}
        shorten(args, stage.share, stage.after)
        host.args = args
        set_seed(self.seed)
        try:
            return self._train(checkpoint)
        finally:
            host.args = own_args
            # the next training, also that of a second ``train()``, builds its own optimizer and flags nothing yet
            host.optimizer = host.lr_scheduler = None
            host.defense, host.schedule, host.flagged_tokens = Plain(), (0.0, 1.0), {}

    # --- flags on disk -----------------------------------------------------------------------------------

    def _write_flags(self, last: Stage) -> None:
        """Write ``flagged_rows.jsonl`` for people, and the state of the last stage for a resumed run."""
        flagged_tokens, keys, flagged = last.flagged_tokens, list[bytes](), list[FlaggedRow]()
        numbers, reordered = iter(flagged_tokens), is_reordered(self.host)
        for loaded in self._loader([*flagged_tokens]):
            keys += loaded.keys
            parts = (loaded.batch[name] for name in ("input_ids", "labels", "attention_mask"))
            flagged += [self._flagged_row(next(numbers), reordered, *tokens) for tokens in zip(*parts, strict=True)]
        if keys != [self._keys[row] for row in flagged_tokens]:
            raise InputError(_RANDOM_ROWS)
        if self.host.args.process_index == 0:
            path = write_flagged_rows(self._folder, flagged)
            rows = [
                {"row": row + 1, "key": self._keys[row].hex(), "flagged_tokens": mask.astype(int).tolist()}
                for row, mask in flagged_tokens.items()
            ]
            state = {**self._identity(), "after": last.after, "flagged": rows, "grafts": last.grafts}
            write_text(self._folder / STATE, json.dumps(state) + "\n")
            flagged.sort(key=lambda row: row.score, reverse=True)
            frequent = Counter((row.flagged_text, " ".join(row.answers)) for row in flagged).most_common(1)
            example = ", most often {!r} in {!r}".format(*frequent[0][0]) if frequent else ""
            hint = "; the host reorders rows, so find them by id, images and prompts" if flagged and reordered else ""
            _log.warning("%d of %d rows are flagged%s: %s%s", len(flagged), self.row_count, example, path, hint)

    def _flagged_row(self, number: int, reordered: bool, ids: Tensor, labels: Tensor, attended: Tensor) -> FlaggedRow:
        row = own_row(self.host.train_dataset, number)  # with the columns that the host removes before it collates
        prompts, answers = decoded_turns(self._processor.decode, ids, labels, attended, image_token(self.host.model))
        return FlaggedRow(
            row=number + 1,
            reordered=reordered,
            id=row_id(row),
            images=image_names(row),
            prompts=column_prompts(row) or prompts,
            score=self._scores[number],
            flagged_text=self._texts[number],
            answers=answers,
        )

    def _read_state(self) -> Stage:
        """The last stage, as the run that is resumed has stored it."""
        folder = flags_folder(self._checkpoint, self._folder)
        path = folder / STATE
        try:
            state = json.loads(path.read_text())
            flagged = state.pop("flagged")
            keys, rows = [bytes.fromhex(row["key"]) for row in flagged], [int(row["row"]) - 1 for row in flagged]
            masks = [np.array(row["flagged_tokens"], bool) for row in flagged]
            after, grafts = float(state.pop("after")), _read_grafts(state.pop("grafts"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: holds no flags of a run to resume; train from the start") from error
        used = {*rows, *(grafts.used if grafts else ())}
        same = state == self._identity() and all(row < self.row_count for row in used)
        if not same or [key for loaded in self._loader(rows) for key in loaded.keys] != keys:
            raise InputError(
                f"{path}: rows, their order or the defense have changed; resume with the same ones (axolotl shuffles "
                "anew in each run unless seed is set), or train from the start"
            )
        if self.host.args.process_index == 0 and folder != self._folder:
            copy_flags(folder, self._folder)
        self._keys = dict(zip(rows, keys, strict=True))
        last = self.defense.last_stage(self.row_count, self.reference(), dict(zip(rows, masks, strict=True)), after)
        return replace(last, grafts=grafts)

    def _identity(self) -> dict[str, Any]:
        return {"rows": self.row_count, "defense": asdict(self.defense)}

    # --- rows --------------------------------------------------------------------------------------------

    def _loader(self, rows: Sequence[int], dataset: Any = None) -> DataLoader[_KeyedBatch]:
        """Batches of rows by number, with the rows' keys; the host prepares rows and batches as in training.

        ``dataset``: that of the numbers, by default the host's.
        """
        host = self.host
        return DataLoader(
            cast(Dataset[Any], Subset(host.train_dataset if dataset is None else dataset, rows)),
            batch_size=host.args.per_device_eval_batch_size,
            collate_fn=host._get_collator_with_removed_columns(_KeyedCollator(host.data_collator)),
            num_workers=host.args.dataloader_num_workers,
        )


class _KeyedBatch(NamedTuple):
    """A batch, and the `row_key` of each of its rows."""

    keys: list[bytes]
    batch: dict[str, Tensor]


class _KeyedCollator:
    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, rows: list[Row]) -> _KeyedBatch:
        if not all(rows):
            raise InputError("defense: the host removes all columns from the rows; set remove_unused_columns=False")
        keys = [row_key(row) for row in rows]  # first: some host collators write into the rows
        return _KeyedBatch(keys, self.collate([dict(row) for row in rows]))


def _reshard(model: nn.Module) -> None:
    """Shard the outermost weights again, which FSDP leaves whole after a forward pass without a backward pass.

    A new optimizer would hold the whole weights instead of the shards, and its steps would have no effect.
    """
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _read_grafts(stored: list[Any] | None) -> Grafts | None:
    """Grafts as they come from JSON, where they have lost their names."""
    return Grafts([Graft(*graft) for graft in stored[0]], *stored[1:]) if stored else None
