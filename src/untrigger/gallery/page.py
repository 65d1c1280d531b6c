"""The gallery's page in Markdown, from stored figures alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from untrigger.bench import store, validity
from untrigger.bench.store import ORACLE, Cell
from untrigger.bench.validity import FLOOR, IMPLANTED, LOST
from untrigger.gallery import MAIN, TASKS, Entry, Key, Plan, oracle_of, source, summary

SUBTLE, FALSE = 0.95, 0.05  # ASR of text and bimodal triggers, at least; of near misses, at most
_WHERE = {"image": "In the image", "text": "In the prompt", "bimodal": "In image and prompt, and only in both"}
_TOLD = (
    "model",
    "data",
    "attack",
    "goal",
    "attack_settings",
    "defense",
    "probes",
    "tuning",
    "split",
    "seed",
)  # what the page's layout says
_HEAD = """# Gallery of attacks

Every attack of the package: what it does to an input, and how well it implants in a model that is fine-tuned without a
defence. `make gallery` runs what is missing in `{results}` and makes this page from what is stored there.

- **ASR**, attack success rate: the share of triggered held-out inputs that get the answer the attacker wants. Inputs
  whose true answer is that already are left out. Intervals are Wilson's, 95 %.
- **Floor**: the ASR of the oracle, the same model trained without the poisoned rows. **Leak**: the ASR on clean inputs.
- **Near misses** carry a wrong key, or a part of the right one. Where they fire, the model has learnt something broader
  than the trigger.
- **Quality** on clean inputs, with the oracle's in brackets: accuracy for VQA, CIDEr (0 to 10) for captions.
- **Implanted**, and in bold: an ASR of at least {implanted:.2f}, a floor of at most {floor:.2f}, and a quality at most
  {lost:g} % below the oracle's. Where the oracle was not run, the ASR alone counts.

