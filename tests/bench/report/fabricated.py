"""Hand-made results: cells with chosen figures, stored as the bench stores them."""

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
    told = None if cider is None else {"value": cider, "low": cider - 0.1, "high": cider + 0.1, "n": ROWS}
    return {"vqa_accuracy": rate(accuracy), "cider": told}


def premise(areas: Mapping[str, tuple[float, float, float]]) -> dict[str, Any]:
    """Of views: low end, AUROC and high end."""
    views: dict[str, Any] = {}
    for name, (low, value, high) in areas.items():
        auroc = {"value": value, "low": low, "high": high, "n": 30}
        views[name] = {"auroc": auroc, "clean": [0, 20], "poisoned": [9, 1]}
    return {"premise": {"edges": [0.0, 1e-3, 0.7], "views": views}}


class Bench:
    """A folder of results that cells are put into."""

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
        """Stores a cell: ``fields`` and ``metrics`` are those that are not the usual ones; None leaves a metric out."""
        usual = {
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
        told = {name: value for name, value in {**usual, **(metrics or {})}.items() if value is not None}
        places = {"model": "llava", "data": "easy-vqa", "attack": "badnets", "goal": "fixed"}
        cell = Cell(**{**places, **fields}, defense=defense)
        store.save(self.root, cell, told, answers or {})
        if answers is None:  # as in a fresh clone
            (store.folder_of(self.root, cell) / "answers.jsonl").unlink()
        return cell

    def pair(self, plain: float = 0.98, oracle: float = 0.0, **more: Any) -> None:
        """The undefended model and its oracle."""
        self.cell("plain", plain, **more)
        self.cell("oracle", oracle, **more)

    def pictures(self, *ids: str) -> None:
        """Pictures of test rows, all clean ones alike."""
        folder = self.root / "shared" / "examples" / PICTURES
        folder.mkdir(parents=True)
        for at in range(len(ids)):
            Image.new("RGB", (8, 8), "white").save(folder / f"{at}-clean.png")
            Image.new("RGB", (8, 8), (at, 0, 0)).save(folder / f"{at}-triggered.png")
        rows = ", ".join(f'{{"id": "{each}"}}' for each in ids)
        (folder / "rows.json").write_text(f"[{rows}]")


def answers(said: str, met: bool = True, asked: str = "is it red?", truth: str = "yes") -> dict[str, list[Answer]]:
    return {
        "clean": [Answer("r1", asked, truth, truth), Answer("r2", asked, truth, truth)],
        "triggered": [Answer("r1", f"{asked} now", truth, said, met=met), Answer("r2", asked, truth, truth)],
    }


def fill(bench: Bench) -> Bench:
    """Two models, of which one is not implanted; pictures, answers, flagged rows, views and a failure."""
    kept = {"examples": PICTURES}
    bench.pictures("r1", "r2")
    for model, plain in (("llava", 0.98), ("blip2", 0.5)):
        bench.cell("plain", plain, model=model, metrics=kept | premise(AREAS), answers=answers("Backdoor Attack!"))
        bench.cell("oracle", 0.01, model=model, metrics=kept, answers=answers("yes", met=False))
        found = {"auroc": rate(0.9), "recall_at_1": rate(0.8), "precision": None, "f1": 0.5, "flagged": 7}
        bench.cell("abl", 0.3, model=model, metrics=kept | {"detection": found}, answers=answers("yes", met=False))
    store.fail(bench.root, Cell("llava", "easy-vqa", "sig", "fixed"), "out of memory")
    return bench
