"""Measure the cost of a defended step: time and peak memory relative to plain LoRA fine-tuning in the same run.

    python benchmarks/step_cost.py [--quick] --json FILE

The baseline of every ratio is plain fine-tuning with logits of the answer tokens only. The host trainer's own step,
with logits of all positions, is measured too. Each round takes one step of each variant and compares it with the plain
step of the same round, because other load on the machine affects both. Loader workers make the views, so views are not
part of a step. On a GPU the shapes of 7B models are measured too, with random weights: the time of a step does not
depend on their values.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast

import torch
import typer
from memory_tracker import MemoryTracker
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from untrigger.data import load as load_data
from untrigger.defenses import CrossView
from untrigger.defenses.shared_surprise import UnlikelihoodStep
from untrigger.files import write_text
from untrigger.losses import objective
from untrigger.models.collators import IGNORE, ChatCollator, PairCollator, Rows
from untrigger.models.forward import answer_losses, forward_answers
from untrigger.models.loading import add_lora, load

Batch = dict[str, Tensor]
RATIOS = ("memory", "flops", "moved")
PLAIN, EPOCHS = "plain", 3  # a run of 3 epochs scores the rows in two forward passes


@dataclass(frozen=True)
class Shape:
    """A LLaVA with random weights, and a batch for it. ``visual``: image tokens of a row, 576 to an image at most."""

    name: str
    width: int = 256
    layers: int = 4
    vocabulary: int = 8000
    batch: int = 4
    visual: int = 64
    prompt: int = 24
    answer: int = 16
    mlp: float = 2.6875  # times the width, as in a LLaMA
    shared: int = 1  # queries to a key


BASE = Shape("base")
GROWTH = {
    "answer tokens": [replace(BASE, name=f"{n} answer tokens", answer=n) for n in (4, 16, 64, 256)],
    "vocabulary": [replace(BASE, name=f"{n} words", vocabulary=n) for n in (8000, 32_000, 152_000)],
    "visual tokens": [replace(BASE, name=f"{n} visual tokens", visual=n, batch=1) for n in (64, 576, 2880)],
    "batch": [replace(BASE, name=f"batch of {n}", batch=n) for n in (1, 4, 16)],
    "width": [replace(BASE, name=f"width {n}", width=n) for n in (128, 256, 512)],
}
SEVEN_B = [
    Shape("LLaVA-1.5-7B", 4096, 32, 32_064, visual=576, prompt=48, answer=48),
    Shape("Qwen2.5-VL-7B's language model", 3584, 28, 152_064, visual=256, prompt=48, answer=48, mlp=37 / 7, shared=7),
]


class Case(NamedTuple):
    """A model with LoRA, a batch of originals alone, and one of originals and their views."""

    name: str
    model: nn.Module
    single: Batch
    pair: Batch


# --- steps -------------------------------------------------------------------------------------------


def plain(case: Case) -> Tensor:
    answers = forward_answers(case.model, case.single)
    return objective.token_nll(answers.logits, answers.target).mean()


def stock(case: Case) -> Tensor:
    return case.model(**case.single, use_cache=False).loss


def naive(case: Case) -> Tensor:
    """A direct implementation of the ``paper`` objective: two passes, fp32 logits of all positions."""
    d, labels = CrossView(), case.single["labels"]
    answers = labels[:, 1:] != IGNORE
    logits, hidden = list[Tensor](), list[Tensor]()
    for half in (0, 1):
        inputs = {name: value.tensor_split(2)[half] for name, value in case.pair.items() if name != "labels"}
        out = case.model(**inputs, use_cache=False, output_hidden_states=True)
        logits.append(out.logits.float()[:, :-1][answers])
        hidden.append(out.hidden_states[-1][:, :-1][answers])
    target = labels[:, 1:][answers]
    apart = objective.separation(objective.js(logits[0], logits[1]), d.margin)
    band = objective.entropy_band(objective.entropy(logits[0]), d.entropy_low, d.entropy_high)
    terms = (
        objective.token_nll(logits[0], target)
        + d.view_weight * objective.token_nll(logits[1], target)
        + d.output_weight * apart
        + d.feature_weight * objective.feature_separation(hidden[0], hidden[1], d.bound)
        + d.entropy_weight * band
    )
    return terms.mean()


def paper(case: Case) -> Tensor:
    return CrossView().step(case.model, case.pair).total.mean()


def paper_still(case: Case) -> Tensor:
    return CrossView(stop_gradient=True).step(case.model, case.pair).total.mean()


def dropped(case: Case, still: bool) -> Tensor:
    """The view gives the language model a quarter of the image tokens."""
    order = torch.rand(case.single["input_ids"].shape, device=case.single["input_ids"].device)
    defense = CrossView(view="drop", ratio=0.75, stop_gradient=still)
    return defense.step(case.model, {**case.single, "order": order}).total.mean()


def default(case: Case) -> Tensor:
    """With every twentieth row flagged, at least one."""
    labels = case.single["labels"].clone()
    flagged_tokens = torch.zeros_like(labels, dtype=torch.bool)
    for row in range(0, len(labels), 20):
        first = int((labels[row] != IGNORE).nonzero()[0])
        flagged_tokens[row, first] = True
        labels[row, first + 1 :] = IGNORE
    return (
        UnlikelihoodStep(5.0)
        .step(case.model, {**case.single, "labels": labels, "flagged_tokens": flagged_tokens})
        .total.mean()
    )


@torch.no_grad()
def scoring_pass(case: Case) -> None:
    answer_losses(case.model, case.single, lambda a, _: ({"nll": objective.token_nll(a.logits, a.target)}, {}))


STEPS: dict[str, Callable[[Case], Tensor]] = {
    PLAIN: plain,
    "plain, the host's own": stock,
    "naive two-view": naive,
    "paper": paper,
    "paper, stop-gradient": paper_still,
    "paper, 3/4 dropped": lambda case: dropped(case, still=False),
    "paper, stop-gradient, 3/4 dropped": lambda case: dropped(case, still=True),
    "default": default,
}


# --- cases -------------------------------------------------------------------------------------------


def embedded() -> Case:
    """The embedded LLaVA as `untrigger quickstart` trains it: 16 rows of easy-VQA."""
    loaded = load("llava")
    rows = Rows(load_data("easy-vqa", "dev", "train", 16, 100))
    paired = CrossView().paired
    assert paired is not None
    collate = ChatCollator(loaded.processor)
    batch = [rows[i] for i in range(16)]
    model = add_lora(cast(Any, loaded.model), rank=16)
    return Case("embedded LLaVA", model, collate(batch), PairCollator(collate, paired[0], 0)(batch))


def synthetic(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    images = -(-shape.visual // 576)
    side = int((shape.visual / images) ** 0.5)
    image, heads, large = shape.vocabulary - 1, max(1, shape.width // 64), shape.width >= 2048
    vision = CLIPVisionConfig(
        image_size=14 * side,
        patch_size=14,
        hidden_size=1024 if large else 64,
        intermediate_size=4096 if large else 128,
        num_hidden_layers=24 if large else 2,
        num_attention_heads=16 if large else 2,
    )
    text = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=round(shape.mlp * shape.width),
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // shape.shared,
    )
    parts: dict[str, Any] = {"vision_config": vision, "text_config": text, "image_token_id": image}
    config = LlavaConfig(image_seq_length=side * side, **parts)
    with torch.device(device):
        model = cast(Any, LlavaForConditionalGeneration(config)).to(dtype)
    ids = torch.randint(5, shape.vocabulary - 1, (shape.batch, images * side * side + shape.prompt + shape.answer))
    ids[:, : images * side * side] = image
    labels = ids.clone()
    labels[:, : -shape.answer] = IGNORE
    pixels = torch.randn(2 * shape.batch * images, 3, 14 * side, 14 * side, dtype=dtype)
    pair = {
        "input_ids": ids.repeat(2, 1),
        "attention_mask": torch.ones_like(ids).repeat(2, 1),
        "pixel_values": pixels,
        "labels": torch.cat([labels, torch.full_like(labels, IGNORE)]),
    }
    pair = {name: value.to(device) for name, value in pair.items()}
    single = {name: value.tensor_split(2)[0] for name, value in pair.items()}
    return Case(shape.name, add_lora(model, rank=16), single, pair)


# --- measuring ---------------------------------------------------------------------------------------


def measured(case: Case, rounds: int) -> list[dict[str, Any]]:
    """A row for each variant, and one for a whole run of ``default`` with its scoring passes spread over the steps."""
    case.model.train()
    weights = [parameter for parameter in case.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    cuda = weights[0].is_cuda

    def time_step(step: Callable[[Case], Any]) -> float:
        started = time.perf_counter()
        if isinstance(loss := step(case), Tensor):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    timed = STEPS | {"scoring": scoring_pass}
    for step in timed.values():
        time_step(step)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, step in timed.items():
            seconds[name].append(time_step(step))
    seconds["default, whole run at most"] = [
        step + 2 / EPOCHS * scored for step, scored in zip(seconds["default"], seconds.pop("scoring"), strict=True)
    ]
    counted = {name: count(lambda step=step: time_step(step), case.model) for name, step in timed.items()}
    scored = counted.pop("scoring")
    whole = (x + 2 / EPOCHS * y for x, y in zip(counted["default"][1:], scored[1:], strict=True))
    # a scoring pass stores no activations: it does not raise the peak
    counted["default, whole run at most"] = Counts(counted["default"].peak, *whole)
    tokens = case.single["input_ids"].numel()
    return [
        {"shape": case.name, "variant": name, **ratios(seconds[name], seconds[PLAIN])}
        | {
            f"{what}_ratio": round(own / plain_count, 4)
            for what, own, plain_count in compared(counted[name], counted[PLAIN])
        }
        | {"peak_bytes": counted[name].peak}
        | {"tokens_per_second": round(tokens / statistics.median(seconds[name]))}
        for name in seconds
    ]


def ratios(seconds: list[float], plain: list[float]) -> dict[str, float]:
    """The ratio in each round: median and quartiles."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(seconds, plain, strict=True)], n=4)
    figures = {"time_ratio": middle, "time_low": low, "time_high": high, "seconds": statistics.median(seconds)}
    return {name: round(value, 4) for name, value in figures.items()}


