"""Measure the cost of the two-view losses at the vocabulary head: fused, one by one, and the matrix products alone.

    python benchmarks/head_cost.py [--rounds 9] --json FILE

``naive`` computes the logits of all answer tokens under both views, and from them each equation of
`untrigger.losses.objective`. ``fused`` is the code of the training. ``products`` are only the four products with the
head that both need.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from memory_tracker import MemoryTracker
from rich.console import Console
from rich.table import Table
from step_cost import ratios
from torch import Tensor, nn

from untrigger.defenses import CrossView
from untrigger.files import write_text
from untrigger.losses import objective
from untrigger.losses.chunked import Values, losses_at_head
from untrigger.models.forward import Pair

Variant = Callable[[nn.Linear, Sequence[Tensor], Tensor], Tensor]
SHAPES = [(32_000, 1024, 512), (152_000, 1024, 256), (152_000, 1024, 512), (32_064, 4096, 256), (152_064, 3584, 128)]
ON_GPU = [(32_064, 4096, 256), (32_064, 4096, 2048), (152_064, 3584, 256), (152_064, 3584, 2048)]


def fused(head: nn.Linear, hidden: Sequence[Tensor], target: Tensor) -> Tensor:
    def loss(part: slice, pieces: Sequence[Tensor], logits: Sequence[Tensor]) -> tuple[Values, Values]:
        return CrossView().terms(Pair(target[part], logits[0], logits[1], pieces[0], pieces[1], target[part])), {}

    return losses_at_head(head, hidden, loss, width=head.out_features).total.sum()


def naive(head: nn.Linear, hidden: Sequence[Tensor], target: Tensor) -> Tensor:
    d, (logits, view) = CrossView(), [head(states).float() for states in hidden]
    terms = (
        objective.token_nll(logits, target),
        d.view_weight * objective.token_nll(view, target),
        d.output_weight * objective.separation(objective.js(logits, view), d.margin),
        d.feature_weight * objective.feature_separation(hidden[0], hidden[1], d.bound),
        d.entropy_weight * objective.entropy_band(objective.entropy(logits), d.entropy_low, d.entropy_high),
    )
    return torch.stack(terms).sum()


def products(head: nn.Linear, hidden: Sequence[Tensor], target: Tensor) -> Tensor:
    """The logits of both views and as many products backward; each result is freed before the next."""
    with torch.no_grad():
        for states in hidden:
            _ = head(states) @ head.weight
    return hidden[0].sum()


def variants() -> dict[str, Variant]:
    result: dict[str, Variant] = {"naive": naive, "fused": fused, "products": products}
    if not torch.cuda.is_available():
        return result
    with suppress(ImportError):
        from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
            LigerFusedLinearCrossEntropyLoss,
            LigerFusedLinearJSD,
        )

        nll, js = LigerFusedLinearCrossEntropyLoss(reduction="sum"), LigerFusedLinearJSD(jsd_beta=0.5)

        def liger_nll(head: nn.Linear, hidden: Sequence[Tensor], target: Tensor) -> Tensor:
            return torch.stack([nll(head.weight, states, target) for states in hidden]).sum()

        def liger(head: nn.Linear, hidden: Sequence[Tensor], target: Tensor) -> Tensor:
            first, second = hidden
            divergences = [
                js(a, head.weight, b.detach(), head.weight, target) for a, b in ((first, second), (second, first))
            ]
            return liger_nll(head, hidden, target) + torch.stack(divergences).sum()

        result |= {"Liger, cross-entropy": liger_nll, "Liger, and divergence": liger}
    with suppress(ImportError):
        from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

        def cut(head: nn.Linear, hidden: Sequence[Tensor], target: Tensor) -> Tensor:
            losses = [linear_cross_entropy(states, head.weight, target, reduction="sum") for states in hidden]
            return torch.stack(losses).sum()

        result["cut-cross-entropy"] = cut
    return result


def measured(
    vocabulary: int, width: int, tokens: int, rounds: int, chosen: Mapping[str, Variant]
) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    head = nn.Linear(width, vocabulary, bias=False, device=device, dtype=dtype).requires_grad_(False)
    hidden = [torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True) for _ in range(2)]
    target = torch.randint(vocabulary, (tokens,), device=device)

    def time_step(way: Variant) -> float:
        started = time.perf_counter()
        way(head, hidden, target).backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def peak_memory(way: Variant) -> int:
        if device == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            way(head, hidden, target).backward()
            return torch.cuda.max_memory_allocated() - before
        with MemoryTracker() as tracker:
            way(head, hidden, target).backward()
        return tracker.peak - head.weight.nbytes

    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    for _ in range(rounds + 1):  # the first round is a warm-up
        for name, way in chosen.items():
            seconds[name].append(time_step(way))
    timed = {name: values[1:] for name, values in seconds.items()}
    memory = {name: peak_memory(way) for name, way in chosen.items()}
    return [
        {"words": vocabulary, "hidden": width, "tokens": tokens, "way": name, "seconds": round(median(timed[name]), 5)}
        | {"over_naive": ratios(timed[name], timed["naive"]), "over_products": ratios(timed[name], timed["products"])}
        | {"memory_over_naive": round(memory[name] / memory["naive"], 4)}
        for name in chosen
    ]


def main(
    out: Annotated[Path, typer.Option("--json", help="Write the figures to this file.")],
    rounds: Annotated[int, typer.Option(help="Number of timed rounds.")] = 9,
) -> None:
    """Measure time and memory at the vocabulary head."""
    shapes, chosen = ON_GPU if torch.cuda.is_available() else SHAPES, variants()
    rows = [row for shape in shapes for row in measured(*shape, rounds, chosen)]
    table = Table(title="medians")
    for name in ("words", "tokens a view", "way", "s", "time over naive", "over the products", "memory over naive"):
        table.add_column(name, justify="right")
    for row in rows:
        ratios_of_row = (row["over_naive"]["time_ratio"], row["over_products"]["time_ratio"], row["memory_over_naive"])
        table.add_row(
            f"{row['words']:,}",
            str(row["tokens"]),
            row["way"],
            f"{row['seconds']:.4f}",
            *(f"{x:.2f}" for x in ratios_of_row),
        )
    Console().print(table)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    environment = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    write_text(out, json.dumps({"made": environment, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
