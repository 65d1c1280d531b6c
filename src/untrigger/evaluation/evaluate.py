"""Evaluation of a model on held-out data, with or without an attack; every answer is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.jupyter import JupyterMixin
from rich.table import Table

from untrigger.dataframes import frame
from untrigger.errors import InputError
from untrigger.files import write_text
from untrigger.metrics.score import Answer, score
from untrigger.models.generate import answers
from untrigger.models.loading import LoadedModel, load, to_accelerator
from untrigger.models.prefix_cache import cache_image_features
from untrigger.poisoning.goals import Goal
from untrigger.poisoning.poison import Attack, stamped
from untrigger.poisoning.stamping import blamed
from untrigger.progress import tracked
from untrigger.rows.images import pixels_sha256, same_image
from untrigger.rows.sample import IMAGE_TAG, LazyRows, Sample, check_rows

if TYPE_CHECKING:
    from pandas import DataFrame

ANSWERS, METRICS = "answers.jsonl", "metrics.json"


@dataclass(frozen=True, repr=False)
class Evaluation(JupyterMixin):
    """Stored answers under each condition, near misses by their names, and the figures computed from them.

    Attributes:
        untouched: the triggered inputs are clean inputs themselves, as those of a clean-label attack may be.
        attack: name and settings of the attack and of its goal, and the seed; None where there was no attack.
    """

    clean: list[Answer]
    triggered: list[Answer]
    wrong_image: list[Answer]
    near_misses: Mapping[str, list[Answer]] = field(default_factory=dict[str, list[Answer]])
    untouched: bool = False
    attack: Mapping[str, object] | None = None

    @cached_property
    def figures(self) -> dict[str, Any]:
        return score(self.clean, self.triggered, self.wrong_image, self.near_misses, untouched=self.untouched)

    @property
    def conditions(self) -> dict[str, list[Answer]]:
        """All answers by their condition's name: ``clean``, ``triggered``, ``wrong_image``, ``near_miss: NAME``."""
        near = {f"near_miss: {name}": answers for name, answers in self.near_misses.items()}
        return {"clean": self.clean, "triggered": self.triggered, "wrong_image": self.wrong_image, **near}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A dictionary for each answer: its ``condition``, and the fields of `untrigger.metrics.score.Answer`."""
        return [{"condition": name, **asdict(a)} for name, part in self.conditions.items() for a in part]

    def to_pandas(self) -> DataFrame:
        """The same (`rows`) as a frame."""
        return frame(self.rows)

    def write(self, out: Path | str) -> None:
        """``answers.jsonl``, a row per answer, and ``metrics.json``, attack and figures; each whole or not at all."""
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / ANSWERS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows))
        made = {"attack": self.attack} if self.attack else {}
        write_text(out / METRICS, json.dumps({**made, **self.figures}, indent=2, default=str) + "\n")

    def __repr__(self) -> str:
        count = sum(map(len, self.conditions.values()))
        figures = dict(_flat(self.figures)) if self.clean else {}
        told = (f"{name} {_brief(figure)}" for key, name in _HEADLINE.items() if (figure := figures.get(key)))
        return "; ".join([f"Evaluation: {count:,} answers", *told])

    def __rich__(self) -> Table:
        table = Table("figure", "value", "95 % interval", "n")
        for name, value in _flat(self.figures):
            if value is None:
                table.add_row(name, "not available", _LACKS.get(name.rpartition(" ")[2], ""), "")
            else:
                interval = f"{value['low']:.3f} to {value['high']:.3f}"
                table.add_row(name, f"{value['value']:.3f}", interval, str(value["n"]))
        return table


_LACKS = {
    "meteor": "needs WordNet: python -m nltk.downloader wordnet",
    "cider": "needs references that differ",
}
_HEADLINE = {"asr": "attack success", "leak": "leak", "vqa_accuracy": "accuracy", "cider": "CIDEr"}


def _brief(figure: Mapping[str, Any]) -> str:
    return f"{figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"


def _flat(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any] | None]]:
    """Each figure under one name, ``triggered vqa_accuracy``; None where its data is not at hand."""
    for name, value in figures.items():
        if value is None or (isinstance(value, Mapping) and "value" in value):
            yield prefix + name, value
        elif isinstance(value, Mapping):
            yield from _flat(value, "" if name == "quality" else f"{name.removesuffix('_quality')} ")


def evaluate(
    model: LoadedModel | str | Path,
    data: Sequence[Sample],
    *,
    attack: Attack | None = None,
    seed: int = 0,
    wrong_image_control: bool = False,
    title: str = "evaluating",
) -> Evaluation:
    """Ask the model every sample's last question, on clean and, given an attack, on triggered inputs and near misses.

    The model is a loaded one, asked where it is, or what `untrigger.load` takes, asked on the accelerator if there is
    one. With ``wrong_image_control`` it is also asked with another row's image: a model that does as well
    there does not look.

    Raises:
        InputError: there are no rows, or they are no samples; no row that shows an image and suits the goal has a true
            answer other than the attacker's: nothing to attack; or the trigger fails or breaks its promises.
    """
    check_rows(data)
    if not isinstance(attack, Attack | None):
        raise InputError("evaluate: attack is no Attack; give untrigger.Attack(trigger, goal)")
    loaded = to_accelerator(load(model)) if isinstance(model, str | Path) else model
    goal, told = None, None
    stamps, near = LazyRows((), data.__getitem__), dict[str, LazyRows]()
    if attack:
        goal, stamps, near = attack.goal, stamped(data, attack, seed), _near_misses(data, attack, seed)
        told = {"name": attack.name, "settings": attack.settings}
        told |= {"goal": goal.name, "goal_settings": attack.goal_settings, "seed": seed}
        if all(goal.met(sample.messages[-1].text, sample) for sample in map(data.__getitem__, stamps.numbers)):
            raise InputError(
                "evaluate: no row can show an attack: none has an image and a true answer that the goal would change; "
                "give other rows or another --goal-text"
            )
    with cache_image_features(loaded.model):
        alike = _alike(data)
        clean = _ask(loaded, LazyRows(range(len(data)), data.__getitem__), alike, goal, f"{title}, clean")
        kept = _untouched(data, stamps) if attack and attack.trigger.clean_label else frozenset[int]()
        changed = LazyRows([row for row in stamps.numbers if row not in kept], stamps.make)
        fresh = iter(_ask(loaded, changed, alike, goal, f"{title}, triggered") if changed else ())
        triggered = [clean[row] if row in kept else next(fresh) for row in stamps.numbers]
        misses = {name: _ask(loaded, rows, alike, goal, f"{title}, {name}") for name, rows in near.items()}
        blind = _ask(loaded, wrong_images(data), alike, goal, f"{title}, wrong image") if wrong_image_control else []
    return Evaluation(clean, triggered, blind, misses, untouched=bool(triggered) and not changed, attack=told)


def _near_misses(data: Sequence[Sample], attack: Attack, seed: int) -> dict[str, LazyRows]:
    with blamed(f"attack {attack.name}", "near_misses"):
        stampers = dict(attack.trigger.near_misses())
    return {name: stamped(data, attack, seed, stamper) for name, stamper in stampers.items()}


def _untouched(data: Sequence[Sample], stamps: LazyRows) -> frozenset[int]:
    """The rows that stamping leaves as they are: what the model says to them is known."""
    pairs = ((row, made, data[row]) for row, made in zip(stamps.numbers, stamps, strict=True))
    return frozenset(
        row
        for row, made, clean in pairs
        if made.messages == clean.messages and all(map(same_image, made.images, clean.images))
    )


def wrong_images(samples: Sequence[Sample]) -> LazyRows:
    """The samples with the images of a row about halfway through the data, as many as their own and none of them.

    Lazy. A row without images, or for which there are no others, is left out: it would be asked as it is.
    """
    shown = [tuple(map(pixels_sha256, sample.images)) for sample in samples]
    count = len(shown)

    def partner(row: int) -> int | None:
        others = ((row + count // 2 + step) % count for step in range(count if shown[row] else 0))
        return next(
            (i for i in others if len(shown[i]) == len(shown[row]) and set(shown[i]).isdisjoint(shown[row])), None
        )

    partners = {row: other for row in range(count) if (other := partner(row)) is not None}
    return LazyRows(list(partners), lambda row: replace(samples[row], images=samples[partners[row]].images))


def _alike(data: Sequence[Sample]) -> list[int]:
    """For each row the first one that shows the same images."""
    first: dict[tuple[str, ...], int] = {}
    return [first.setdefault(tuple(map(pixels_sha256, sample.images)), row) for row, sample in enumerate(data)]


def _ask(loaded: LoadedModel, rows: LazyRows, alike: Sequence[int], goal: Goal | None, title: str) -> list[Answer]:
    """The answer to each of ``rows``; those that stem from rows with the same images are asked next to each other."""
    asked: dict[int, Sample] = {}  # without their images, which need not all fit into memory

    def make(at: int) -> Sample:
        made = rows[at]
        asked[at] = replace(made, images=())
        return made

    order = sorted(range(len(rows)), key=lambda at: alike[rows.numbers[at]])
    said = tracked(answers(loaded, LazyRows(order, make)), title, len(rows))
    told = {at: _stored(asked[at], text, goal) for at, text in zip(order, said, strict=True)}
    return [told[at] for at in range(len(rows))]


def _stored(sample: Sample, text: str, goal: Goal | None) -> Answer:
    truth = sample.messages[-1].text
    prompt = next((m.text for m in reversed(sample.messages) if m.role == "user"), "")
    said = prompt.replace(IMAGE_TAG, "").strip(), truth, text
    if goal is None:
        return Answer(sample.id, *said)
    return Answer(sample.id, *said, goal.met(text, sample), goal.met(truth, sample), goal.applies(sample))
