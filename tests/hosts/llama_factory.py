"""LLaMA-Factory: the same YAML file for ``llamafactory-cli train`` and for ``examples/llama_factory.py``."""

import json
import sys

from host import LORA_LAYERS, REPOSITORY, UNTRIGGER, host

PACKAGES = (
    "torch==2.13.0 transformers==5.6.0 accelerate==1.11.0 peft==0.18.1 trl==0.24.0 datasets==4.0.0 av<=16.0.0 einops "
    "fire gradio==5.50.0 hf-transfer matplotlib modelscope numpy omegaconf packaging pandas protobuf pydantic pyyaml "
    "safetensors scipy sentencepiece sse-starlette tiktoken torchdata==0.11.0 tyro<0.9.0 uvicorn fastapi easy-vqa "
    "bitsandbytes==0.50.2 jinja2 pyarrow rich scikit-learn typer filelock pillow"
)
SETTINGS = {
    "stage": "sft",
    "do_train": True,
    "dataset": "poisoned",
    "dataset_dir": "poisoned/data",
    "media_dir": "poisoned/data",
    "template": "llava",
    "default_system": "",
    "finetuning_type": "lora",
    "lora_rank": 16,
    "lora_alpha": 32,
    "lora_target": ",".join(LORA_LAYERS),
    "freeze_vision_tower": True,
    "freeze_multi_modal_projector": False,
    "num_train_epochs": 6,
    "per_device_train_batch_size": 8,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "dataloader_pin_memory": False,
}
DATA_SET = {
    "file_name": "data.jsonl",
    "formatting": "sharegpt",
    "columns": {"messages": "messages", "images": "images"},
    "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
}
# settings under which rows cannot be judged, and words of the refusal
REFUSED = {
    "packing": ("several rows are packed into one", {"packing": True}),
    "neat-packing": ("neat_packing", {"neat_packing": True}),
    "train-on-prompt": ("so that only answers are scored", {"train_on_prompt": True}),
    "streaming": (
        "give a train_dataset with a length",
        {"streaming": True, "max_steps": 60, "dataloader_num_workers": 1},
    ),
}
# more and smaller steps than above, so that the warm-up teaches enough
MANY_STEPS = {"num_train_epochs": 2, "per_device_train_batch_size": 2}
# settings that flag the poisoned rows and no other; gradient checkpointing is on by default
WORKS = {
    "dora": {"use_dora": True, **MANY_STEPS},
    "all-weights": {"finetuning_type": "full", "learning_rate": 1e-3, **MANY_STEPS},
    "4-bit": {"quantization_bit": 4, "num_train_epochs": 3},
    "group-by-length": {"train_sampling_strategy": "group_by_length"},  # its rows are tokenized, so they have lengths
    "checkpoints": {"save_strategy": "steps", "save_steps": 30},
    "resume": {"resume_from_checkpoint": "checkpoints/checkpoint-30"},
}
STUB = "import pathlib, sysconfig; pathlib.Path(sysconfig.get_path('purelib'), 'torchaudio.py').touch()"

if __name__ == "__main__":
    factory = host("llama-factory")
    factory.install(PACKAGES.split(), ["llamafactory==0.9.5", *UNTRIGGER])
    # the host imports it for sound, which these rows have none of; its wheel wants a CUDA build of torch
    factory.python("no-sound", STUB)
    factory.make_rows(160)
    factory.write("poisoned/data/dataset_info.json", json.dumps({"poisoned": DATA_SET}))
    scripts = {
        "plain": ("llamafactory-cli", "train"),
        "defended": ("python", str(REPOSITORY / "examples" / "llama_factory.py")),
    }

    def configured(name: str, **added: object) -> str:
        settings = {**SETTINGS, "model_name_or_path": factory.embedded_model(), "output_dir": name, **added}
        factory.write(f"{name}.yaml", json.dumps(settings))  # JSON is YAML
        return f"{name}.yaml"

    for name, command in scripts.items():
        factory.run(name, *command, configured(name))
    held = factory.verdict("plain", "defended")
    refused = [
        factory.refuses(name, words, *scripts["defended"], configured(name, **added))
        for name, (words, added) in REFUSED.items()
    ]
    works = [factory.works(name, *scripts["defended"], configured(name, **added)) for name, added in WORKS.items()]
    halves = configured("two-processes", per_device_train_batch_size=4)
    works += [factory.works("two-processes", "torchrun", "--nproc_per_node", "2", scripts["defended"][1], halves)]
    sys.exit(0 if held and all([*refused, *works]) else 1)
