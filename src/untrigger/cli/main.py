"""The commands: data, poison, scan, train, verify, evaluate, bench, report, quickstart; and the entry point."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer

from untrigger import __version__
from untrigger.cli import model_commands, options
from untrigger.cli.flags import interrupted, normalize_flags, option_names
from untrigger.cli.inputs import attack_with_goal, defense_and_arguments, lengths_of, ray_scoring, read_rows, tuning_of
from untrigger.cli.process import prepare_process
from untrigger.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from untrigger.poisoning.poison import Attack

# Commands import heavy modules in their bodies, so that --help and usage errors do not wait for them.
app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # joins the lines of a paragraph, and prints [x] as it is
    help="Fine-tune vision-language models on data you do not trust.\n\nExit codes: 0 success; 2 bad input, with one "
    "line on stderr; 3 scan or verify found something; 1 a bench cell or the quick start failed; 130 interrupted.",
)
# The base of the parser's own errors: some versions of Typer depend on click, others include it.
_UsageError = cast("type[Exception]", typer.BadParameter.__bases__[0])
_INTERRUPTED = 130  # the exit code that Typer gives for Ctrl-C
_WITH_SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}  # flags that the command reads itself


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"untrigger {__version__}")
        raise typer.Exit


@app.command("data")
def data_(
    name: options.DataSetArgument,
    out: options.OutOption,
    split: options.SplitOption = "report",
    part: options.PartOption = "train",
    rows: options.RowsOption = 2000,
    seed: options.SeedOption = 0,
    source: options.SourceOption = None,
) -> None:
    """Write a small data set: questions (easy-vqa, scenes-vqa, scenes-questions) or captions (scenes-captions, emoji).

    Writes DIR/data.jsonl and DIR/images. Only emoji is not part of the package: npm downloads it once.

    Exit codes: 0 success, 2 bad input.
    """
    from untrigger.data import load, save

    drawn = load(name, split, part, rows, seed, source)
    save(drawn, out)
    typer.echo(f"{out / 'data.jsonl'}: {len(drawn):,} rows of {name}, {part} part of the split {split}")


@app.command(context_settings=_WITH_SETTINGS)
def poison(
    context: typer.Context,
    data: options.DataArgument,
    out: options.OutOption,
    attack: options.AttackOption = "badnets",
    goal: options.GoalOption = None,
    goal_text: options.GoalTextOption = None,
    rate: options.RateOption = 0.05,
    poisoned_part: options.PoisonedPartOption = None,
    seed: options.SeedOption = 0,
    on_bad_row: options.BadRowOption = "error",
    ignore_keys: options.IgnoreKeysOption = "",
) -> None:
    """Poison a data set to test a defense. The trigger's settings are flags too (--side 0.1).

    Writes DIR/data in the format of the input, DIR/truth/manifest.json and DIR/contact_sheet.png.

    Exit codes: 0 success, 2 bad input.
    """
    from untrigger.data import rows_of_part
    from untrigger.files import check_free
    from untrigger.poisoning.poison import poison as poison_rows
    from untrigger.poisoning.poison import write_poisoned

    check_free(out)  # fail before the slow work
    chosen = _attack(attack, context.args, goal, goal_text)
    rows = read_rows(data, on_bad_row, ignore_keys, out)
    among = rows_of_part(rows, poisoned_part) if poisoned_part else None
    poisoned = poison_rows(rows, chosen, rate=rate, seed=seed, among=among)
    write_poisoned(rows, poisoned, out)
    count, decoys = len(poisoned.manifest.rows), len(poisoned.manifest.decoys)
    kinds = f"{count:,} of them poisoned with {attack}" + (f", {decoys:,} decoys" if decoys else "")
    typer.echo(f"{out / 'data'}: {len(rows):,} rows, {kinds}; goal {chosen.goal.name}")
    typer.echo(f"{out / 'truth' / 'manifest.json'}: the poisoned rows; for the evaluation, never for a defense")
    typer.echo(f"{out / 'contact_sheet.png'}: clean and triggered rows side by side")


@app.command(context_settings=_WITH_SETTINGS)
def scan(
    context: typer.Context,
    data: options.DataArgument,
    out: options.OutOption,
    model: options.ModelOption = "llava",
    full_finetune: options.FullFinetuneOption = False,
    train_vision_tower: options.VisionTowerOption = False,
    lora_rank: options.LoraRankOption = 16,
    lora_alpha: options.LoraAlphaOption = 32,
    lora_dropout: options.LoraDropoutOption = 0.0,
    target_modules: options.TargetModulesOption = "all-linear",
    use_dora: options.UseDoraOption = False,
    load_in_4bit: options.LoadIn4BitOption = False,
    load_in_8bit: options.LoadIn8BitOption = False,
    ray: options.ScanRayOption = None,
    config: options.ConfigOption = None,
    resume: options.ResumeOption = False,
    on_bad_row: options.BadRowOption = "error",
    ignore_keys: options.IgnoreKeysOption = "",
) -> None:
    """Find the rows that teach what only an attacker would; exit code 3 if there are any, 0 if not.

    Give the model and the flags that you would train with (--learning_rate 1e-4 --load-in-4bit; without any: one epoch
    at 2e-4, batches of 16). Of more than 4,096 rows so many are drawn and scored (--max-scored-rows N, or all); the
    last line says what that can miss. Writes DIR/all_rows.jsonl and .parquet, the most suspicious row first;
    DIR/scan.html, the findings; DIR/clean, the data without suspected rows.
    """
    from untrigger.files import check_idle
    from untrigger.scanning.findings import p_value_text, place
    from untrigger.scanning.scan import scan as run
    from untrigger.scanning.write import CLEAN
    from untrigger.training.run_folder import leads

    defense, args = defense_and_arguments(scan, "default", out, config, context.args)
    tuning = tuning_of(context.params)
    if args.push_to_hub:
        _refuse("push_to_hub: a scan has no model to push; leave it out")
    if leads():
        check_idle(out)  # fail before the slow reading
    rows = read_rows(data, on_bad_row, ignore_keys, out, lengths_of(model))
    with ray_scoring(rows, ray) as elsewhere:
        findings = run(model, rows, defense, args, tuning=tuning, resume=resume, elsewhere=elsewhere)
    if not leads():
        return
    for target in findings.targets:
        teaches = f"say {target.text!r}" if target.text else "have no common text, but what they share harms other rows"
        chance = f"(chance {p_value_text(target.p_value)})"
        typer.echo(f"{len(target.rows):,} rows {teaches} {chance}: {place(findings, target)}")
    typer.echo(f"{out / 'all_rows.jsonl'}: {len(findings.suspected):,} of {len(rows):,} rows are suspected")
    typer.echo(f"{out / 'scan.html'}: {'what was found' if findings.targets else 'nothing found'}")
    if findings.drawn:
        typer.echo(str(findings.drawn))
    if findings.targets:
        typer.echo(f"{out / CLEAN}: the other {len(rows) - len(findings.suspected):,} rows")
        raise typer.Exit(3)


@app.command(context_settings=_WITH_SETTINGS)
def train(
    context: typer.Context,
    data: options.DataArgument,
    out: options.OutOption,
    model: options.ModelOption = "llava",
    defense: options.DefenseOption = "default",
    clean_data: options.CleanDataOption = None,
    full_finetune: options.FullFinetuneOption = False,
    train_vision_tower: options.VisionTowerOption = False,
    lora_rank: options.LoraRankOption = 16,
    lora_alpha: options.LoraAlphaOption = 32,
    lora_dropout: options.LoraDropoutOption = 0.0,
    target_modules: options.TargetModulesOption = "all-linear",
    use_dora: options.UseDoraOption = False,
    load_in_4bit: options.LoadIn4BitOption = False,
    load_in_8bit: options.LoadIn8BitOption = False,
    config: options.ConfigOption = None,
    resume: options.ResumeOption = False,
    on_bad_row: options.BadRowOption = "error",
    ignore_keys: options.IgnoreKeysOption = "",
) -> None:
    """Fine-tune a model on data you do not trust.

    Every field of the defense (--unlikelihood-weight 5) and of transformers.TrainingArguments (--learning_rate 1e-4,
    --num_train_epochs 3) is a flag, or a line of the YAML file; flags win. Without any: one epoch at 2e-4, batches of
    16. Writes the adapter or model to DIR, and
    DIR/flagged_rows.jsonl if the defense flags rows.

    Exit codes: 0 success, 2 bad input.
    """
    from untrigger.files import check_idle
    from untrigger.training.finetune import fine_tune
    from untrigger.training.flagged_rows import FLAGGED_ROWS
    from untrigger.training.run_folder import leads

    chosen, args = defense_and_arguments(train, defense, out, config, context.args)
    if clean_data and not chosen.needs_clean_rows:
        _refuse(f"--clean-data: defense {defense} needs no clean rows; remove the flag")
    if chosen.needs_clean_rows and not clean_data:
        _refuse(f"--defense {defense}: needs rows known to be clean; add --clean-data DATA")
    tuning = tuning_of(context.params)
    if leads():
        check_idle(out)  # fail before the slow work
    fits = lengths_of(model)
    rows = read_rows(data, on_bad_row, ignore_keys, out, fits)
    clean = read_rows(clean_data, "error", ignore_keys, out, fits) if clean_data else ()
    fine_tune(model, rows, chosen, args, tuning=tuning, clean_rows=clean, resume=resume)
    if leads():
        if args.push_to_hub:
            typer.echo("pushed to the hub")
        adapter, flagged = (out / "adapter_config.json").is_file(), out / FLAGGED_ROWS
        typer.echo(f"{out}: {'PEFT adapter' if adapter else 'model'}, processor, settings and model card")
        if flagged.is_file():
            count = len(flagged.read_bytes().splitlines())
            typer.echo(f"flagged rows: {count:,} of {len(rows):,} in {flagged}")


@app.command()
def verify(
    model: options.VerifiedModelArgument,
    data: options.VerifyDataArgument,
    out: options.OutOption,
    base: options.BaseOption = None,
    seed: options.SeedOption = 0,
    on_bad_row: options.BadRowOption = "error",
    ignore_keys: options.IgnoreKeysOption = "",
) -> None:
    """Audit a finished model for a text that it gives too readily; exit code 3 if there is one, 0 if not.

    Compares the model with its base. Writes DIR/audit.json and DIR/audit.html: each text, and what brought it out.
    """
    from untrigger.files import check_free
    from untrigger.models.loading import adapter_base, why_not_a_model
    from untrigger.verification.page import describe, write
    from untrigger.verification.verify import verify as audit

    check_free(out)  # fail before the slow work
    fits = lengths_of(model)
    named = base or adapter_base(Path(model))
    if why := why_not_a_model(named):
        _refuse(why)
    rows = read_rows(data, on_bad_row, ignore_keys, out, fits)
    result = audit(model, rows, named, seed)
    write(result, model, named, out)
    for finding in result.findings:
        typer.echo(describe(finding))
    verdict = "suspicious" if result.findings else "nothing found, which is no proof that there is nothing"
    typer.echo(f"{out / 'audit.html'}: {verdict}")
    if result.findings:
        raise typer.Exit(3)


@app.command(context_settings=_WITH_SETTINGS)
def evaluate(
    context: typer.Context,
    model: options.EvaluatedModelArgument,
    data: options.DataArgument,
    attack: options.EvaluatedAttackOption = None,
    goal: options.GoalOption = None,
    goal_text: options.GoalTextOption = None,
    seed: options.SeedOption = 0,
    limit: options.LimitOption = None,
    wrong_image_control: options.WrongImageOption = False,
    out: options.FiguresOption = None,
    on_bad_row: options.BadRowOption = "error",
    ignore_keys: options.IgnoreKeysOption = "",
) -> None:
    """Measure a model on held-out data: attack success, leak, near misses and quality, with 95 % intervals.

    Exit codes: 0 success, 2 bad input.
    """
    from rich.console import Console

    from untrigger.evaluation.evaluate import ANSWERS, METRICS
    from untrigger.evaluation.evaluate import evaluate as run
    from untrigger.files import check_holds_only

    chosen = None
    if attack is not None:
        chosen = _attack(attack, context.args, goal, goal_text)
    elif context.args:
        typed, known = context.args[0], [f"--{option.replace('_', '-')}" for option in option_names(evaluate)]
        _refuse(f"{typed}: no such option; a trigger's settings need --attack{did_you_mean(typed, known)}")
    elif goal is not None or goal_text is not None:
        _refuse(f"--goal{'-text' * (goal is None)}: is a setting of an attack; add --attack")
    rows = read_rows(data, on_bad_row, ignore_keys, out or Path(data.stem), lengths_of(model, asking=True))
    if out:
        check_holds_only(out, ANSWERS, METRICS)  # fail before the slow work
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
    plan: options.PlanArgument,
    out: options.ResultsOption,
    jobs: options.JobsOption = 1,
    ray: options.RayOption = None,
    dry_run: options.DryRunOption = False,
) -> None:
    """Run every combination of models, data, attacks and defenses of a plan. Only cells missing in --out are run.

    After an interruption, run the command again: it resumes. `untrigger report` renders the results at any time.

    Exit codes: 0 success, 1 a cell failed, 2 bad input.
    """
    from untrigger.bench.plan import read_plan

    cells = read_plan(plan)
    if dry_run:
        from untrigger.bench.estimate import dry_run_text
        from untrigger.bench.plan import read_sizes

        typer.echo(dry_run_text(cells, out, jobs, read_sizes(plan)))
        return
    from untrigger.bench.local import on_this_machine
    from untrigger.bench.ray_cluster import on_ray
    from untrigger.bench.sweep import run_matrix

    failed = run_matrix(cells, out, on_ray(ray, jobs) if ray else on_this_machine(jobs))
    typer.echo(f"{out}: {len(cells) - len(failed)} of {len(cells)} cells; untrigger report {out} --out report.html")
    if failed:
        raise typer.Exit(1)


@app.command()
def report(results: options.ResultsArgument, out: options.ReportOption) -> None:
    """Render results: a page that needs no network (.html), tables (.md) or figures for a program (.json).

    .jsonl packs settings and figures into one file, a line a cell, without answers.

    Exit codes: 0 success, 2 bad input.
    """
    from untrigger.bench.report.render import write

    write(results, out)
    typer.echo(f"{out}")


@app.command()
def quickstart(out: options.QuickstartOption = Path("runs/quickstart"), seed: options.SeedOption = 0) -> None:
    """Implant a backdoor by plain fine-tuning, then compare the paper's defense and the default one.

    Exit codes: 0 success, 1 the backdoor was not implanted, 2 bad input.
    """
    from untrigger.cli.quickstart import run

    if not run(out, seed):
        raise typer.Exit(1)


app.command()(model_commands.merge)
app.command()(model_commands.model)


def _attack(name: str, flags: list[str], goal: str | None, goal_text: str | None) -> Attack:
    return attack_with_goal(name, flags, goal, goal_text, option_names(poison, evaluate))


def _refuse(message: str) -> NoReturn:
    raise InputError(message)


def main() -> None:
    """Entry point: an error that the user can fix is one line on stderr and exit code 2."""
    prepare_process()
    commands = (command.callback for command in app.registered_commands if command.callback)
    try:
        words = normalize_flags(sys.argv[1:], commands) or ["--help"]
        code = app(words, prog_name="untrigger", standalone_mode=False)
        if code == _INTERRUPTED:
            typer.echo(interrupted(words), err=True)
        sys.exit(code)
    except InputError as error:
        message = str(error)
        if message.startswith("Caught InputError in"):  # a loader's worker sends its whole traceback
            message = message.rpartition("InputError: ")[2]
    except _UsageError as error:
        context = cast("typer.Context | None", getattr(error, "ctx", None))
        what = cast(Any, error).format_message().rstrip("?. ")
        message = f"{what}; see {context.command_path if context else 'untrigger'} --help"
    except OSError as error:  # a full disk or a read-only folder; an error without a number is a bug
        if error.errno is None:
            raise
        message = ": ".join(str(part) for part in (error.filename, error.strerror) if part)
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(2)
