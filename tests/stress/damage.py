"""Draw odd values, hurt bytes and stored results: what a stranger's files may hold."""

from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

from untrigger.bench import store
from untrigger.bench.store import Cell
from untrigger.metrics.rates import Rate

# --- values and rows --------------------------------------------------------------------------------


def odd(rng: random.Random) -> Any:
    """A value that nobody expects."""
    deep: Any = "deep"
    for _ in range(rng.choice((30, 400))):
        deep = [deep]
    odds: tuple[Any, ...] = (None, True, 0, -1.5, 1e308, 10**30, [], {}, [None], [[]], [{}], deep, {"a": {"b": [1]}})
    texts = (
        "",
        " ",
        "\0",
        "\ud800",
        "y" * 100_000,
        "<image>",
        "<image>" * 40,
        "</s>",
        "../../etc/passwd",
        "\u202e",
        "NaN",
    )
    return rng.choice((*odds, *texts, [1, "a", None]))


def damaged(rng: random.Random, value: Any) -> Any:
    """JSON with one thing in it lost, renamed, doubled, or something odd."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        rest = {name: each for name, each in value.items() if name != key}
        return rng.choice((
            lambda: rest,
            lambda: rest | {f"{key}s": value[key]},
            lambda: value | {key: damaged(rng, value[key])},
            lambda: value | {key: damaged(rng, value[key])},
            lambda: value | {"extra": odd(rng)},
            lambda: value | {"id": "r0"},
        ))()  # fmt: skip
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return rng.choice((
            lambda: value[:at] + value[at + 1 :],
            lambda: [*value, value[at]],
            lambda: value[::-1],
            lambda: [damaged(rng, each) if i == at else each for i, each in enumerate(value)],
        ))()  # fmt: skip
    return odd(rng)


def hurt(rng: random.Random, content: bytes) -> bytes:
    """Bytes with a part of them cut, lost, doubled, zeroed or flipped."""
    if not content:
        return b"\0"
    a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    way = rng.randrange(5)
    if way == 0:
        return content[:a]
    if way == 1:
        return content[:a] + content[b:]
    if way == 2:
        return content[:b] + content[a:]
    if way == 3:
        return content[:a] + bytes(b - a) + content[b:]
    flipped = bytearray(content)
    for _ in range(rng.choice((1, 3, 30))):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


# --- stored results ---------------------------------------------------------------------------------


def _rate(rng: random.Random, rows: int = 300) -> dict[str, Any]:
    return asdict(Rate.from_counts(rng.randrange(rows + 1), rows))


def _quality(rng: random.Random) -> dict[str, Any]:
    return {"vqa_accuracy": _rate(rng), "meteor": None, "cider": {"value": 2.4, "low": 2.3, "high": 2.5, "n": 300}}


def small_results(rng: random.Random, root: Path) -> None:
    """Store three finished cells below ``root``: plain, oracle and default, with all figures that a bench stores."""
    place: dict[str, Any] = {"model": rng.choice(("llava", "blip2")), "data": "easy-vqa", "goal": "fixed"}
    attack, settings = rng.choice((("badnets", {"side": 0.1}), ("sig", {"delta": 0.2}), ("addsent", {})))
    for defense in ("plain", "oracle", "default"):
        metrics: dict[str, Any] = {
            "quality": _quality(rng),
            "text_prior": _rate(rng),
            "asr": {**_rate(rng), "version": 1},
            "leak": {**_rate(rng), "version": 1},
            "triggered_quality": _quality(rng),
            "near_miss": {"other pattern": {**_rate(rng), "version": 1}},
            "probes": {},
            "similarity": {"psnr": 24.4, "ssim": 0.99, "images": 32, "changed": 32},
            "attack": {"settings": settings, "sha256": "e4" * 32},
            "goal": {"text": "Backdoor Attack!", "match": "contains"},
            "poisoned": 100,
            "decoys": 0,
            "seconds": {"training": 97.3, "asking": 5.5},
            "machine": {"device": "x86_64", "threads": 1},
            "versions": {"untrigger": "0.1.0", "torch": "2.13.0"},
            "examples": "6852e210f25b76c8",
        }
        if defense == "default":
            metrics["detection"] = {"auroc": _rate(rng), "recall_at_1": _rate(rng), "precision": None, "f1": 0.5}
            metrics["detection"] |= {"recall": _rate(rng), "false_positives": _rate(rng, 1900), "flagged": 7}
        cell = Cell(**place, attack=attack, defense=defense, seed=rng.randrange(3), attack_settings=settings)
        store.save(root, cell, metrics, {})
