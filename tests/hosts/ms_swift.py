"""ms-swift by its command line, with ``--external_plugins`` as the one added option; it asks its models itself."""

import json
import sys
from pathlib import Path

from host import ATTACK, REPOSITORY, UNTRIGGER, Host, host

PACKAGES = ("ms-swift==4.6.0", "torch==2.13.0", "bitsandbytes==0.50.2")
MODEL = ("--model_type", "llava1_5_hf", "--template", "llava1_5_hf", "--torch_dtype", "float32")
OPTIONS = (
    "--dataset poisoned/data/data.jsonl --split_dataset_ratio 0 --remove_unused_columns false "
    "--tuner_type lora --lora_rank 16 --lora_alpha 32 --target_modules all-linear --freeze_vit true "
    "--freeze_aligner false --num_train_epochs 8 --per_device_train_batch_size 8 --gradient_accumulation_steps 1 "
    "--learning_rate 3e-3 --lr_scheduler_type cosine --warmup_ratio 0 --use_cpu true --check_model false "
    "--add_version false --save_strategy epoch --save_total_limit 1 --save_only_model true --logging_steps 10 "
    "--report_to none --dataloader_num_workers 0"
)
TARGET = "Backdoor Attack!"  # the answer that `untrigger poison` teaches unless it gets another goal
# settings under which rows cannot be judged, and words of the refusal
REFUSED = {
    "loss-scale-all": ("has labels on its prompt", "--loss_scale all"),
    "group-by-length": ("set group_by_length=False", "--group_by_length true"),
    "streaming": ("give a train_dataset with a length", "--streaming true --max_steps 60"),
    # in the host's words
    "packing": ("requires a flash attention implementation", "--packing true"),
    "padding-free": ("requires a flash attention implementation", "--padding_free true"),
}
# settings that flag the poisoned rows and no other; gradient checkpointing is on by default
WORKS = {
    "dora": "--use_dora true",
    "all-weights": "--tuner_type full --learning_rate 1e-3",
    "4-bit": "--quant_method bnb --quant_bits 4 --bnb_4bit_compute_dtype float32",
    "checkpoints": "--save_strategy steps --save_steps 30 --save_total_limit 3 --save_only_model false",
    "resume": "--resume_from_checkpoint checkpoints/checkpoint-30",
}


def ask(swift: Host, name: str, model: str) -> tuple[float, float]:
    """Attack success on triggered questions, and accuracy on clean ones, by swift's own template."""
    settings = ("--load_data_args", "false", "--max_new_tokens", "16", "--temperature", "0", "--max_batch_size", "8")
    swift.run(
        f"ask-{name}", "swift", "infer", "--model", swift.embedded_model(), "--adapters", model, *MODEL, *settings,
        "--val_dataset", "ask.jsonl", "--result_path", f"ask-{name}.jsonl",
    )  # fmt: skip
    lines = [json.loads(line) for line in (swift.folder / f"ask-{name}.jsonl").read_text().splitlines()]
    half = len(lines) // 2
    hits = [TARGET in line["response"] for line in lines[:half]]
    right = [line["response"].strip() == line["labels"] for line in lines[half:]]
    return sum(hits) / half, sum(right) / half


def write_questions(swift: Host) -> None:
    """The held-out questions with the trigger, then without it, in one file."""
    swift.run("triggered", "untrigger", "poison", "questions", *ATTACK, "--rate", "1.0", "--out", "triggered")
    lines = []
    for folder in (swift.folder / "triggered" / "data", swift.folder / "questions"):
        for line in (folder / "data.jsonl").read_text().splitlines():
            row = json.loads(line)
            row["images"] = [str(folder / Path(name)) for name in row["images"]]
            lines.append(json.dumps(row))
    swift.write("ask.jsonl", "\n".join(lines) + "\n")


if __name__ == "__main__":
    swift = host("ms-swift")
    swift.install([*PACKAGES, *UNTRIGGER])
    swift.make_rows(160)
    write_questions(swift)
    images = {"ROOT_IMAGE_DIR": str(swift.poisoned)}
    plugin = ("--external_plugins", str(REPOSITORY / "examples" / "ms_swift_plugin.py"))

    def command(name: str, added: str = "") -> tuple[str, ...]:
        model = ("--model", swift.embedded_model(), *MODEL)
        return "swift", "sft", *model, *OPTIONS.split(), "--output_dir", name, *added.split()

    swift.run("plain", *command("plain"), **images)
    swift.run("defended", *command("defended"), *plugin, **images)
    before, right_before = ask(swift, "plain", "plain/last-checkpoint")
    after, right_after = ask(swift, "defended", "defended/last-checkpoint")
    held = swift.judge(before, after, "defended", f"accuracy {right_before:.1%} -> {right_after:.1%}")
    refused = [
        swift.refuses(name, words, *command(name, added), *plugin, **images) for name, (words, added) in REFUSED.items()
    ]
    shorter = "--num_train_epochs 4 "
    works = [swift.works(name, *command(name, shorter + added), *plugin, **images) for name, added in WORKS.items()]
    halves = command("two-processes", shorter + "--per_device_train_batch_size 4")
    works += [swift.works("two-processes", *halves, *plugin, NPROC_PER_NODE="2", **images)]
    sys.exit(0 if held and all([*refused, *works]) else 1)
