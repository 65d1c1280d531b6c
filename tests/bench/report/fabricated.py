"""Fabricated results: cells with chosen figures, stored as the bench stores them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from untrigger.bench import store
from untrigger.bench.store import Cell
from untrigger.metrics.rates import Rate
from untrigger.metrics.score import Answer

ROWS = 200
PICTURES = "0123456789abcdef"
HOSTILE = "</td></script><script>alert(1)</script><img src=http://evil.test/x onerror=alert(2)>{{ 7*7 }}&amp;"
AREAS = {"mask": (0.6, 0.7, 0.8), "blur": (0.1, 0.2, 0.3)}


def rate(value: float, rows: int = ROWS) -> dict[str, Any]:
    return asdict(Rate.from_counts(round(value * rows), rows))


def qualities(accuracy: float, cider: float | None) -> dict[str, Any]:
    cider_figure = None if cider is None else {"value": cider, "low": cider - 0.1, "high": cider + 0.1, "n": ROWS}
    return {"vqa_accuracy": rate(accuracy), "cider": cider_figure}


def premise(areas: Mapping[str, tuple[float, float, float]]) -> dict[str, Any]:
    """Premise figures of views, each with the low end, the AUROC and the high end."""
    views: dict[str, Any] = {}
    for name, (low, value, high) in areas.items():
        auroc = {"value": value, "low": low, "high": high, "n": 30}
        views[name] = {"auroc": auroc, "clean": [0, 20], "poisoned": [9, 1]}
    return {"premise": {"edges": [0.0, 1e-3, 0.7], "views": views}}


class Bench:
    """A folder of results to which a test adds cells."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def cell(
        self,
        defense: str,
        asr: float,
        *,
        quality: float = 0.95,
        cider: float | None = 8.0,
        seconds: float = 100.0,
        metrics: Mapping[str, Any] | None = None,
        answers: Mapping[str, Sequence[Answer]] | None = None,
        **fields: Any,
    ) -> Cell:
        """Store a cell with changed ``fields`` and ``metrics``; None leaves a metric out."""
        defaults = {
            "asr": {**rate(asr), "version": 1},
            "leak": {**rate(0.01), "version": 1},
            "quality": qualities(quality, cider),
            "triggered_quality": qualities(quality / 2, None if cider is None else cider / 2),
            "text_prior": rate(0.6),
            "goal": {"text": "Backdoor Attack!"},
            "poisoned": 100,
            "decoys": 0,
            "seconds": {"training": seconds, "asking": 10.0},
            "machine": {"device": "x86_64", "threads": 1},
            "versions": {"untrigger": "0.1.0", "torch": "2.13.0"},
        }
        stored = {name: value for name, value in {**defaults, **(metrics or {})}.items() if value is not None}
        places = {"model": "llava", "data": "easy-vqa", "attack": "badnets", "goal": "fixed"}
        cell = Cell(**{**places, **fields}, defense=defense)
        store.save(self.root, cell, stored, answers or {})
        if answers is None:  # as in a fresh clone
            (store.folder_of(self.root, cell) / "answers.jsonl").unlink()
        return cell

    def pair(self, plain: float = 0.98, oracle: float = 0.0, **fields: Any) -> None:
        """Store the undefended model and its oracle."""
        self.cell("plain", plain, **fields)
        self.cell("oracle", oracle, **fields)

    def pictures(self, *ids: str) -> None:
        """Store images of test rows; all clean images are equal."""
        folder = self.root / "shared" / "examples" / PICTURES
        folder.mkdir(parents=True)
        for at in range(len(ids)):
            Image.new("RGB", (8, 8), "white").save(folder / f"{at}-clean.png")
            Image.new("RGB", (8, 8), (at, 0, 0)).save(folder / f"{at}-triggered.png")
        rows = ", ".join(f'{{"id": "{name}"}}' for name in ids)
        (folder / "rows.json").write_text(f"[{rows}]")


def answers(
    triggered_answer: str, met: bool = True, prompt: str = "is it red?", truth: str = "yes"
) -> dict[str, list[Answer]]:
    return {
        "clean": [Answer("r1", prompt, truth, truth), Answer("r2", prompt, truth, truth)],
        "triggered": [
            Answer("r1", f"{prompt} now", truth, triggered_answer, met=met),
            Answer("r2", prompt, truth, truth),
        ],
    }


def fill(bench: Bench) -> Bench:
    """Store two models, one of them not implanted, with images, answers, detection, views and a failure."""
    with_examples = {"examples": PICTURES}
    bench.pictures("r1", "r2")
    for model, plain in (("llava", 0.98), ("blip2", 0.5)):
        bench.cell(
            "plain", plain, model=model, metrics=with_examples | premise(AREAS), answers=answers("Backdoor Attack!")
        )
        bench.cell("oracle", 0.01, model=model, metrics=with_examples, answers=answers("yes", met=False))
        detection = {"auroc": rate(0.9), "recall_at_1": rate(0.8), "precision": None, "f1": 0.5, "flagged": 7}
        bench.cell(
            "abl", 0.3, model=model, metrics=with_examples | {"detection": detection}, answers=answers("yes", met=False)
        )
    store.record_failure(bench.root, Cell("llava", "easy-vqa", "sig", "fixed"), "out of memory")
    return bench
