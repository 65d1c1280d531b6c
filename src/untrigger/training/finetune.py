"""A whole fine-tuning run: model, LoRA, trainer, checkpoints, resume, model card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import TrainingArguments

from untrigger.defenses import Defense
from untrigger.files import write_text
from untrigger.models.collators import chat_message
from untrigger.models.loading import ALL_LINEAR, BASE_RECORD, LoadedModel
from untrigger.rows.images import pixels_sha256
from untrigger.rows.sample import Sample, check_rows, row_number
from untrigger.training.flagged_rows import FlaggedRow, prompts_of, write_flagged_rows
from untrigger.training.hub_push import check_hub, open_repository, push, without_hub
from untrigger.training.run_folder import claim, record_of
from untrigger.training.settings import settled
from untrigger.training.stages import Stages
from untrigger.training.trainer import check_arguments
from untrigger.training.tuning import Tuning


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
    """Train ``model`` on ``rows`` into the folder ``out``: a PEFT adapter or a whole model, with a model card.

    With ``push_to_hub=True`` the finished folder, with card and flagged rows, is pushed once, whatever `hub_strategy`.
    Killed at any moment and started again with ``resume``, it ends with the same weights as an undisturbed run (bit for
    bit on CPU). If the defense scores rows, ``flagged_rows.jsonl`` in the folder lists those that it flagged.

    Args:
        model: an embedded model's name, a local folder or a hub id.
        defense: a preset's name, or a defense.
        args: ready arguments (`untrigger.training.settings.arguments`), in place of ``out`` and ``settings``.
        clean_rows: rows known to be clean, for a defense that needs some.
        settings: fields of the defense (``min_nll=3``) and of transformers.TrainingArguments (``learning_rate=1e-4``).
            Fields left out are `untrigger.training.settings.DEFAULTS`, not the host's.

    Raises:
        InputError: a setting is unknown or out of range; the output folder is in use without ``resume``, or belongs to
            a run with other settings; there are no rows; the defense needs clean rows and there are none; a push is
            wanted, and the hub is out of reach or refuses it.
    """
    check_rows(rows)
    model, tuning = str(model), tuning or Tuning()
    defense, args = settled(defense, args, out, settings)
    check_arguments(defense, args)
    check_hub(args)
    out = Path(str(args.output_dir))
    record = record_of(model, rows, defense, without_hub(args), tuning, clean_rows)

    def claim_all() -> Path | None:
        # the main process has filled the folder before the other processes claim it
        checkpoint = claim(out, record, resume or args.process_index > 0, locks)
        if args.push_to_hub and args.process_index == 0:
            open_repository(args)
        return checkpoint

    with ExitStack() as locks:
        stages = Stages(model, rows, args, tuning, clean_rows=clean_rows, title=title, claim=claim_all)
        loaded = defense.fine_tune(stages)
        if args.process_index == 0:
            if not isinstance(loaded.model, PeftModel) and (out / "adapter_config.json").is_file():
                # the defense merged the adapter that the last stage saved
                for file in out.glob("adapter_*"):
                    file.unlink()
                loaded.model.save_pretrained(out)
            loaded.processor.save_pretrained(out)
            if stages.scores:
                write_flagged_rows(out, [_flagged_row(rows, row, stages) for row in stages.flagged])
            write_text(out / "README.md", _card(record, isinstance(loaded.model, PeftModel), stages.history))
            if args.push_to_hub:
                push(args)
    return LoadedModel(loaded.model, loaded.processor, str(out))


def _flagged_row(rows: Sequence[Sample], row: int, stages: Stages) -> FlaggedRow:
    sample = rows[row]
    answers = [message.text for message in sample.messages if message.role == "assistant"]
    return FlaggedRow(
        row=row_number(rows, row),
        reordered=False,
        id=sample.id,
        images=[f"pixels-sha256:{pixels_sha256(image)}" for image in sample.images],
        prompts=prompts_of(chat_message(message) for message in sample.messages),
        score=stages.scores[row],
        flagged_text=stages.flagged[row],
        answers=answers,
    )


def _card(record: dict[str, Any], adapter: bool, history: list[dict[str, float]]) -> str:
    """The model card: base, data, defense, last log, settings and versions."""
    last = next((log for log in reversed(history) if "loss" in log), {})
    lines = [
        f"| {name} | {value:.4g} |\n" for name, value in last.items() if name == "loss" or name.startswith("defense/")
    ]
    # a run shorter than `logging_steps` has no log
    table = "".join(["| at the last log | value |\n|---|---|\n", *lines, "\n"]) if lines else ""
    return f"""---
base_model: {record["base"]}
library_name: {"peft" if adapter else "transformers"}
tags: [untrigger, image-text-to-text]
---
# Fine-tuned with untrigger

Base model `{record["base"]}`, {_tuned(**record["tuning"])}; {record["rows"]:,} untrusted rows.
Defense: `{json.dumps(record["defense"])}`.

A defense lowers the odds of a backdoor; it does not prove that there is none. Evaluate the model before you rely on it.

{table}Seed {record["seed"]}, learning rate {record["learning_rate"]:g},
batch {record["batch"]} x {record["accumulation"]}; `{BASE_RECORD}` holds every setting.
Versions: {", ".join(f"{k} {v}" for k, v in record["versions"].items())}.
"""


def _tuned(
    full_finetune: bool,
    rank: int,
    target_modules: Sequence[str],
    use_dora: bool,
    train_vision_tower: bool,
    load_in_4bit: bool,
    load_in_8bit: bool,
    **_: Any,
) -> str:
    """What was trained, in the words of the model card."""
    kind, on = "DoRA" if use_dora else "LoRA", ", ".join(target_modules)
    tuned = f"{kind} of rank {rank}" + (f" on {on}" if on != ALL_LINEAR else "")
    tuned += ", the base in 4 bits" * load_in_4bit + ", the base in 8 bits" * load_in_8bit
    return ("all weights" if full_finetune else tuned) + ("" if train_vision_tower else ", the vision tower frozen")
