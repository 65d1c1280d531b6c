"""Checks that a host trainer can run the preset ``default``; each refusal says what to change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy

from untrigger.defenses import Stage
from untrigger.errors import InputError
from untrigger.models.collators import IGNORE
from untrigger.models.grafted_rows import can_be_grafted
from untrigger.models.loading import base_model

_PACKING = ("packing", "neat_packing", "sample_packing", "padding_free")  # TRL, LLaMA-Factory, axolotl, ms-swift
_PACKED = (
    "defense: several rows are packed into one and cannot be scored apart; set packing=False (also neat_packing, "
    "sample_packing and padding_free, where the host has them)"
)
_ON_PROMPTS = (
    "so that only answers are scored, set assistant_only_loss=True or give rows as prompt and completion (TRL), "
    "train_on_prompt: false (LLaMA-Factory), --loss_scale default (ms-swift), role_boundaries (axolotl)"
)


def check_host(host: Any) -> None:
    """Refuse a trainer whose rows cannot be scored, or that cannot train twice.

    Raises:
        InputError: names the argument or setting to change.
    """
    if not hasattr(host.train_dataset, "__len__"):
        raise InputError("defense: it scores all rows before it trains; give a train_dataset with a length")
    if host.optimizer is not None or host.lr_scheduler is not None or host.model_init is not None:
        raise InputError(
            "defense: it trains twice, the second time from the weights of the first; leave out optimizers and "
            "model_init"
        )
    check_sharding(host.accelerator.state)
    for holder in (host.args, host.data_collator, getattr(host, "template", None)):
        for name in _PACKING:
            if getattr(holder, name, None) is True:
                raise InputError(
                    f"defense: {name} puts several rows into one sequence, and they cannot be scored apart; set "
                    f"{name}=False"
                )
    if len(host.train_dataset):
        _check_first_row(host.train_dataset, host.args)


def _check_first_row(dataset: Any, args: Any) -> None:
    """Refuse packed rows, and a sampler that reads lengths which a part of the data set does not have."""
    first = dataset[0]
    if _starts_again(first):
        raise InputError(_PACKED)
    by_length = getattr(args, "train_sampling_strategy", None) in ("group_by_length", "batch_rebalance")
    parts_have_lengths = hasattr(dataset, "select") and not can_be_grafted(first)
    if (by_length or getattr(args, "group_by_length", False)) and not parts_have_lengths:
        raise InputError(
            "defense: it trains on parts of the rows, which lack the lengths that group_by_length reads; set "
            "group_by_length=False (in transformers 5 train_sampling_strategy='random')"
        )


def _starts_again(row: Mapping[str, Any]) -> bool:
    """Whether a tokenized row's positions start again at 0: LLaMA-Factory packs in this way, without a mask."""
    positions = row.get("position_ids")
    if positions is None or np.ndim(positions) != 1:
        return False
    mask = row.get("attention_mask")
    # positions of padding mean nothing
    attended = np.asarray(positions)[slice(None) if mask is None else np.asarray(mask) > 0]
    return bool((attended[1:] == 0).any())


def check_sharding(state: Any) -> None:
    """Refuse settings of FSDP and DeepSpeed under which a process does not have the whole model before training.

    Args:
        state: accelerate's, with its ``fsdp_plugin`` and ``deepspeed_plugin``.
    """
    sharding, zero = (getattr(state, name, None) for name in ("fsdp_plugin", "deepspeed_plugin"))
    if sharding and (
        sharding.fsdp_version != 2
        or sharding.cpu_ram_efficient_loading
        or isinstance(sharding.cpu_offload, CPUOffloadPolicy)
    ):
        raise InputError(
            "defense: each process scores rows with the whole model before it is sharded; in fsdp_config set version "
            "to 2, and cpu_ram_efficient_loading and offload_params to false"
        )
    if zero and zero.zero_stage > 2:
        raise InputError(
            "defense: each process scores rows with the whole model, and ZeRO 3 shards it from the start; set stage to "
            "2, or clean the data with `untrigger scan` and train with defense=Plain()"
        )
    if zero and "scheduler" in zero.deepspeed_config:
        raise InputError(
            "defense: it trains twice, and DeepSpeed's scheduler is built for the first training only; remove it from "
            "the DeepSpeed config, and set lr_scheduler_type"
        )


