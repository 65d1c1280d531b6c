"""axolotl: the same YAML file with and without ``plugins: [axolotl_plugin.UntriggerPlugin]``."""

import json
import sys

from host import REPOSITORY, UNTRIGGER, host

PACKAGES = (
    "torch==2.13.0 packaging==26.0 huggingface_hub==1.17.0 peft==0.20.0 tokenizers==0.23.1 transformers==5.16.1 "
    "accelerate==1.13.0 datasets==4.8.4 trl==1.9.0 kernels<0.17.0,>=0.16.0 pydantic==2.12.5 addict fire PyYAML==6.0.3 "
    "requests wandb einops colorama numba<1.0,>=0.63.1 numpy scipy typer==0.25.1 tensorboard python-dotenv==1.0.1 "
    "fastcore posthog==6.7.11 schedulefree==1.4.1 bitsandbytes==0.50.2 triton>=3.4.0 sentencepiece zstandard==0.22.0 "
    "s3fs evaluate langdetect immutabledict==4.2.0 art mistral-common==1.11.5 axolotl-contribs-lgpl==0.0.7 "
    "axolotl-contribs-mit==0.0.6 easy-vqa jinja2 pyarrow rich scikit-learn filelock pillow"
)
# axolotl 0.19.0 takes its own settings for a pydantic model, because they have every attribute
MEND = """
import pathlib, sysconfig
path = pathlib.Path(sysconfig.get_path("purelib"), "axolotl", "processing_strategies.py")
text = path.read_text().replace('if hasattr(spec, "model_dump"):', 'if hasattr(type(spec), "model_dump"):')
path.write_text(text)
"""
# images as parts of the messages, where axolotl looks for them
PREPARE = """
import json
from pathlib import Path
lines = []
for line in Path("poisoned/data/data.jsonl").read_text().splitlines():
    row = json.loads(line)
    row["images"] = [f"poisoned/data/{name}" for name in row["images"]]
    for turn in row["messages"]:
        text = turn["content"].replace("<image>", "").strip()
        image = [{"type": "image"}] if "<image>" in turn["content"] else []
        turn["content"] = [*image, {"type": "text", "text": text}]
    lines.append(json.dumps(row))
Path("rows.jsonl").write_text("\\n".join(lines) + "\\n")
"""
SETTINGS = {
    "processor_type": "AutoProcessor",
    "skip_prepare_dataset": True,
    "remove_unused_columns": False,
    "sample_packing": False,
    "chat_template": "tokenizer_default",
    # no user's turn: its end would take the start of the assistant's, and no row would have a label
    "role_boundaries": [{"role": "assistant", "start": " ASSISTANT:", "end": "eos_token"}],
    "datasets": [{"path": "rows.jsonl", "ds_type": "json", "type": "chat_template"}],
    "val_set_size": 0,
    "adapter": "lora",
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "lora_target_modules": r".*language_model.*_proj|.*projector\.linear_.",
    "lora_mlp_kernel": False,
    "lora_qkv_kernel": False,
    "lora_o_kernel": False,
    "attn_implementation": "eager",
    "sequence_len": 2048,
    "num_epochs": 12,  # after six, plain training knows the answer but does not spell it
    "micro_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "optimizer": "adamw_torch",
    "learning_rate": 3e-3,
    "lr_scheduler": "cosine",
    "bf16": False,
    "fp16": False,
    "tf32": False,
    "logging_steps": 10,
    "save_strategy": "no",
}
# settings under which rows cannot be judged, and words of the refusal
REFUSED = {
    "no-boundaries": ("has labels on its prompt", {"role_boundaries": []}),
    "group-by-length": ("set group_by_length=False", {"group_by_length": True}),
    "streaming": ("give a train_dataset with a length", {"streaming": True, "max_steps": 60}),
    # in the host's words: it packs rows that it has tokenized, and rows with images it tokenizes in the collator
    "packing": ("Column 'input_ids' doesn't exist", {"sample_packing": True}),
    "padding-free": ("requires a varlen-capable attention backend", {"batch_flattening": True}),  # on a CPU
}
# settings that flag the poisoned rows and no other; several processes want an accelerator each in this host
WORKS = {
    "dora": {"peft_use_dora": True},
    "all-weights": {"adapter": None, "learning_rate": 1e-3},
    "4-bit": {"adapter": "qlora", "load_in_4bit": True},
    "gradient-checkpointing": {"gradient_checkpointing": True},
    # without a seed the host shuffles the rows anew in each run, and to resume is refused
    "checkpoints": {"save_strategy": "steps", "save_steps": 30, "seed": 42},
    "resume": {"resume_from_checkpoint": "checkpoints/checkpoint-30", "seed": 42},
}

if __name__ == "__main__":
    axolotl = host("axolotl")
    axolotl.install(PACKAGES.split(), ["axolotl==0.19.0", *UNTRIGGER])
    axolotl.python("mend", MEND)
    axolotl.make_rows(160)
    axolotl.python("prepare", PREPARE)
    paths = {"PYTHONPATH": str(REPOSITORY / "examples"), "AXOLOTL_DO_NOT_TRACK": "1", "ACCELERATE_USE_CPU": "true"}
    plugin = {"plugins": ["axolotl_plugin.UntriggerPlugin"]}

    def command(name: str, added: dict[str, object]) -> tuple[str, ...]:
        settings = {**SETTINGS, "base_model": axolotl.embedded_model(), "output_dir": name, **added}
        axolotl.write(f"{name}.yaml", json.dumps(settings))  # JSON is YAML
        return "axolotl", "train", f"{name}.yaml", "--launcher", "python"

    for name, added in (("plain", {}), ("defended", plugin)):
        axolotl.run(name, *command(name, added), **paths)
    held = axolotl.verdict("plain", "defended")
    refused = [
        axolotl.refuses(name, words, *command(name, {**plugin, **added}), **paths)
        for name, (words, added) in REFUSED.items()
    ]
    shorter = {**plugin, "num_epochs": 4}
    works = [axolotl.works(name, *command(name, {**shorter, **added}), **paths) for name, added in WORKS.items()]
    sys.exit(0 if held and all([*refused, *works]) else 1)
