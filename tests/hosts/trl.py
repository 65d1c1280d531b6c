"""TRL: ``trl sft`` against ``examples/trl_cli.py`` with the same configuration, and against ``examples/trl_sft.py``."""

import json
import sys

from host import REPOSITORY, UNTRIGGER, host

PACKAGES = ("trl==1.16.0", "torch==2.13.0", "bitsandbytes==0.50.2")
# `trl sft` loads a folder of Parquet files by its name; TRL puts the image tags into the prompts itself
PREPARE = """
import json
from pathlib import Path
from datasets import Dataset, Image, List
rows = [json.loads(line) for line in Path("poisoned/data/data.jsonl").read_text().splitlines()]
for row in rows:
    row["images"] = [f"poisoned/data/{name}" for name in row["images"]]
    for turn in row["messages"]:
        turn["content"] = turn["content"].replace("<image>", "").strip()
Path("for-trl").mkdir()
Dataset.from_list(rows).cast_column("images", List(Image())).to_parquet("for-trl/train.parquet")
"""
SETTINGS = {  # as in examples/trl_sft.py, but six epochs: after three, plain training does not spell the answer
    "dataset_name": "./for-trl",
    "loss_type": "nll",
    "assistant_only_loss": True,
    "max_length": None,
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_target_modules": r".*language_model.*_proj|.*projector\.linear_.",
    "dtype": "float32",
    "num_train_epochs": 6,
    "per_device_train_batch_size": 8,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}
# settings under which rows cannot be judged, and words of the refusal
REFUSED = {
    "labels-on-prompts": ("cover image tokens, and so prompts", {"assistant_only_loss": False}),
    "streaming": ("give a train_dataset with a length", {"dataset_streaming": True, "max_steps": 60}),
    "group-by-length": ("set group_by_length=False", {"train_sampling_strategy": "group_by_length"}),
    # in the host's words
    "packing": ("Packing is not supported for vision datasets", {"packing": True, "max_length": 2048}),
    "padding-free": ("not supported for vision datasets", {"padding_free": True}),
}
# settings that flag the poisoned rows and no other; gradient checkpointing is on by default
WORKS = {
    "dora": {"use_dora": True},
    "all-weights": {"use_peft": False, "learning_rate": 3e-4},
    "4-bit": {"load_in_4bit": True},
    "checkpoints": {"save_strategy": "steps", "save_steps": 30},
    "resume": {"resume_from_checkpoint": "checkpoints/checkpoint-30"},
}

if __name__ == "__main__":
    trl = host("trl")
    trl.install([*PACKAGES, *UNTRIGGER])
    trl.make_rows(320)
    trl.python("for-trl", PREPARE)
    examples = REPOSITORY / "examples"
    commands = {"plain": ("trl", "sft"), "by-command": ("python", str(examples / "trl_cli.py"))}

    def configured(name: str, **added: object) -> tuple[str, str]:
        settings = {**SETTINGS, "model_name_or_path": trl.embedded_model(), "output_dir": name, **added}
        trl.write(f"{name}.yaml", json.dumps(settings))  # JSON is YAML
        return "--config", f"{name}.yaml"

    for name, command in commands.items():
        trl.run(name, *command, *configured(name))
    trl.run("by-script", "python", str(examples / "trl_sft.py"), "--data", "poisoned/data", "--out", "by-script")
    held = [trl.verdict("plain", name) for name in ("by-command", "by-script")]
    refused = [
        trl.refuses(name, words, *commands["by-command"], *configured(name, **added))
        for name, (words, added) in REFUSED.items()
    ]
    works = [
        trl.works(name, *commands["by-command"], *configured(name, num_train_epochs=3, **added))
        for name, added in WORKS.items()
    ]
    halves = configured("two-processes", num_train_epochs=3, per_device_train_batch_size=4)
    works += [trl.works("two-processes", "torchrun", "--nproc_per_node", "2", commands["by-command"][1], *halves)]
    sys.exit(0 if all([*held, *refused, *works]) else 1)
