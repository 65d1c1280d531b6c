"""LoRA fine-tuning with TRL's SFTTrainer, defended by one changed line.

    python examples/trl_sft.py --data DATA --out OUT [--model MODEL]
    torchrun --nproc_per_node 2 examples/trl_sft.py --data DATA --out OUT

DATA is a folder with a data.jsonl of messages and images, as `untrigger data` writes it.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset, Image, List
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

from untrigger import defended, embedded_model_path


def rows(folder):
    """Rows of images and messages; TRL itself puts image placeholders into the prompt."""
    for line in (folder / "data.jsonl").read_text().splitlines():
        row = json.loads(line)
        for turn in row["messages"]:
            turn["content"] = turn["content"].replace("<image>", "").strip()
        yield {"images": [str(folder / name) for name in row["images"]], "messages": row["messages"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--model", default=embedded_model_path("llava"))
    options = parser.parse_args()

    args = SFTConfig(
        options.out,
        loss_type="nll",  # the loss that the defense replaces
        assistant_only_loss=True,  # otherwise image and prompt tokens are trained on too
        max_length=None,  # otherwise image tokens may be cut off
        num_train_epochs=3,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),  # otherwise the processes of torchrun on CPUs do not form a group
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = defended(SFTTrainer)(  # the one changed line: it was SFTTrainer(
        AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list([*rows(options.data)]).cast_column("images", List(Image(mode="RGB"))),
        processing_class=AutoProcessor.from_pretrained(options.model),
        # the vision tower stays frozen: its last layer gets no gradient, and DDP would stop with an error
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=r".*language_model.*_proj|.*projector\.linear_."),
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
