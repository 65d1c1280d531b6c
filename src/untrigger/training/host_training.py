"""The preset ``default`` inside a host's own ``train()``: its rows judged, and its training in two parts."""

from __future__ import annotations

import copy
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import DefaultFlowCallback, PreTrainedModel, ProgressCallback, TrainerCallback, set_seed
from transformers.trainer_utils import TrainOutput

from untrigger.defenses import Plain, SharedSurprise, StepDefense
from untrigger.defenses.shared_surprise import UnlikelihoodStep
from untrigger.errors import InputError
from untrigger.files import write_text
from untrigger.models.collators import Collate, Row, row_key
from untrigger.models.forward import evaluating
from untrigger.models.loading import LoadedModel, base_model
from untrigger.models.scoring import TokenScores, batch_answers, batch_tokens
from untrigger.progress import tracked
from untrigger.rows.sample import Sample
from untrigger.training.stages import shorten

JUDGED = "distrusted.json"  # in the host's output folder: what is not believed, for people and for a resumed run
_SILENT = {"save_strategy": "no", "eval_strategy": "no", "eval_on_start": False, "load_best_model_at_end": False}
_log = logging.getLogger(__name__)


class HostTraining:
    """What `SharedSurprise` works with in a host (`untrigger.defenses.Training`); its rows are their numbers.

    Args:
        host: a trainer of `untrigger.training.trainer.defended`.
        train: the host's own training of it, given the checkpoint to go on from.
        checkpoint: the host's ``resume_from_checkpoint``.

    Raises:
        InputError: the host is set up in a way in which rows cannot be judged.
    """

    def __init__(
        self, host: Any, doubt: SharedSurprise, train: Callable[[Any], TrainOutput], checkpoint: Any = None
    ) -> None:
        if not hasattr(host.train_dataset, "__len__"):
            raise InputError("defense: it looks at all rows before it trains; give a train_dataset with a length")
        if host.optimizer is not None or host.lr_scheduler is not None or host.model_init is not None:
            raise InputError(
                "defense: it trains twice, the second time from what was learned; leave out optimizers and model_init"
            )
        _check_parting(host.accelerator.state)
        processor = host.processing_class or getattr(host.data_collator, "processor", None)
        if processor is None:
            raise InputError("defense: it tells which words it does not believe; give processing_class=processor")
        self.host, self.doubt, self.seed, self._processor = host, doubt, int(host.args.seed), processor
        self._train, self._checkpoint = train, checkpoint
        self._keys: dict[int, bytes] = {}  # of each row that was looked at
        self._why: dict[int, dict[str, Any]] = {}
        self._file = Path(host.args.output_dir, JUDGED)

    def run(self) -> TrainOutput:
        """The whole training; from a checkpoint on it believes what it believed before."""
        numbers = cast(Sequence[Sample], range(len(self.host.train_dataset)))
        if self._checkpoint:
            self._rest(self._read())
        else:
            if self.host.is_fsdp_enabled or self.host.is_deepspeed_enabled:
                self.host.model.to(self.host.args.device)  # the host leaves that to them, who come later
            self.doubt.fine_tune(numbers, self)
        return self._output

    # --- what the procedure asks for --------------------------------------------------------------------

    @property
    def clean_rows(self) -> Sequence[Sample]:
        raise InputError("defense: in a host's trainer there are no trusted rows")

    def reference(self) -> LoadedModel:
        return LoadedModel(self.host.model, self._processor, "")

    def tokens(self, model: LoadedModel, rows: Sequence[Sample], name: str) -> list[TokenScores]:
        """Of rows by their numbers; each process asks about its part."""
        numbers, args = cast(Sequence[int], rows), self.host.args
        parts: list[list[tuple[bytes, TokenScores]]] = [[] for _ in range(args.world_size)]
        mine = parts[args.process_index]
        # as many for each, some rows twice: sharded weights are gathered by all for each batch
        each = -(-len(numbers) // args.world_size)
        shares = [numbers[at % len(numbers)] for at in range(each * args.world_size)]
        loader = self._loader(shares[args.process_index :: args.world_size])
        with evaluating(cast(PreTrainedModel, model.model)) as asked:
            for keys, batch in tracked(loader, f"judging, {name}", len(loader)):
                _check(batch, asked)
                mine += zip(keys, batch_tokens(asked, batch), strict=True)
        _part_again(model.model)
        if args.world_size > 1:
            dist.all_gather_object(parts, mine)
        told = [parts[at % args.world_size][at // args.world_size] for at in range(len(numbers))]
        self._keys |= {number: key for number, (key, _) in zip(numbers, told, strict=True)}
        return [tokens for _, tokens in told]

    def answer_tokens(self, rows: Sequence[Sample]) -> list[NDArray[np.int64]]:
        loader = self._loader(cast(Sequence[int], rows))
        batches = tracked(loader, "reading answers", len(loader))
        return [ids for _, batch in batches for ids in batch_answers(batch)]

    def flag(self, scores: Sequence[float], rows: Mapping[int, str]) -> None:
        self._why = {row: {"row": row + 1, "score": round(scores[row], 4), "why": why} for row, why in rows.items()}

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
            raise InputError("defense: it leaves no rows to train on; set it milder")
        if name:
            self._early(cast(Sequence[int], rows), share)
        else:
            self._rest(self._told(flagged_tokens or {}))
        return self.reference()

    # --- the two parts of the training ------------------------------------------------------------------

    def _early(self, rows: Sequence[int], share: float) -> None:
        """It leaves no trace but in the weights: not saved, not evaluated, not reported."""
        host, handler = self.host, self.host.callback_handler
        kept = host.args, host.train_dataset, handler.callbacks
        host.args = copy.copy(host.args)
        for field, value in _SILENT.items():
            setattr(host.args, field, type(getattr(host.args, field))(value))
        shorten(host.args, share)
        data = host.train_dataset  # some hosts ask it for its columns
        host.train_dataset = data.select(rows) if hasattr(data, "select") else Subset(data, rows)
        handler.callbacks = [
            each for each in handler.callbacks if isinstance(each, DefaultFlowCallback | ProgressCallback)
        ]
        set_seed(self.seed)
        try:
            self._train(None)
        finally:
            host.args, host.train_dataset, handler.callbacks = kept
            self._forget()
        if host.is_deepspeed_enabled:  # an engine serves one training
            host.model_wrapped.destroy()
            host.model_wrapped = host.model

    def _rest(self, told: Sequence[Mapping[str, Any]]) -> None:
        host = self.host
        host.defense = UnlikelihoodStep(self.doubt.unlikelihood_weight) if told else Plain()
        host.flagged_tokens = {bytes.fromhex(row["key"]): np.array(row["flagged_tokens"], bool) for row in told}
        kept, host.args = host.args, copy.copy(host.args)
        shorten(host.args, 1 - self.doubt.warmup_share, self.doubt.warmup_share)
        set_seed(self.seed)
        try:
            self._output = self._train(self._checkpoint)
        finally:
            host.args = kept
            self._forget()

    def _forget(self) -> None:
        """The next training, also that of a second ``train()``, has its own optimizer, and believes all until told."""
        self.host.optimizer = self.host.lr_scheduler = None
        self.host.defense, self.host.flagged_tokens = Plain(), {}

    # --- what is doubted, on disk -----------------------------------------------------------------------

    def _told(self, flagged_tokens: Mapping[int, NDArray[np.bool_]]) -> list[dict[str, Any]]:
        """The most suspicious first."""
        again, answers = list[bytes](), list[str]()
        for keys, batch in self._loader([*flagged_tokens]):
            again += keys
            answers += [self._processor.decode(ids, skip_special_tokens=True).strip() for ids in batch_answers(batch)]
        told = [
            self._why[row]
            | {"answer": answer, "key": self._keys[row].hex(), "flagged_tokens": mark.astype(int).tolist()}
            for (row, mark), answer in zip(flagged_tokens.items(), answers, strict=True)
        ]
        if again != [self._keys[row] for row in flagged_tokens]:
            raise InputError(
                "defense: a row is another each time that it is asked for, and would not be known again in training; "
                "draw what is random in the collator"
            )
        told.sort(key=lambda row: row["score"], reverse=True)
        if self.host.args.process_index == 0:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._file, json.dumps({**self._record(), "distrusted": told}) + "\n")
            most = Counter((row["why"], row["answer"]) for row in told).most_common(1)
            said = ", most often for {!r} in {!r}".format(*most[0][0]) if most else ""
            _log.warning("%d of %d rows are not believed%s: %s", len(told), self._record()["rows"], said, self._file)
        return told

    def _read(self) -> list[dict[str, Any]]:
        try:
            kept = json.loads(self._file.read_text())
            told = kept.pop("distrusted")
            keys, rows = [row["key"] for row in told], [int(row["row"]) - 1 for row in told]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self._file}: holds no judgment to go on with; train from the start") from error
        same = kept == self._record() and all(row < kept["rows"] for row in rows)
        if not same or self._keys_again(rows) != keys:
            raise InputError(f"{self._file}: rows or defense are others now; go on with the same, or from the start")
        return told

    def _record(self) -> dict[str, Any]:
        return {"rows": len(self.host.train_dataset), "defense": asdict(self.doubt)}

    # --- rows -------------------------------------------------------------------------------------------

    def _keys_again(self, rows: Sequence[int]) -> list[str]:
        return [key.hex() for keys, _ in self._loader(rows) for key in keys]

    def _loader(self, numbers: Sequence[int]) -> DataLoader[Any]:
        """Batches with the keys of their rows, which go through what the host does to rows."""
        host = self.host
        return DataLoader(
            cast(Dataset[Any], Subset(host.train_dataset, numbers)),
            batch_size=host.args.per_device_eval_batch_size,
            collate_fn=host._get_collator_with_removed_columns(_Keyed(host.data_collator)),
            num_workers=host.args.dataloader_num_workers,
        )


class _Keyed:
    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, rows: list[Row]) -> tuple[list[bytes], dict[str, Tensor]]:
        if not all(rows):
            raise InputError("defense: the host takes all columns from the rows; set remove_unused_columns=False")
        keys = [row_key(row) for row in rows]  # first: some host collators write into the rows
        return keys, self.collate([dict(row) for row in rows])


