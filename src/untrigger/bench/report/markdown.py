"""The report as tables in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from untrigger.bench.report import words
from untrigger.bench.report.figures import PLAIN, Attacked, Report, as_rate
from untrigger.bench.report.tables import Block, Row, blocks, costs, environment, standings, unusual, views
from untrigger.bench.store import ORACLE


def markdown(report: Report) -> str:
    """Headline, ASR, what does not count, distance to the oracle, cost, premise and environment.

    Where no defense was run the attacks are the subject: what each does is listed too.
    """
    told, head = blocks(report), words.headline(report)
    about_attacks = set(report.defenses) == {PLAIN, ORACLE}
    return "\n".join(
        [
            "# What is left of the backdoors\n",
            f"{_text(head.first)}\n",
            *([f"{words.BY_DEFENSE}\n"] if head.defenses else []),
            *(f"- **{_text(name)}**: {_text(said)}" for name, said in head.defenses),
            *(f"\n{_text(note)}" for note in head.notes),
            "",
            *(f"- {name}: {said}" for name, said in words.TERMS.items()),
            "\n## Attack success\n",
            f"ASR in percent with its 95 % interval. {words.GATES} The others say so, and are counted nowhere.\n",
            *(line for block in told for line in _matrix(block, report.defenses)),
            "## What does not count\n",
            *(_invalid(told) or ["Every attacked model counts.\n"]),
            *(_attacks(told) if about_attacks else []),
            "## Distance to the oracle\n",
            "Medians over the cells that count, with the range: ASR above the oracle's in percentage points, and the "
            "share of the oracle's quality that is kept.\n",
            *(line for block in told for line in _distance(block, report.defenses)),
            "## Cost\n",
            "Training, all stages together, as multiples of the undefended model of the same cell: medians with the "
            "range.\n",
            *_table(
                ["defense", "cells", "times the undefended", "seconds"],
                ([of.defense, of.times.n, words.times(of.times), words.seconds(of.seconds)] for of in costs(report)),
            ),
            "## Does the premise hold?\n",
            *_premise(report, told),
            *_failures(report),
            "## Environment\n",
            *(f"- {name}: {_text('; '.join(of))}" for name, of in environment(report)),
            "",
        ]
    )


def _matrix(block: Block, defenses: Sequence[str]) -> list[str]:
    rows = ([row.label, *(_asr(row, name) for name in defenses)] for row in block.rows)
    return [f"### {_text(block.title)}\n", *_table(["attack", *defenses], rows)]


def _asr(row: Row, defense: str) -> str:
    pooled = row.pooled(defense)
    if not pooled:
        return "-"
    told = words.rate(pooled.rate)
    if len(pooled.groups) > 1:
        told += f", {len(pooled.groups)} seeds {words.percent(pooled.low)} to {words.percent(pooled.high)}"
    return told + {True: "", None: ", not checked", False: ", not counted"}[pooled.valid]


def _invalid(told: Sequence[Block]) -> list[str]:
    rows = [[block.title, row.label, row.told] for block in told for row in block.rows if row.told]
    return _table(["model and task", "attack", "why"], rows) if rows else []


def _attacks(told: Sequence[Block]) -> list[str]:
    tables = (
        line
        for block in told
        for line in (
            f"### {_text(block.title)}\n",
            *_table(_ATTACK_HEAD, [_attack(row, group) for row in block.rows for group in row.groups]),
        )
    )
    return [
        "## Every attack\n",
        "Of the undefended model, with 95 % intervals. The floor is the oracle's ASR, and so is the quality after the "
        "slash the oracle's. Near misses carry a wrong key, or a part of the right one. PSNR and SSIM compare n "
        "attacked images with their clean selves.\n",
        *tables,
    ]


_ATTACK_HEAD = (
    *("attack", "goal", "seed", "ASR, %", "floor, %", "leak, %", "near misses, %"),
    *("quality", "PSNR, SSIM", "settings that are not usual"),
)


def _attack(row: Row, group: Attacked) -> list[object]:
    if PLAIN not in group.found:
        return [row.label, group.cell.goal, group.cell.seed, *["-"] * 6, unusual(group.cell)]
    metrics = group.found[PLAIN].metrics
    floor, whole = (of(ORACLE) if ORACLE in group.found else None for of in (group.asr, group.quality))
    return [
        row.label,
        group.cell.goal,
        group.cell.seed,
        words.rate(group.asr(PLAIN)) + ("" if group.valid else f", {group.why}"),
        words.rate(floor),
        words.rate(as_rate(metrics["leak"])) if "leak" in metrics else "none",
        "; ".join(f"{name} {words.rate(as_rate(rate))}" for name, rate in metrics.get("near_miss", {}).items())
        or "none",
        " / ".join(words.quality(of, group.task) for of in (group.quality(PLAIN), whole)),
        _similarity(metrics.get("similarity")),
        unusual(group.cell),
    ]


def _similarity(figures: Mapping[str, Any] | None) -> str:
    if not figures:
        return "-"
    if not figures["changed"]:
        return "no pixel is changed"
    return f"{figures['psnr']:.1f} dB, {figures['ssim']:.3f} (n {figures['changed']})"


def _distance(block: Block, defenses: Sequence[str]) -> list[str]:
    rows = [
        [of.defense, of.asr.n, words.points_over(of.above), words.over(of.kept), words.over(of.leak)]
        for of in standings(block.groups, defenses)
    ]
    if not rows:
        return [f"### {_text(block.title)}\n", "No cell counts.\n"]
    head = ["defense", "cells", "ASR above the oracle's, points", "quality kept, %", "leak, %"]
    return [f"### {_text(block.title)}\n", *_table(head, rows)]


def _premise(report: Report, told: Sequence[Block]) -> list[str]:
    found = views(report)
    if not found:
        return ["None of these cells was asked.\n"]
    names = list(dict.fromkeys(view.name for view in found))
    areas = {(view.group.anchor, view.name): words.area(view.auroc) for view in found}
    rows = [
        [block.title, row.label, group.cell.seed, *(areas.get((group.anchor, name), "-") for name in names)]
        for block in told
        for row in block.rows
        for group in row.groups
        if group.premise
    ]
    return [
        'AUROC of "the more invariant its answer, the more poisoned the row", by view, with its 95 % interval: above '
        f"0.5 where the premise holds. {words.reading(found)}\n",
        *_table(["model and task", "attack", "seed", *names], rows),
    ]


def _failures(report: Report) -> list[str]:
    lines = [f"- {_text(name)}: {_text(why)}" for name, why in report.failures.items()]
    return ["## Cells that could not be run\n", *lines, ""] if lines else []


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [*(f"| {' | '.join(_text(str(part)) for part in line)} |" for line in lines), ""]


def _text(text: str) -> str:
    """In one line, in which nothing is Markdown or HTML."""
    return re.sub(r"([\\|<>`*\[\]])", r"\\\1", " ".join(text.split()))
