"""The arguments and options of the commands, with their help texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

OnBadRow = Literal["error", "skip"]


def refuse_early_setting(value: object) -> object:
    """Raise a usage error if an argument is a flag.

    The parser takes an unknown flag before the first argument for that argument.
    """
    if str(value).startswith("--"):
        raise typer.BadParameter(f"{value} comes too early; give settings after the data")
    return value


# --- several commands ------------------------------------------------------------------------------

DataArgument = Annotated[
    Path,
    typer.Argument(
        help="Data file, a folder with one, or OWNER/NAME of the hub: JSON, JSONL, Parquet, WebDataset or an image "
        "folder, in LLaVA's or another common layout. Image paths count from the file's folder.",
        show_default=False,
        callback=refuse_early_setting,
    ),
]
OutOption = Annotated[
    Path,
    typer.Option("--out", metavar="DIR", help="Write to this folder; it must be new or empty.", show_default=False),
]
BadRowOption = Annotated[
    OnBadRow,
    typer.Option(help="error: stop at the first bad row. skip: leave bad rows out and list them in DIR.skipped.jsonl."),
]
IgnoreKeysOption = Annotated[
    str,
    typer.Option(
        metavar="KEY,KEY",
        help="Keys of rows that may be ignored, whatever they hold; others that are not read are errors.",
    ),
]
AttackOption = Annotated[
    str,
    typer.Option(
        help="Trigger: adaptive, addsent, badnets, badword, blended, dualkey, ftrojan, issba, shadowcast, sig, "
        "trojvlm, vlood, vltrojan, wanet, or the path of your own trigger file."
    ),
]
GoalOption = Annotated[
    str | None,
    typer.Option(
        help="Goal of the attack: fixed, insert, refusal, concept, link; with replies that vary: hijack, hijack-image, "
        "swap, other-question, jailbreak, programmed; or the path of your own goal file. Default: the trigger's own."
    ),
]
GoalTextOption = Annotated[
    str | None,
    typer.Option(help="Replace the attacker's text, the first setting of the goal; for concept: 'circle->rectangle'."),
]
SeedOption = Annotated[int, typer.Option(help="Seed of all random draws.", min=0)]
ModelOption = Annotated[
    str, typer.Option(help="Name of an embedded model, local folder or hub id. Code from the hub is never run.")
]
ConfigOption = Annotated[
    Path | None, typer.Option(help="Read settings from this YAML file: fields of the defense and of TrainingArguments.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Resume the run in --out.")]

# --- data ------------------------------------------------------------------------------------------

DataSetArgument = Annotated[
    str,
    typer.Argument(
        help="Data set: easy-vqa, scenes-vqa, scenes-questions, scenes-captions or emoji; +NAME adds trouble without "
        "an attacker (easy-vqa+wrong-labels-5) or mixes in another data set.",
        show_default=False,
    ),
]
SplitOption = Annotated[
    Literal["dev", "report"], typer.Option(help="Tune on dev; measure the figures that you report on report.")
]
PartOption = Annotated[Literal["train", "test"], typer.Option(help="Part of the split. The parts share no image.")]
RowsOption = Annotated[int, typer.Option(help="Number of rows to draw.", min=1)]
SourceOption = Annotated[
    Path | None, typer.Option(help="For emoji: the npm package's .tgz or folder, instead of a download by npm.")
]

# --- poison, evaluate ------------------------------------------------------------------------------

RateOption = Annotated[float, typer.Option(help="Share of the rows to poison, from 0 to 1.")]
PoisonedPartOption = Annotated[
    str | None,
    typer.Option(
        metavar="PART", help="Poison only one part of a mixture, whose ids begin with PART/; --rate is a share of it."
    ),
]
EvaluatedModelArgument = Annotated[
    str,
    typer.Argument(
        help="Name of an embedded model, folder of a model or of an adapter, or hub id.", callback=refuse_early_setting
    ),
]
EvaluatedAttackOption = Annotated[
    str | None, typer.Option(help="Also evaluate inputs with this trigger: a name, or the path of a trigger file.")
]
LimitOption = Annotated[int | None, typer.Option(help="Evaluate only the first N rows.", min=1)]
WrongImageOption = Annotated[
    bool, typer.Option("--wrong-image-control", help="Also evaluate each row with the image of another row.")
]
FiguresOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        help="Write answers.jsonl and metrics.json to this folder; those of an earlier evaluation are replaced.",
    ),
]

# --- train, scan -----------------------------------------------------------------------------------

DefenseOption = Annotated[
    str,
    typer.Option(
        help="Defense: default, words, plain (none), patch-aug, two-view, paper, abl, byorn, bye; with --clean-data: "
        "crow, clean-tuning, fine-pruning."
    ),
]
CleanDataOption = Annotated[Path | None, typer.Option(help="Data known to be clean, for the defenses that need some.")]
FullFinetuneOption = Annotated[
    bool, typer.Option("--full-finetune", help="Train all weights instead of a LoRA adapter.")
]
VisionTowerOption = Annotated[bool, typer.Option("--train-vision-tower", help="Train the vision tower too.")]
LoraRankOption = Annotated[int, typer.Option(help="Rank of the LoRA adapter.", min=1)]
LoraAlphaOption = Annotated[int, typer.Option(help="Scale of the LoRA adapter: alpha / rank.", min=1)]
LoraDropoutOption = Annotated[float, typer.Option(help="Dropout before the LoRA adapter.", min=0, max=0.99)]
TargetModulesOption = Annotated[
    str,
    typer.Option(
        metavar="NAME,NAME",
        help="Layers that the LoRA adapter reaches, by the ends of their names (q_proj,v_proj). all-linear: all but "
        "the vocabulary head. Those of the vision tower count only with --train-vision-tower.",
    ),
]
LoadIn4BitOption = Annotated[
    bool, typer.Option("--load-in-4bit", help="Hold the base's linear layers in 4 bits (QLoRA; untrigger[quantized]).")
]
LoadIn8BitOption = Annotated[bool, typer.Option("--load-in-8bit", help="Hold them in 8 bits.")]
UseDoraOption = Annotated[bool, typer.Option("--use-dora", help="Train a DoRA adapter in place of plain LoRA.")]

ScanRayOption = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="[ADDRESS]",
        help="Score rows on Ray: on a local cluster, or on the running one at ADDRESS, whose machines see data, model "
        "and DIR under the same paths.",
    ),
]

# --- verify ----------------------------------------------------------------------------------------

VerifiedModelArgument = Annotated[
    str, typer.Argument(help="Model to verify: folder of a model or of an adapter, or hub id.")
]
VerifyDataArgument = Annotated[
    Path,
    typer.Argument(
        help="Rows of the model's task, clean or not: a data file, or a folder with one.", show_default=False
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option(help="Model from which it was fine-tuned. An adapter names its own base.", show_default=False),
]

# --- bench, report ---------------------------------------------------------------------------------

PlanArgument = Annotated[
    Path, typer.Argument(help="YAML file with models, data, attacks and defenses.", show_default=False)
]
ResultsOption = Annotated[
    Path,
    typer.Option(
        "--out", metavar="DIR", help="Write results to this folder; cells that it holds already are not run again."
    ),
]
JobsOption = Annotated[int, typer.Option(help="Number of cells to run at a time on this machine.", min=1)]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray", metavar="[ADDRESS]", help="Run on Ray: on a local cluster, or on the running one at ADDRESS."
    ),
]
DryRunOption = Annotated[
    bool,
    typer.Option("--dry-run", help="Print the number of cells, the estimated time and the memory of a GPU, and exit."),
]
ResultsArgument = Annotated[
    list[Path], typer.Argument(help="Folders that bench wrote, or .jsonl files packed from them.", show_default=False)
]
ReportOption = Annotated[
    Path,
    typer.Option(
        "--out", metavar="FILE", help="Write this file; its suffix is .html, .md, .json or .jsonl.", show_default=False
    ),
]

# --- quickstart, merge, model ----------------------------------------------------------------------

QuickstartOption = Annotated[Path, typer.Option("--out", metavar="DIR", help="Write to this folder.")]
MergedModelArgument = Annotated[
    str, typer.Argument(help="Folder of an adapter, as train writes it.", show_default=False)
]
FamilyArgument = Annotated[str, typer.Argument(help="Model to build: llava, blip2, qwen2_5_vl or smol.")]
AlignOption = Annotated[
    bool, typer.Option("--align", help="For smol: train the alignment again, about an hour on one core.")
]
