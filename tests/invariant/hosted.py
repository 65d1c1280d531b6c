"""Run alone and by `torchrun`: the preset `default`, and so `words`, in a host trainer.

    hosted.py MODEL DATA OUT BATCH [fsdp|zero2]

Writes the host's files and the adapter into OUT.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import Trainer, set_seed

from untrigger import defended, read
from untrigger.defenses import SharedCause, harm, shared_cause
from untrigger.models.collators import ChatCollator, Rows
from untrigger.models.loading import add_lora, load
from untrigger.training.host_training import HostTraining
from untrigger.training.settings import arguments


def take_cpus_for_gpus() -> None:
    """accelerate shards a model over accelerators only; over CPU processes it runs DDP with the same settings."""
    init = PartialState.__init__

    def init_as_gpu(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init_as_gpu  # type: ignore[method-assign]


def sharding_settings(sharding: str) -> dict[str, Any]:
    """The host's settings for this sharding."""
    if sharding == "fsdp":
        take_cpus_for_gpus()
        return {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    if sharding == "zero2":
        auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
        zero = {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
        return {"deepspeed": zero | dict.fromkeys(auto, "auto")}
    return {}


def main(model: str, data: str, out: str, batch: str, sharding: str = "") -> None:
    sgd = {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "warmup_steps": 0}
    args = arguments(
        Path(out),
        max_steps=8,
        per_device_train_batch_size=int(batch),
        gradient_accumulation_steps=2,
        remove_unused_columns=False,
        save_strategy="no",
        logging_steps=1,
        per_device_eval_batch_size=1,
        use_cpu=True,
        **sgd,
        **sharding_settings(sharding),
    )
    set_seed(0)
    loaded = load(model, dtype=torch.float32)
    defense = SharedCause(
        warmup_share=0.25,
        min_nll=0.1,
        iqr_factor=0.0,
        p_value=1 - 1e-6,
        min_ratio=1e9,  # no word is shared, so all that surprises is tested
        unlikelihood_weight=3.0,
        min_suspects=2,
    )
    harm.Harm.above = lambda self, *_: self  # nobody has poisoned these rows
    shared_cause.COMPARISONS = 4
    trainer = defended(Trainer)(
        add_lora(loaded.model),  # type: ignore[arg-type]
        args=args,
        train_dataset=Rows(read(Path(data))),
        data_collator=ChatCollator(loaded.processor),
        defense=defense,
    )
    trainer.train()
    assert (sharding == "fsdp") == any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    assert (sharding == "zero2") == (type(trainer.model_wrapped).__name__ == "DeepSpeedEngine")
    training = HostTraining(trainer, defense, trainer.train)
    all_rows, uneven = (training.tokens(training.reference(), range(n), "part") for n in (4, 3))
    assert [t.ids.tolist() for t in uneven] == [t.ids.tolist() for t in all_rows[:3]]
    for one, other in zip(uneven, all_rows, strict=False):
        np.testing.assert_allclose(one.nll, other.nll, rtol=1e-4, atol=1e-5)
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main(*sys.argv[1:])
