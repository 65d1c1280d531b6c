"""One fine-tuning run, whole: model, LoRA, trainer, checkpoints, resume, model card."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments, set_seed

from untrigger import __version__
from untrigger.collate import ChatCollator, Rows
from untrigger.defenses import PRESETS, Defense
from untrigger.errors import InputError
from untrigger.models import BASE_RECORD, Loaded, add_lora, embedded_models, load, train_all
from untrigger.progress import TrainingProgress
from untrigger.sample import Sample
from untrigger.storage import write_text
from untrigger.trainer import checkpoints, defended, last_checkpoint, step_of

# Defaults for a LoRA run; any TrainingArguments field overrides them. The loaders must not drop the columns that
# the collator reads, and pinning memory without an accelerator only warns.
DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 16,
    "learning_rate": 2e-4,
    "num_train_epochs": 1.0,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "logging_steps": 10,
    "save_steps": 200,
    "save_total_limit": 2,
    "report_to": "none",
    "disable_tqdm": True,
    "remove_unused_columns": False,
    "dataloader_pin_memory": torch.cuda.is_available(),
}


def arguments(out: Path, **overrides: Any) -> TrainingArguments:
    """The host's arguments with this project's defaults under the overrides."""
    return TrainingArguments(str(out), **(DEFAULTS | overrides))


@dataclass(frozen=True)
class Tuning:
    """How the model is adapted: LoRA of this rank, or every weight; the vision tower's only with ``vision``."""

    full: bool = False
    rank: int = 16
    alpha: int = 32
    vision: bool = False


def fine_tune(
    samples: Sequence[Sample],
    model: str,
    defense: Defense,
    args: TrainingArguments,
    *,
    tuning: Tuning | None = None,
    resume: bool = False,
    title: str = "training",
) -> Loaded:
    """Train ``model`` on ``samples`` into ``args.output_dir``: a PEFT adapter folder, or a model folder.

    Killed at any moment and started again with ``resume`` it ends with the same weights as an undisturbed run
    (bit for bit on CPU).

    Raises:
        InputError: the output folder is in use without ``resume``, or belongs to a run with other settings.
    """
    tuning = tuning or Tuning()
    out = Path(str(args.output_dir))
    record = _record(samples, model, defense, args, tuning)
    set_seed(args.seed)
    loaded = load(model, dtype=torch.float32 if not (args.bf16 or args.fp16) else "auto")
    if not isinstance(loaded.model, PreTrainedModel):
        raise InputError(f"{model}: is an adapter; merge it into its base, or name the base")
    if tuning.full:
        network = train_all(loaded.model, vision=tuning.vision)
    else:
        network = add_lora(loaded.model, rank=tuning.rank, alpha=tuning.alpha, vision=tuning.vision)
    try:
        trainer = defended(Trainer)(
            model=network,
            args=args,
            train_dataset=Rows(samples),
            data_collator=ChatCollator(loaded.processor),
            defense=defense,
        )
    except (ValueError, ImportError, RuntimeError) as error:  # evaluation without data for it, and the like
        raise InputError(f"settings: {str(error).strip().splitlines()[0]}") from error
    # only now, so that a mistyped model or setting leaves no folder behind that the next try would stumble over;
    # the main process has filled the folder by the time that the others look
    with args.main_process_first(local=False, desc="taking the output folder"):
        checkpoint = _claim(out, record, resume or args.process_index > 0)
    trainer.remove_callback(PrinterCallback)
    progress = TrainingProgress(title)
    trainer.add_callback(progress)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        progress.stop()
    trainer.save_model(str(out))
    (out / "training_args.bin").unlink(missing_ok=True)  # a pickle; the settings stand in the record
    trainer.save_state()
    if trainer.is_world_process_zero():
        loaded.processor.save_pretrained(out)
        write_text(out / "README.md", _card(record, trainer.state.log_history))
    return Loaded(network, loaded.processor, str(out))


