"""The report as tables in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from untrigger.bench.report import words
from untrigger.bench.report.figures import PLAIN, AttackGroup, Report, as_rate, short_name
from untrigger.bench.report.tables import (
    Block,
    Row,
    beyond,
    blocks,
    changed_settings,
    costs,
    environment,
    standings,
    views,
)
from untrigger.bench.store import ORACLE


def markdown(report: Report) -> str:
    """Render summary, ASR, models that do not count, distance to the oracle, cost, premise and environment.

    Results without any defense are about the attacks: a table with the figures of each attack is added.
    """
    all_blocks, head = blocks(report), words.headline(report)
    about_attacks = set(report.defenses) == {PLAIN, ORACLE}
    return "\n".join(
        [
            "# Report: backdoors and defenses\n",
            f"{_text(head.first)}\n",
            *([f"{words.BY_DEFENSE}\n"] if head.defenses else []),
            *(f"- **{_text(name)}**: {_text(summary)}" for name, summary in head.defenses),
            *(f"\n{_text(note)}" for note in head.notes),
            "",
            *(f"- {name}: {meaning}" for name, meaning in words.TERMS.items()),
            "\n## Attack success\n",
            f"ASR in percent with its 95 % interval. {words.VALIDITY} Other models are marked, and no median includes "
            "them.\n",
            *(line for block in all_blocks for line in _matrix(block, report.defenses)),
            "## Models that do not count\n",
            *(_invalid(all_blocks) or ["Every attacked model counts.\n"]),
            *(_attacks(all_blocks) if about_attacks else []),
            *_beyond(report, all_blocks),
            "## Distance to the oracle\n",
            "Medians over the cells that count, with the range: ASR minus the oracle's in percentage points, and "
            "quality as a share of the oracle's.\n",
            *(line for block in all_blocks for line in _distance(block, report.defenses)),
            "## Cost\n",
            "Training time of all stages, as a multiple of the undefended model's in the same cell: medians with the "
            "range.\n",
            *_table(
                ["defense", "cells", "time over undefended", "seconds"],
                (
                    [
                        cost.defense,
                        cost.time_ratio.n,
                        words.ratio_range(cost.time_ratio),
                        words.seconds_range(cost.seconds),
                    ]
                    for cost in costs(report)
                ),
            ),
            "## Does the premise hold?\n",
            *_premise(report, all_blocks),
            *_failures(report),
            "## Environment\n",
            *(f"- {name}: {_text('; '.join(values))}" for name, values in environment(report)),
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
    text = words.rate(pooled.rate)
    if len(pooled.groups) > 1:
        text += f", {len(pooled.groups)} seeds {words.percent(pooled.low)} to {words.percent(pooled.high)}"
    return text + {True: "", None: ", not checked", False: ", not counted"}[pooled.valid]


def _invalid(all_blocks: Sequence[Block]) -> list[str]:
    rows = [[block.title, row.label, row.status] for block in all_blocks for row in block.rows if row.status]
    return _table(["model and task", "attack", "reason"], rows) if rows else []


def _attacks(all_blocks: Sequence[Block]) -> list[str]:
    tables = (
        line
        for block in all_blocks
        for line in (
            f"### {_text(block.title)}\n",
            *_table(_ATTACK_HEAD, [_attack(row, group) for row in block.rows for group in row.groups]),
        )
    )
    return [
        "## Every attack\n",
        "Figures of the undefended model, with 95 % intervals. The floor is the oracle's ASR; the quality after the "
        "slash is the oracle's. Near misses carry a wrong key, or only a part of the right one. PSNR and SSIM compare "
        "n attacked images with their clean originals.\n",
        *tables,
    ]


_ATTACK_HEAD = (
    *("attack", "goal", "seed", "ASR, %", "floor, %", "leak, %", "near misses, %"),
    *("quality", "PSNR, SSIM", "changed settings"),
)


def _attack(row: Row, group: AttackGroup) -> list[object]:
    if PLAIN not in group.results:
        return [row.label, group.cell.goal, group.cell.seed, *["-"] * 6, changed_settings(group.cell)]
    metrics = group.results[PLAIN].metrics
    floor, oracle_quality = (
        figure(ORACLE) if ORACLE in group.results else None for figure in (group.asr, group.quality)
    )
    return [
        row.label,
        group.cell.goal,
        group.cell.seed,
        words.rate(group.asr(PLAIN)) + ("" if group.valid else f", {group.reason}"),
        words.rate(floor),
        words.rate(as_rate(metrics["leak"])) if "leak" in metrics else "none",
        "; ".join(f"{name} {words.rate(as_rate(rate))}" for name, rate in metrics.get("near_miss", {}).items())
        or "none",
        " / ".join(words.quality(value, group.cell.metric) for value in (group.quality(PLAIN), oracle_quality)),
        _similarity(metrics.get("similarity")),
        changed_settings(group.cell),
    ]


def _similarity(figures: Mapping[str, Any] | None) -> str:
    if not figures:
        return "-"
    if not figures["changed"]:
        return "no changed pixel"
    return f"{figures['psnr']:.1f} dB, {figures['ssim']:.3f} (n {figures['changed']})"


def _distance(block: Block, defenses: Sequence[str]) -> list[str]:
    rows = [
        [
            standing.defense,
            standing.asr.n,
            words.points_range(standing.above_oracle),
            words.percent_range(standing.quality_share),
            words.percent_range(standing.leak),
        ]
        for standing in standings(block.groups, defenses)
    ]
    if not rows:
        return [f"### {_text(block.title)}\n", "No cell counts.\n"]
    head = ["defense", "cells", "ASR above the oracle's, points", "quality, % of the oracle's", "leak, %"]
    return [f"### {_text(block.title)}\n", *_table(head, rows)]


def _beyond(report: Report, all_blocks: Sequence[Block]) -> list[str]:
    """The section on goals whose replies vary; empty if there are none."""
    rows = [
        [
            title,
            label,
            short_name(group.cell.goal),
            group.cell.seed,
            group.status or "yes",
            *map(words.difference, rates),
        ]
        for title, label, group, rates in beyond(all_blocks, report.defenses)
    ]
    head = ["model and task", "attack", "goal", "seed", "counts", *report.defenses]
    return ["## Beyond the oracle\n", f"{words.BEYOND}\n", *_table(head, rows)] if rows else []


def _premise(report: Report, all_blocks: Sequence[Block]) -> list[str]:
    all_views = views(report)
    if not all_views:
        return ["These results have no such figures.\n"]
    names = list(dict.fromkeys(view.name for view in all_views))
    aurocs = {(view.group.anchor, view.name): words.auroc(view.auroc) for view in all_views}
    rows = [
        [block.title, row.label, group.cell.seed, *(aurocs.get((group.anchor, name), "-") for name in names)]
        for block in all_blocks
        for row in block.rows
        for group in row.groups
        if group.premise
    ]
    return [
        "AUROC of the invariance of a row's answer as a sign of poisoning, by view, with its 95 % interval. The "
        f"premise holds above 0.5. {words.premise_summary(all_views)}\n",
        *_table(["model and task", "attack", "seed", *names], rows),
    ]


def _failures(report: Report) -> list[str]:
    lines = [f"- {_text(name)}: {_text(reason)}" for name, reason in report.failures.items()]
    return ["## Failed cells\n", *lines, ""] if lines else []


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [*(f"| {' | '.join(_text(str(part)) for part in line)} |" for line in lines), ""]


def _text(text: str) -> str:
    """One line with Markdown and HTML escaped."""
    return re.sub(r"([\\|<>`*\[\]])", r"\\\1", " ".join(text.split()))
