"""LoRA fine-tuning with the transformers Trainer, defended by one changed line.

    python examples/transformers_trainer.py --data DATA --out OUT [--model MODEL]
    torchrun --nproc_per_node 2 examples/transformers_trainer.py --data DATA --out OUT

DATA is a folder with a data.jsonl of messages and images, as `untrigger data` writes it.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.utils.data import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments, set_seed

from untrigger import defended, embedded_model_path


class Rows(Dataset):
    """Rows of images and messages; the images of a row are opened when the row is read."""

    def __init__(self, folder):
        self.folder = folder
        self.rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        images = [Image.open(self.folder / name).convert("RGB") for name in row["images"]]
        texts = [message["content"].replace("<image>", "").strip() for message in row["messages"]]
        messages = [
            {"role": message["role"], "content": [{"type": "text", "text": text}]}
            for message, text in zip(row["messages"], texts, strict=True)
        ]
        messages[0]["content"][:0] = [{"type": "image"}] * len(images)
        return {"images": images, "messages": messages}


class Collator:
    """Make batches with labels only on the answers."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, rows):
        batch = self.processor.apply_chat_template(
            [self.with_images(row) for row in rows],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True, "padding_side": "right", "add_special_tokens": False},
        )
        batch["labels"] = batch["input_ids"].masked_fill(batch.pop("assistant_masks") == 0, -100)
        return batch

    def with_images(self, row):
        images = iter(row["images"])

        def with_image(part):
            return {"type": "image", "image": next(images)} if part["type"] == "image" else part

        return [message | {"content": [*map(with_image, message["content"])]} for message in row["messages"]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--model", default=embedded_model_path("llava"))
    options = parser.parse_args()

    set_seed(0)
    processor = AutoProcessor.from_pretrained(options.model)
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.float32)
    # the vision tower stays frozen: its last layer gets no gradient, and DDP would stop with an error
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=r".*language_model.*_proj|.*projector\.linear_.")
    args = TrainingArguments(
        options.out,
        use_cpu=not torch.cuda.is_available(),  # otherwise the processes of torchrun on CPUs do not form a group
        num_train_epochs=3,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,  # otherwise the Trainer drops the images before collation
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = defended(Trainer)(  # the one changed line: it was Trainer(
        model=get_peft_model(model, lora),
        args=args,
        train_dataset=Rows(options.data),
        data_collator=Collator(processor),
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
