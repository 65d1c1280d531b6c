"""Evaluation of a model on held-out rows, with or without an attack; every answer is stored."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.jupyter import JupyterMixin
from rich.markup import escape
from rich.table import Table

from untrigger.dataframes import frame
from untrigger.errors import InputError
from untrigger.files import write_text
from untrigger.metrics.captions import INSTALL, CaptionScores, missing_libraries
from untrigger.metrics.score import Answer, as_row, score
from untrigger.models.generate import answers
from untrigger.models.loading import LoadedModel, load, to_accelerator
from untrigger.models.prefix_cache import cache_image_features
from untrigger.poisoning.goals import Goal
from untrigger.poisoning.poison import Attack, stamped
from untrigger.poisoning.stamping import trigger_errors
from untrigger.progress import tracked
from untrigger.rows.images import pixels_sha256, same_image
from untrigger.rows.sample import IMAGE_TAG, LazyRows, Sample, check_rows

if TYPE_CHECKING:
    from pandas import DataFrame

ANSWERS, METRICS = "answers.jsonl", "metrics.json"


@dataclass(frozen=True, repr=False)
class Evaluation(JupyterMixin):
    """A model's answers under each condition, and the metrics computed from them.

    Attributes:
        clean: answers to the clean inputs, one for each row.
        triggered: answers to the triggered inputs; empty without an attack.
        wrong_image: answers to inputs that show another row's images; empty unless they were requested.
        near_misses: by the near miss's name, answers to inputs with a part of the trigger or a wrong one.
        inputs_unchanged: whether the trigger changes no input, as a clean-label attack may; then there is no leak.
        attack: name and settings of the attack and of its goal, and the seed; None where there was no attack.
    """

    clean: list[Answer]
    triggered: list[Answer]
    wrong_image: list[Answer]
    near_misses: Mapping[str, list[Answer]] = field(default_factory=dict[str, list[Answer]])
    inputs_unchanged: bool = False
    attack: Mapping[str, object] | None = None

    @cached_property
    def figures(self) -> dict[str, Any]:
        """The metrics, as in ``metrics.json`` (`untrigger.metrics.score.score`)."""
        return score(self.clean, self.triggered, self.wrong_image, self.near_misses, untouched=self.inputs_unchanged)

    @property
    def conditions(self) -> dict[str, list[Answer]]:
        """All answers by condition: ``clean``, ``triggered``, ``wrong_image``, ``near_miss: NAME``."""
        near = {f"near_miss: {name}": answers for name, answers in self.near_misses.items()}
        return {"clean": self.clean, "triggered": self.triggered, "wrong_image": self.wrong_image, **near}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A dictionary for each answer: its ``condition`` and the fields of `untrigger.metrics.score.Answer`."""
        return [{"condition": name, **as_row(a)} for name, part in self.conditions.items() for a in part]

    def to_pandas(self) -> DataFrame:
        """The answers (`rows`) as a frame."""
        return frame(self.rows)

    def write(self, out: Path | str) -> None:
        """Write ``answers.jsonl``, a line per answer, and ``metrics.json``; each appears complete or not at all."""
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / ANSWERS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows))
        attack = {"attack": self.attack} if self.attack else {}
        write_text(out / METRICS, json.dumps({**attack, **self.figures}, indent=2, default=str) + "\n")

    def __repr__(self) -> str:
        count = sum(map(len, self.conditions.values()))
        figures = dict(_flat(self.figures)) if self.clean else {}
        headline = (f"{name} {_brief(figure)}" for key, name in _HEADLINE.items() if (figure := figures.get(key)))
        return "; ".join([f"Evaluation: {count:,} answers", *headline])

    def __rich__(self) -> Table:
        table = Table("figure", "value", "95 % interval", "n")
        reasons = dict.fromkeys(_CAPTION_SCORES, f"needs {INSTALL}") if missing_libraries() else _MISSING
        for name, value in _flat(self.figures):
            if value is None:
                table.add_row(name, "not available", escape(reasons.get(name.rpartition(" ")[2], "")), "")
            else:
                interval = f"{value['low']:.3f} to {value['high']:.3f}"
                table.add_row(name, f"{value['value']:.3f}", interval, str(value["n"]))
        return table


