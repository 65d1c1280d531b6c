"""Checks that a host trainer can run the preset ``default``; each refusal says what to change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.distributed.fsdp import CPUOffloadPolicy

from untrigger.defenses import Stage
from untrigger.errors import InputError
from untrigger.models.loading import base_model


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


def check_batch(batch: Mapping[str, Any], model: Any) -> None:
    """Refuse a batch from which the answers of single rows cannot be scored."""
    if "labels" not in batch:
        raise InputError("defense: the collator gives no labels, by which answers are scored; use one that does")
    mask = batch.get("attention_mask")
    if mask is None or mask.ndim != 2 or mask.max() > 1:  # hosts mark the segments of a packed row in these ways
        raise InputError("defense: several rows are packed into one and cannot be scored apart; set packing=False")
    config: Any = base_model(model).config
    image = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    if image is not None and (batch["labels"] == image).any():
        raise InputError(
            "defense: labels cover image tokens, and so prompts; set assistant_only_loss=True (or give rows as prompt "
            "and completion), so that only answers are scored"
        )