def _check_parting(state: Any) -> None:
    """FSDP and DeepSpeed, which part weights or what belongs to them among the processes, must leave room for this."""
    sharding, zero = (getattr(state, name, None) for name in ("fsdp_plugin", "deepspeed_plugin"))
    if sharding and (
        sharding.fsdp_version != 2
        or sharding.cpu_ram_efficient_loading
        or isinstance(sharding.cpu_offload, CPUOffloadPolicy)
    ):
        raise InputError(
            "defense: each process asks the whole model before that is sharded; in fsdp_config set version to 2, and "
            "cpu_ram_efficient_loading and offload_params to false"
        )
    if zero and zero.zero_stage > 2:
        raise InputError(
            "defense: each process asks the whole model, which ZeRO 3 never leaves whole; set stage to 2, or clean the "
            "data with `untrigger scan` and train with defense=Plain()"
        )
    if zero and "scheduler" in zero.deepspeed_config:
        raise InputError(
            "defense: it trains twice, and DeepSpeed's scheduler would be set for the first time only; leave it out of "
            "the DeepSpeed config, and set lr_scheduler_type"
        )


def _part_again(model: nn.Module) -> None:
    """FSDP leaves the outermost weights whole after a forward pass without a backward one.

    A new optimizer would hold these in the place of the shards, and train them in vain.
    """
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _check(batch: Mapping[str, Any], model: Any) -> None:
    if "labels" not in batch:
        raise InputError("defense: the collator gives no labels; rows are judged by their answers")
    mask = batch.get("attention_mask")
    if mask is None or mask.ndim != 2 or mask.max() > 1:  # segments of one long row, in the ways of several hosts
        raise InputError("defense: several rows are packed into one, and could not be judged apart; set packing=False")
    config: Any = base_model(model).config
    image = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    if image is not None and (batch["labels"] == image).any():
        raise InputError(
            "defense: labels stand on the images, and so on the prompts; set assistant_only_loss=True (or give rows "
            "as prompt and completion), so that answers alone are judged"
        )