_MISSING = {  # why a metric has no value
    "meteor": "needs WordNet: python -m nltk.downloader wordnet",
    "cider": "needs references that differ",
}
_CAPTION_SCORES = [each.name for each in fields(CaptionScores)]
_HEADLINE = {"asr": "attack success", "leak": "leak", "vqa_accuracy": "accuracy", "cider": "CIDEr"}


def _brief(figure: Mapping[str, Any]) -> str:
    return f"{figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"


def _flat(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any] | None]]:
    """Each metric under one name, such as ``triggered vqa_accuracy``; None where its data is missing."""
    for name, value in figures.items():
        if value is None or (isinstance(value, Mapping) and "value" in value):
            yield prefix + name, value
        elif isinstance(value, Mapping):
            yield from _flat(value, "" if name == "quality" else f"{name.removesuffix('_quality')} ")


def evaluate(
    model: LoadedModel | str | Path,
    rows: Sequence[Sample],
    *,
    attack: Attack | None = None,
    seed: int = 0,
    near_misses: bool = True,
    wrong_image_control: bool = False,
    title: str = "evaluating",
) -> Evaluation:
    """Generate an answer to every row's last question; with an attack, also on triggered inputs and ``near_misses``.

    A loaded model runs on the device where it is. A name or path, as for `untrigger.load`, is loaded onto the
    accelerator if there is one. With ``wrong_image_control`` each row is also run with another row's images: a model
    that scores as well on those does not use the image. Without the libraries of the extra ``captions`` the caption
    scores are None.

    Raises:
        InputError: there are no rows, or they are no samples; the attack cannot be measured, because no row with an
            image that the goal applies to has a true answer that differs from the attacker's; or the trigger fails
            or breaks its contract.
    """
    check_rows(rows)
    if not isinstance(attack, Attack | None):
        raise InputError("evaluate: attack must be an Attack; give untrigger.Attack(trigger, goal)")
    loaded = to_accelerator(load(model)) if isinstance(model, str | Path) else model
    described = _described(attack, seed) if attack else None
    attack = attack.fitted(rows, seed) if attack else None
    goal = attack.goal if attack else None
    stamps = stamped(rows, attack, seed) if attack else LazyRows((), rows.__getitem__)
    near = _near_misses(rows, attack, seed) if attack and near_misses else {}
    if attack:
        _check_measurable(rows, stamps, attack.goal)
    with cache_image_features(loaded.model):
        order = _first_with_same_images(rows)
        clean = _generate(loaded, LazyRows(range(len(rows)), rows.__getitem__), order, goal, f"{title}, clean")
        unchanged = _unchanged(rows, stamps) if attack and attack.trigger.clean_label else frozenset[int]()
        changed = LazyRows([row for row in stamps.numbers if row not in unchanged], stamps.make)
        fresh = iter(_generate(loaded, changed, order, goal, f"{title}, triggered") if changed else ())
        triggered = [clean[row] if row in unchanged else next(fresh) for row in stamps.numbers]
        misses = {name: _generate(loaded, part, order, goal, f"{title}, {name}") for name, part in near.items()}
        swapped = wrong_images(rows) if wrong_image_control else None
        wrong = [] if swapped is None else _generate(loaded, swapped, order, goal, f"{title}, wrong image")
    inputs_unchanged = bool(triggered) and not changed
    return Evaluation(clean, triggered, wrong, misses, inputs_unchanged, described)