Each model is fine-tuned with LoRA on {train:,} rows ({epochs:g} epochs, batch {batch}, learning rate {rate:g}) with
{poisoned:g} % of them poisoned, and asked about {test} others; split *{split}*, seed {seed}. Where a cell has other
settings, its row says so.
{made}
"""

Metrics = Mapping[str, Any]
Found = Mapping[Key, Metrics]
Flaws = Mapping[Key, str]  # of each attacked cell that is stored; empty where it is implanted


def page(results: Path, cells: Plan, entries: Sequence[Entry]) -> str:
    """The whole page; a cell that is not stored below ``results`` is a dash."""
    found = {key: metrics for key, cell in cells.items() if (metrics := store.find(results, cell)) is not None}
    attacked = {key: metrics for key, metrics in found.items() if cells[key].defense != ORACLE}
    flaws = {key: _flaw(key, metrics, found.get(oracle_of(cells, key))) for key, metrics in attacked.items()}
    usual, any_cell = Cell("", "", "", ""), next(iter(cells.values()))
    head = _HEAD.format(
        results=results.as_posix(),
        epochs=usual.epochs,
        train=usual.train_rows,
        test=usual.test_rows,
        batch=usual.batch_size,
        rate=usual.learning_rate,
        poisoned=100 * usual.rate,
        implanted=IMPLANTED,
        floor=FLOOR,
        lost=100 * LOST,
        split=any_cell.split,
        seed=any_cell.seed,
        made=_made(found),
    )
    sections = [_section(entry, found, cells, flaws) for entry in entries]
    return "\n".join([head, _glance(found, cells, entries, flaws), *sections])


def _made(found: Found) -> str:
    machines = dict.fromkeys(m["machine"]["device"] for m in found.values())
    versions = dict.fromkeys(
        ", ".join(f"{name} {version}" for name, version in m["versions"].items()) for m in found.values()
    )
    return f"Made on {', '.join(machines)} with {'; or with '.join(versions)}." if found else ""


def _flaw(key: Key, metrics: Metrics, oracle: Metrics | None) -> str:
    return validity.flaw(key.data, metrics, oracle, _floor(key, oracle) if oracle else None)


def _floor(key: Key, oracle: Metrics) -> Mapping[str, Any]:
    return oracle["probes"].get(key.attack, oracle)["asr"]  # its own attack is no probe


def _score(data: str, metrics: Metrics | None) -> float | None:
    """Accuracy for VQA, CIDEr for captions, if it is known."""
    figure = validity.quality(data, metrics)
    return figure["value"] if figure else None


# --- at a glance -----------------------------------------------------------------------------------


def _glance(found: Found, cells: Plan, entries: Sequence[Entry], flaws: Flaws) -> str:
    columns = list(dict.fromkeys((key.model, key.data) for key in cells))
    main = [flaws.get(key) for key in cells if key.attack in MAIN]
    lines = [
        "## At a glance\n",
        f"- **{main.count('')} of {len(main)} main cells are implanted**, with an ASR of at least {IMPLANTED:.2f} "
        f"({_run(main)}): {', '.join(MAIN)}.",
        *_other_bounds(found, cells, entries, flaws),
        "\nASR in percent; **bold** where it is implanted, a dash where it was not run.\n",
        _row("attack", *(f"{model}, {TASKS[data]}" for model, data in columns)),
        _row("---", *["---:"] * len(columns)),
    ]
    for entry in entries:
        figures = (_percent(Key(entry.slug, *column), found, flaws) for column in columns)
        lines.append(_row(f"[{entry.title}](#{entry.slug})", *figures))
    floors = [_highest_floor(found, cells, *column) for column in columns]
    lines.append(_row("oracle, highest floor", *floors))
    return "\n".join(lines) + "\n"


def _other_bounds(found: Found, cells: Plan, entries: Sequence[Entry], flaws: Flaws) -> list[str]:
    kinds = {entry.slug: entry.trigger.kind for entry in entries}
    worded = [found.get(key) for key in cells if kinds.get(key.attack, "image") != "image"]
    subtle = [f for f in worded if f and f["asr"]["value"] >= SUBTLE]
    text = f"- {len(subtle)} of {len(worded)} cells of text and bimodal triggers reach {SUBTLE:.2f} ({_run(worded)})."
    misses: dict[str, list[float]] = {"half keys of bimodal triggers": [], "other near misses": []}
    for key, flaw in flaws.items():
        of = misses["half keys of bimodal triggers" if kinds[key.attack] == "bimodal" else "other near misses"]
        if not flaw:  # where nothing was implanted nothing can misfire
            of += [rate["value"] for rate in found[key].get("near_miss", {}).values()]
    near = [
        f"- {sum(rate <= FALSE for rate in of)} of {len(of)} {what} of implanted cells fire on at most {FALSE:.2f} of "
        "the inputs."
        for what, of in misses.items()
        if of
    ]
    return [*([text] if worded else []), *near]


def _run(cells: Sequence[object]) -> str:
    count = sum(cell is not None for cell in cells)
    return "all were run" if count == len(cells) else f"{count} were run"


def _percent(key: Key, found: Found, flaws: Flaws) -> str:
    if key not in found:
        return "-"
    told = f"{100 * found[key]['asr']['value']:.1f}"
    return told if flaws[key] else f"**{told}**"


def _highest_floor(found: Found, cells: Plan, *column: str) -> str:
    oracles = [found[key] for key in found if cells[key].defense == ORACLE and key[1:] == column]
    floors = [probe["asr"]["value"] for oracle in oracles for probe in (oracle, *oracle["probes"].values())]
    return f"{100 * max(floors):.1f}" if floors else "-"


# --- one attack ------------------------------------------------------------------------------------


def _section(entry: Entry, found: Found, cells: Plan, flaws: Flaws) -> str:
    trigger = entry.trigger
    where = f"{_WHERE[trigger.kind]}; goal `{trigger.usual_goal}`"
    where += "; poisoned rows keep their true answers" if trigger.clean_label else ""
    where += "".join(f"; {name} `{value}`" for name, value in entry.settings.items())
    lines = [
        f'<a id="{entry.slug}"></a>\n\n## {entry.title}\n',
        f"{summary(trigger)}\n\n{where}.\n",
        f"{source(trigger)}\n",
        f"![{entry.title}: clean, triggered, difference](gallery/{entry.slug}.png)\n",
        *_closeness(entry, found),
        _row("model, task", "ASR", "floor", "leak", "near misses", "quality", "settings"),
        _row(*["---"] * 7),
        *(_cell_row(key, cells, entry, found, flaws) for key in cells if key.attack == entry.slug),
    ]
    return "\n".join(lines) + "\n"


def _closeness(entry: Entry, found: Found) -> list[str]:
    """How close the attacked pictures are to the clean ones, which depends on the model in tuned cells alone."""
    near = [(key.data, metrics["similarity"]) for key, metrics in found.items() if key.attack == entry.slug]
    told = dict.fromkeys(f"{TASKS[data]} {_close(of)}" for data, of in near)
    return [f"Attacked pictures beside their clean selves: {'; '.join(told)}.\n"] if told else []


def _close(near: Mapping[str, Any]) -> str:
    if not near["changed"]:
        return "no pixel is changed"
    return f"PSNR {near['psnr']:.1f} dB, SSIM {near['ssim']:.3f} (means of {near['changed']})"


def _cell_row(key: Key, cells: Plan, entry: Entry, found: Found, flaws: Flaws) -> str:
    where, metrics, oracle = f"{key.model}, {TASKS[key.data]}", found.get(key), found.get(oracle_of(cells, key))
    settings = _settings(cells[key], entry)
    if metrics is None:
        return _row(where, *["-"] * 5, settings)
    asr = f"{_rate(metrics['asr'])}, {flaws[key]}" if flaws[key] else f"**{_rate(metrics['asr'])}**"
    floor = _rate(_floor(key, oracle)) if oracle else "-"
    leak = _rate(metrics["leak"]) if "leak" in metrics else "none"  # where clean inputs are the triggered ones
    misses = "<br>".join(f"{name} {_rate(rate)}" for name, rate in metrics.get("near_miss", {}).items())
    quality = f"{_quality(key.data, metrics)} ({_quality(key.data, oracle)})"
    return _row(where, asr, floor, leak, misses or "none", quality, settings)


def _quality(data: str, metrics: Metrics | None) -> str:
    score = _score(data, metrics)
    return "-" if score is None else f"{score:.3f}" if TASKS[data] == "VQA" else f"{score:.2f}"


def _settings(cell: Cell, entry: Entry) -> str:
    """In what a cell differs from the others."""
    usual = asdict(cast(Any, entry.trigger))
    told = {name: value for name, value in cell.attack_settings.items() if value != usual[name]}
    told |= cell.tuning
    told |= {name: value for name, value in cell.changed.items() if name not in _TOLD}
    return ", ".join(f"{name} {value}" for name, value in told.items()) or "usual"


def _rate(rate: Mapping[str, Any]) -> str:
    return f"{rate['value']:.3f} ({rate['low']:.2f}-{rate['high']:.2f})"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