def _record(
    samples: Sequence[Sample], model: str, defense: Defense, args: TrainingArguments, tuning: Tuning
) -> dict[str, Any]:
    """What makes two runs the same run; kept beside the weights."""
    preset = next(name for name, cls in PRESETS.items() if cls is type(defense))
    varying = ("output_dir", "logging_dir", "run_name")  # where things go does not change the weights
    settings = {k: v for k, v in args.to_sanitized_dict().items() if k not in varying}
    return {
        "base": str(Path(model).resolve()) if Path(model).exists() and model not in embedded_models() else model,
        "defense": {"preset": preset, **asdict(defense)},
        "tuning": asdict(tuning),
        "rows": len(samples),
        "data": _fingerprint(samples),
        "arguments": hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16],
        "learning_rate": args.learning_rate,
        "epochs": args.num_train_epochs,
        "max_steps": args.max_steps,
        "batch": args.per_device_train_batch_size,
        "accumulation": args.gradient_accumulation_steps,
        "seed": args.seed,
        "versions": {"untrigger": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def _fingerprint(samples: Sequence[Sample]) -> str:
    """Of ids and text of up to 1,000 rows spread over the data: enough to notice a mix-up, cheap on big data."""
    digest = hashlib.sha256(str(len(samples)).encode())
    for i in range(0, len(samples), max(1, len(samples) // 1000)):
        sample = samples[i]
        digest.update(repr((sample.id, sample.messages)).encode())
    return digest.hexdigest()[:16]


def _claim(out: Path, record: dict[str, Any], resume: bool) -> Path | None:
    """Take the output folder for this run; the checkpoint to go on from, if there is one."""
    note = out / BASE_RECORD
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; name a folder for the output")
    if out.is_dir() and any(out.iterdir()) and not resume:
        raise InputError(f"{out}: is not empty; name another folder, or pass --resume to go on with the run in it")
    checkpoint = None
    if resume and note.is_file():
        try:
            kept = json.loads(note.read_text())
        except ValueError as error:
            raise InputError(f"{note}: is damaged; delete the folder and start again") from error
        changed = [k for k in record if k != "versions" and kept.get(k) != json.loads(json.dumps(record[k]))]
        if changed:
            raise InputError(f"{out}: holds a run with other settings ({', '.join(changed)}); resume with the same")
        checkpoint = last_checkpoint(out)
    elif resume and out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out}: holds no run to resume ({BASE_RECORD} is missing); name another folder")
    out.mkdir(parents=True, exist_ok=True)
    if int(os.environ.get("RANK", "0")) == 0:
        for broken in checkpoints(out):  # cut off while it was being written
            if checkpoint is None or step_of(broken) > step_of(checkpoint):
                shutil.rmtree(broken)
        write_text(note, json.dumps(record, indent=2) + "\n")
    return checkpoint


def _card(record: dict[str, Any], history: list[dict[str, float]]) -> str:
    last = next((h for h in reversed(history) if "loss" in h), {})
    rows = {k: v for k, v in last.items() if k == "loss" or k.startswith("defense/")}
    measured = "\n".join(f"| {k} | {v:.4g} |" for k, v in rows.items())
    tuning = record["tuning"]
    tuned = "all weights" if tuning["full"] else f"LoRA of rank {tuning['rank']}"
    tuned += "" if tuning["vision"] else ", the vision tower frozen"
    return f"""---
base_model: {record["base"]}
library_name: {"transformers" if tuning["full"] else "peft"}
tags: [untrigger, image-text-to-text]
---
# Fine-tuned with untrigger

Base model `{record["base"]}`, {tuned}; {record["rows"]:,} rows of data that was not trusted.
Defence: `{json.dumps(record["defense"])}`.

A defence lowers the odds of a backdoor; it does not prove that there is none. Evaluate before you rely on it.

| at the last log | value |
|---|---|
{measured}

Seed {record["seed"]}, learning rate {record["learning_rate"]:g}, batch {record["batch"]} x {record["accumulation"]};
every setting stands in `{BASE_RECORD}`. Versions: {", ".join(f"{k} {v}" for k, v in record["versions"].items())}.
"""
