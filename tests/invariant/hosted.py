"""Run by itself and by `torchrun`: the preset `default` in the host's own trainer.

    hosted.py MODEL DATA OUT BATCH

Leaves what the host leaves in OUT, and the adapter.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import Trainer, set_seed

from untrigger import defended, read
from untrigger.collate import ChatCollator, Rows
from untrigger.defenses import Doubt
from untrigger.finetune import arguments
from untrigger.models import add_lora, load


def main(model: str, data: str, out: str, batch: str) -> None:
    sgd = {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "warmup_steps": 0}
    args = arguments(
        Path(out),
        max_steps=8,
        per_device_train_batch_size=int(batch),
        gradient_accumulation_steps=2,
        remove_unused_columns=False,
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        **sgd,
    )
    set_seed(0)
    loaded = load(model, dtype=torch.float32)
    defense = Doubt(early=0.25, floor=0.1, reach=0.0, chance=1 - 1e-6, weight=3.0)
    trainer = defended(Trainer)(
        add_lora(loaded.model),  # type: ignore[arg-type]
        args=args,
        train_dataset=Rows(read(Path(data))),
        data_collator=ChatCollator(loaded.processor),
        defense=defense,
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main(*sys.argv[1:])