class Counts(NamedTuple):
    """Counts of one step.

    Attributes:
        peak: highest number of bytes in use, weights included.
        flops: multiplications and additions.
        moved: bytes read and written by unfused operations: the cost of a step that memory bandwidth limits.
    """

    peak: float
    flops: float
    moved: float


def compared(own: Counts, plain: Counts) -> Iterator[tuple[str, float, float]]:
    return zip(RATIOS, own, plain, strict=True)


def count(run: Callable[[], Any], model: nn.Module) -> Counts:
    held, flops = MemoryTracker(), FlopCounterMode(display=False)
    for parameter in model.parameters():
        held.note(parameter)
    if cuda := torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        run()
    with held, flops:
        run()
    return Counts(torch.cuda.max_memory_allocated() if cuda else held.peak, flops.get_total_flops(), held.moved)


def shapes(quick: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    yield "embedded", embedded
    if quick:
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for along, sizes in GROWTH.items():
        for shape in sizes:
            yield along, lambda shape=shape: synthetic(shape, device, dtype)
    for shape in SEVEN_B if device == "cuda" else []:
        yield "7B", lambda shape=shape: synthetic(shape, device, dtype)


# --- output ------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> Table:
    result = Table(title="over plain LoRA fine-tuning: medians (quartiles)")
    for name in ("shape", "variant"):
        result.add_column(name)
    for name in ("time", "memory", "FLOPs", "bytes moved", "s a step", "tokens/s"):
        result.add_column(name, justify="right")
    for row in rows:
        time_ratio = f"{row['time_ratio']:.2f} ({row['time_low']:.2f} to {row['time_high']:.2f})"
        counts = (f"{row[f'{what}_ratio']:.2f}" for what in RATIOS)
        pace = (f"{row['seconds']:.3f}", f"{row['tokens_per_second']:,}")
        result.add_row(row["shape"], row["variant"], time_ratio, *counts, *pace)
    return result


def plot(rows: list[dict[str, Any]]) -> str:
    """An HTML page with a chart for each dimension of GROWTH."""
    from plotly.subplots import make_subplots

    ways = list(dict.fromkeys(row["along"] for row in rows))
    figure = make_subplots(
        rows=len(ways), cols=2, subplot_titles=[f"{w}: {what}" for w in ways for what in ("time", "memory")]
    )
    for at, way in enumerate(ways, 1):
        for name in dict.fromkeys(row["variant"] for row in rows):
            line = [row for row in rows if row["along"] == way and row["variant"] == name]
            for column, what in enumerate(("time_ratio", "memory_ratio"), 1):
                figure.add_bar(
                    x=[row["shape"] for row in line], y=[row[what] for row in line], name=name, row=at, col=column,
                    legendgroup=name, showlegend=at == column == 1,
                )  # fmt: skip
    figure.update_layout(height=340 * len(ways), title="Time and peak memory of a step, over plain LoRA fine-tuning")
    return figure.to_html(include_plotlyjs=True)


def main(
    out: Annotated[
        Path, typer.Option("--json", help="Write the figures to this file, and charts to an .html file of that name.")
    ],
    quick: Annotated[bool, typer.Option("--quick", help="Measure only the embedded model, in few rounds.")] = False,
    rounds: Annotated[int, typer.Option(help="Number of steps of each variant.")] = 15,
) -> None:
    """Measure time and peak memory of a step under each defense, relative to plain LoRA fine-tuning."""
    all_rows: list[dict[str, Any]] = []
    for along, make in shapes(quick):
        rows = measured(make(), 5 if quick else rounds)
        all_rows += [{"along": along, **row} for row in rows]
        Console().print(table(rows))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    environment = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    all_shapes = [asdict(shape) for sizes in GROWTH.values() for shape in sizes] if not quick else []
    write_text(out, json.dumps({"made": environment, "shapes": all_shapes, "rows": all_rows}, indent=1) + "\n")
    if not quick:
        write_text(out.with_suffix(".html"), plot(all_rows))


if __name__ == "__main__":
    typer.run(main)