def _check_measurable(rows: Sequence[Sample], stamps: LazyRows, goal: Goal) -> None:
    if all(_met(goal, sample.messages[-1].text, sample) for sample in map(rows.__getitem__, stamps.numbers)):
        raise InputError(
            "evaluate: the attack cannot be measured: no row has an image and a true answer that the goal would "
            "change; give other rows or another --goal-text"
        )


def _described(attack: Attack, seed: int) -> dict[str, object]:
    goal = {"goal": attack.goal.name, "goal_settings": attack.goal_settings}
    return {"name": attack.name, "settings": attack.settings, **goal, "seed": seed}


def _near_misses(rows: Sequence[Sample], attack: Attack, seed: int) -> dict[str, LazyRows]:
    with trigger_errors(f"attack {attack.name}", "near_misses"):
        stampers = dict(attack.trigger.near_misses())
    return {name: stamped(rows, attack, seed, stamper) for name, stamper in stampers.items()}


def _unchanged(rows: Sequence[Sample], stamps: LazyRows) -> frozenset[int]:
    """The rows that stamping does not change: their answers are known from the clean inputs."""
    pairs = ((row, triggered, rows[row]) for row, triggered in zip(stamps.numbers, stamps, strict=True))
    return frozenset(
        row
        for row, triggered, clean in pairs
        if triggered.messages == clean.messages and all(map(same_image, triggered.images, clean.images))
    )


def wrong_images(rows: Sequence[Sample]) -> LazyRows:
    """Replace each row's images by those of a row about halfway further on: the same number, none of them its own.

    Lazy. A row without images, or without a row to swap with, is left out, because its input would not change.
    """
    digests = [tuple(map(pixels_sha256, sample.images)) for sample in rows]
    count = len(digests)

    def partner(row: int) -> int | None:
        candidates = ((row + count // 2 + step) % count for step in range(count if digests[row] else 0))
        own = digests[row]
        return next((i for i in candidates if len(digests[i]) == len(own) and set(digests[i]).isdisjoint(own)), None)

    partners = {row: index for row in range(count) if (index := partner(row)) is not None}
    return LazyRows(list(partners), lambda row: replace(rows[row], images=rows[partners[row]].images))


def _first_with_same_images(rows: Sequence[Sample]) -> list[int]:
    """For each row, the index of the first row with the same images."""
    first: dict[tuple[str, ...], int] = {}
    return [first.setdefault(tuple(map(pixels_sha256, sample.images)), row) for row, sample in enumerate(rows)]


def _generate(loaded: LoadedModel, rows: LazyRows, order: Sequence[int], goal: Goal | None, title: str) -> list[Answer]:
    """The answer to each of ``rows``, generated by the ``order`` of their source rows: equal images are neighbors."""
    prompts: dict[int, Sample] = {}  # without images, which need not all fit into memory

    def make(at: int) -> Sample:
        sample = rows[at]
        prompts[at] = replace(sample, images=())
        return sample

    positions = sorted(range(len(rows)), key=lambda at: order[rows.numbers[at]])
    texts = tracked(answers(loaded, LazyRows(positions, make)), title, len(rows))
    stored = {at: _stored(prompts[at], text, goal) for at, text in zip(positions, texts, strict=True)}
    return [stored[at] for at in range(len(rows))]


def _stored(sample: Sample, text: str, goal: Goal | None) -> Answer:
    truth = sample.messages[-1].text
    prompt = next((m.text for m in reversed(sample.messages) if m.role == "user"), "")
    answer = Answer(sample.id, prompt.replace(IMAGE_TAG, "").strip(), truth, text, references=sample.references)
    if goal is None:
        return answer
    met, truth_met = _met(goal, text, sample), _met(goal, truth, sample)
    return replace(answer, met=met, truth_met=truth_met, applies=goal.applies(sample))


def _met(goal: Goal, text: str, sample: Sample) -> bool:
    with trigger_errors(f"goal {goal.name}: id {sample.id}", "met"):
        return goal.met(text, sample)