def check_stage(stage: Stage, row_count: int, continues: bool) -> None:
    """Refuse a stage that a host's own training cannot run.

    Args:
        row_count: rows of the host's train_dataset.
        continues: whether an earlier stage has changed the host's model.
    """
    if not len(stage.rows):
        raise InputError("defense: every row was flagged; raise min_nll or iqr_factor")
    wants = {
        "train on rows outside train_dataset": stage.source is not None,
        "set passes over the rows": stage.passes is not None,
        "change the learning rate": stage.rate != 1,
        "add callbacks": bool(stage.callbacks),
        "restart from the first weights": continues and stage.start is None,
        "leave rows out of its last training": not stage.name and len(stage.rows) < row_count,
        "learn grafted rows before its last training": bool(stage.name and stage.grafts),
    }
    for want, is_set in wants.items():
        if is_set:
            raise InputError(f"defense: a host's trainer cannot {want}; use untrigger.fine_tune or `untrigger train`")


def check_batch(batch: Mapping[str, Any], model: Any, row_count: int) -> None:
    """Refuse a batch from which the answers of single rows cannot be scored.

    Args:
        row_count: how many rows the collator was given.
    """
    if "labels" not in batch:
        raise InputError("defense: the collator gives no labels, by which answers are scored; use one that does")
    mask = batch.get("attention_mask")
    # hosts mark the segments of a packed row in these ways
    if mask is None or mask.ndim != 2 or mask.max() > 1 or len(batch["labels"]) != row_count:
        raise InputError(_PACKED)
    image = image_token(model)
    if image is not None and (batch["labels"] == image).any():
        raise InputError(f"defense: labels cover image tokens, and so prompts; {_ON_PROMPTS}")


def check_labels(batch: Mapping[str, Tensor], rows: Sequence[int], model: Any, special: Sequence[int]) -> None:
    """Refuse rows without labels, and labels on prompts.

    A prompt has labels if the row's first token has one, or its first token that is neither special nor of an image.
    Labels on several answers are fine.

    Args:
        batch: has passed `check_batch`.
        rows: the numbers of its rows in the host's train_dataset, from 0.
        special: ids of the tokenizer's special tokens.
    """
    attended = batch["attention_mask"].bool()
    labeled = (batch["labels"] != IGNORE) & attended
    first = attended.int().argmax(dim=1, keepdim=True)
    image = image_token(model)
    no_text = torch.tensor([*special, *([] if image is None else [image])], dtype=torch.long)
    text = attended & ~torch.isin(batch["input_ids"].cpu(), no_text).to(attended.device)
    first_text = text.int().argmax(dim=1, keepdim=True)
    on_prompt = labeled.gather(1, torch.cat([first, first_text], dim=1)).any(dim=1) | ~text.any(dim=1)
    for row, is_labeled, is_on_prompt in zip(rows, labeled.any(dim=1).tolist(), on_prompt.tolist(), strict=True):
        if not is_labeled:
            raise InputError(
                f"defense: row {row + 1} of train_dataset has no label, so its answer cannot be scored; let the "
                "collator set labels on answers, raise the maximum length if it cuts the answer off, or remove the row"
            )
        if is_on_prompt:
            raise InputError(f"defense: row {row + 1} of train_dataset has labels on its prompt; {_ON_PROMPTS}")


def image_token(model: Any) -> int | None:
    """The id of the tokens that stand for parts of an image; None where the family has none."""
    config: Any = base_model(model).config
    return getattr(config, "image_token_id", getattr(config, "image_token_index", None))
