"""One fine-tuning run, whole: model, LoRA, trainer, checkpoints, resume, model card."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import TrainingArguments

from untrigger.defenses import Defense, preset_of
from untrigger.errors import InputError
from untrigger.files import folder_lock, new_file, write_text
from untrigger.models.loading import BASE_RECORD, LoadedModel, embedded_models
from untrigger.rows.sample import Sample, check_rows, row_number
from untrigger.rows.storage import dump
from untrigger.training.settings import settled
from untrigger.training.stages import Stages, Tuning, settings_of, versions
from untrigger.training.trainer import check_arguments, checkpoints, last_checkpoint, step_of

FLAGGED_ROWS = "flagged_rows.jsonl"  # of a defense that judges rows: those that it acted on


def fine_tune(
    model: str | Path,
    rows: Sequence[Sample],
    defense: str | Defense = "default",
    args: TrainingArguments | None = None,
    *,
    out: Path | str | None = None,
    tuning: Tuning | None = None,
    clean_rows: Sequence[Sample] = (),
    resume: bool = False,
    title: str = "training",
    **settings: Any,
) -> LoadedModel:
    """Train ``model`` on ``rows`` into the folder ``out``: a PEFT adapter, or a whole model; with a model card.

    Killed at any moment and started again with ``resume`` it ends with the same weights as an undisturbed run
    (bit for bit on CPU).

    Args:
        model: an embedded model's name, a local folder or a hub id.
        defense: a preset's name, or a defense.
        args: ready arguments (`untrigger.training.settings.arguments`), in the place of ``out`` and ``settings``.
        clean_rows: rows known to be clean; only a defense that asks for some looks at them.
        settings: fields of the defense (``weight=5``) and of transformers.TrainingArguments (``learning_rate=1e-4``);
            what is left out is `untrigger.training.settings.DEFAULTS`, not the host's.

    Raises:
        InputError: a setting is unknown or out of range; the output folder is in use without ``resume``, or belongs to
            a run with other settings; there are no rows; the defense wants trusted ones and there are none.
    """
    check_rows(rows)
    model, tuning = str(model), tuning or Tuning()
    defense, args = settled(defense, args, out, settings)
    check_arguments(defense, args)
    out = Path(str(args.output_dir))
    record = record_of(model, rows, defense, args, tuning, clean_rows)
    with ExitStack() as held:
        stages = Stages(
            model,
            args,
            tuning,
            clean_rows=clean_rows,
            title=title,
            # the main process has filled the folder by the time that the others look
            claim=lambda: claim(out, record, resume or args.process_index > 0, held),
        )
        loaded = defense.fine_tune(rows, stages)
        if args.process_index == 0:
            if not isinstance(loaded.model, PeftModel) and (out / "adapter_config.json").is_file():
                # the defense went on after the last stage, and merged what that had saved
                for file in out.glob("adapter_*"):
                    file.unlink()
                loaded.model.save_pretrained(out)
            loaded.processor.save_pretrained(out)
            if stages.scores:
                _tell(out / FLAGGED_ROWS, rows, stages)
            write_text(out / "README.md", _card(record, isinstance(loaded.model, PeftModel), stages.history))
    return LoadedModel(loaded.model, loaded.processor, str(out))


def record_of(
    model: str,
    rows: Sequence[Sample],
    defense: Defense,
    args: TrainingArguments,
    tuning: Tuning,
    clean_rows: Sequence[Sample],
) -> dict[str, Any]:
    """What makes two runs the same run; kept beside the weights."""
    return {
        "base": str(Path(model).resolve()) if Path(model).exists() and model not in embedded_models() else model,
        "defense": {"preset": preset_of(defense), **asdict(defense)},
        "tuning": asdict(tuning),
        "rows": len(rows),
        "data": _fingerprint(rows),
        **({"trusted": _fingerprint(clean_rows)} if clean_rows else {}),
        "arguments": _digest(settings_of(args)),
        "learning_rate": args.learning_rate,
        "epochs": args.num_train_epochs,
        "max_steps": args.max_steps,
        "batch": args.per_device_train_batch_size,
        "accumulation": args.gradient_accumulation_steps,
        "seed": args.seed,
        "versions": versions(),
    }


def _tell(path: Path, samples: Sequence[Sample], stages: Stages) -> None:
    """The rows that the defense acted on, the most suspicious first: a JSON line for each."""
    with new_file(path) as file:
        for row in sorted(stages.flagged, key=lambda row: -stages.scores[row]):
            sample = samples[row]
            answers = [message.text for message in sample.messages if message.role == "assistant"]
            told = {"row": row_number(samples, row), "id": sample.id, "score": round(stages.scores[row], 4)}
            file.write(dump(told | {"why": stages.flagged[row], "answers": answers}) + b"\n")


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _fingerprint(samples: Sequence[Sample]) -> str:
    """Of ids and text of up to 1,000 rows spread over the data: enough to notice a mix-up, cheap on big data."""
    digest = hashlib.sha256(str(len(samples)).encode())
    for i in range(0, len(samples), max(1, len(samples) // 1000)):
        sample = samples[i]
        digest.update(repr((sample.id, sample.messages)).encode())
    return digest.hexdigest()[:16]


def leads() -> bool:
    """Whether this process is the only one of its run, or the first of several."""
    return int(os.environ.get("RANK", "0")) == 0


def claim(out: Path, record: dict[str, Any], resume: bool, held: ExitStack) -> Path | None:
    """Take the output folder for this run, while it is ``held``; the checkpoint to go on from, if there is one."""
    note = out / BASE_RECORD
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; name a folder for the output")
    main = leads()
    out.mkdir(parents=True, exist_ok=True)
    if main:
        held.enter_context(folder_lock(out))
    used = any(out.iterdir())
    if used and not resume:
        raise InputError(f"{out}: is not empty; name another folder, or go on with its run (--resume; resume=True)")
    checkpoint = None
    if resume and note.is_file():
        try:
            kept: dict[str, Any] = dict(json.loads(note.read_text()))
        except (ValueError, TypeError) as error:
            raise InputError(f"{note}: is damaged; delete the folder and start again") from error
        changed = [k for k in record if k != "versions" and kept.get(k) != json.loads(json.dumps(record[k]))]
        if changed:
            raise InputError(f"{out}: holds a run with other settings ({', '.join(changed)}); resume with the same")
        checkpoint = last_checkpoint(out)
    elif used:
        raise InputError(f"{out}: holds no run to resume ({BASE_RECORD} is missing); name another folder")
    if main:
        for broken in checkpoints(out):  # cut off while it was being written
            if checkpoint is None or step_of(broken) > step_of(checkpoint):
                shutil.rmtree(broken)
        write_text(note, json.dumps(record, indent=2) + "\n")
    return checkpoint


def _card(record: dict[str, Any], adapter: bool, history: list[dict[str, float]]) -> str:
    last = next((h for h in reversed(history) if "loss" in h), {})
    rows = [f"| {k} | {v:.4g} |\n" for k, v in last.items() if k == "loss" or k.startswith("defense/")]
    # a run shorter than `logging_steps` has no log
    measured = "".join(["| at the last log | value |\n|---|---|\n", *rows, "\n"]) if rows else ""
    tuning = record["tuning"]
    tuned = "all weights" if tuning["full_finetune"] else f"LoRA of rank {tuning['rank']}"
    tuned += "" if tuning["train_vision_tower"] else ", the vision tower frozen"
    return f"""---
base_model: {record["base"]}
library_name: {"peft" if adapter else "transformers"}
tags: [untrigger, image-text-to-text]
---
# Fine-tuned with untrigger

Base model `{record["base"]}`, {tuned}; {record["rows"]:,} rows of data that was not trusted.
Defense: `{json.dumps(record["defense"])}`.

A defense lowers the odds of a backdoor; it does not prove that there is none. Evaluate before you rely on it.

{measured}Seed {record["seed"]}, learning rate {record["learning_rate"]:g},
batch {record["batch"]} x {record["accumulation"]}; every setting stands in `{BASE_RECORD}`.
Versions: {", ".join(f"{k} {v}" for k, v in record["versions"].items())}.
"""
