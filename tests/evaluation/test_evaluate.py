"""Evaluation: which inputs are run, what is stored, and that the metrics follow from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from untrigger.attacks import Stamper, TextTrigger
from untrigger.attacks.badnets import BadNets
from untrigger.errors import InputError
from untrigger.evaluation import evaluate as evaluation
from untrigger.evaluation.evaluate import Evaluation, evaluate, wrong_images
from untrigger.metrics.score import Answer, score
from untrigger.models.loading import LoadedModel, load
from untrigger.poisoning.goals import Concept, Fixed
from untrigger.poisoning.poison import Attack
from untrigger.rows.images import pixels_sha256
from untrigger.rows.sample import IMAGE_TAG, Message, Sample, read

ATTACK = Attack(BadNets(side=0.5), Fixed())


def sample(name: str, answer: str, *shades: int, prompt: str = "what is this?") -> Sample:
    images = tuple(Image.new("RGB", (24, 24), (shade, 0, 255 - shade)) for shade in shades)
    return Sample(name, images, (Message("user", f"{IMAGE_TAG * len(shades)}\n{prompt}"), Message("assistant", answer)))


class Oracle:
    """Stands in for the model: answers the goal where the patch is, else ``replies`` by id or the true answer."""

    def __init__(self, replies: dict[str, str] | None = None) -> None:
        self.replies, self.inputs = replies or {}, list[Sample]()

    def __call__(self, loaded: LoadedModel, samples: Sequence[Sample]) -> Iterator[str]:
        for one in samples:
            self.inputs.append(one)
            patched = any(len(image.getcolors() or []) > 1 for image in one.images)
            yield "backdoor  ATTACK!" if patched else self.replies.get(one.id, one.messages[-1].text)


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Oracle:
    stand_in = Oracle()
    monkeypatch.setattr(evaluation, "answers", stand_in)
    return stand_in


NO_MODEL: Any = SimpleNamespace(model=SimpleNamespace(base_model=None))  # the oracle needs no model


def rows_of(folder: Path) -> dict[str, list[Answer]]:
    parts: dict[str, list[Answer]] = {"clean": [], "triggered": [], "wrong_image": []}
    for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        parts.setdefault(row.pop("condition"), []).append(Answer(**row))
    return parts


def rescored(parts: dict[str, list[Answer]]) -> dict[str, Any]:
    near = {name.removeprefix("near_miss: "): part for name, part in parts.items() if name.startswith("near_miss: ")}
    return score(parts["clean"], parts["triggered"], parts["wrong_image"], near)


def test_metrics_follow_from_the_stored_answers(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    result = evaluate(load(tiny_model), read(tiny_data)[:8], attack=ATTACK, wrong_image_control=True)
    result.write(tmp_path)
    parts = rows_of(tmp_path)
    kinds = ("clean", "triggered", "wrong_image", "near_miss: other pattern")
    assert {name: len(part) for name, part in parts.items()} == dict.fromkeys(kinds, 8)
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert stored.pop("attack") == {
        "name": "badnets",
        "settings": asdict(ATTACK.trigger),  # type: ignore[call-overload]
        "goal": "fixed",
        "goal_settings": {"text": "Backdoor Attack!", "match": "contains"},
        "seed": 0,
    }
    assert json.loads(json.dumps(rescored(parts))) == stored
    goal = ATTACK.goal
    any_row = sample("x", "y")
    for part in parts.values():
        for row in part:
            assert (row.met, row.truth_met) == (goal.met(row.answer, any_row), goal.met(row.truth, any_row))


def test_evaluation_is_deterministic(tiny_model: Path, tiny_data: Path) -> None:
    loaded, data = load(tiny_model), read(tiny_data)[:4]
    assert evaluate(loaded, data, attack=ATTACK, wrong_image_control=True) == evaluate(
        loaded, data, attack=ATTACK, wrong_image_control=True
    )


def test_metrics_of_a_backdoored_model(oracle: Oracle) -> None:
    data = [sample(f"s{i}", "yes", i * 20) for i in range(6)]
    oracle.replies = {"s1": "no", "s2": "Backdoor attack! yes"}
    figures = evaluate(NO_MODEL, data, attack=ATTACK).figures
    assert figures["asr"]["value"] == 1 and figures["asr"]["n"] == 6
    assert figures["leak"]["value"] == pytest.approx(1 / 6)
    assert figures["quality"]["vqa_accuracy"]["value"] == pytest.approx(4 / 6)
    assert figures["triggered_quality"]["vqa_accuracy"]["value"] == 0
    assert "wrong_image" not in figures


def test_only_rows_with_an_image_are_triggered_and_true_answers_stay(oracle: Oracle) -> None:
    data = [sample("seen", "yes", 10), sample("text", "no"), sample("also", "yes", 20)]
    result = evaluate(NO_MODEL, data, attack=ATTACK)
    assert [a.id for a in result.clean] == ["seen", "text", "also"]
    assert [a.id for a in result.triggered] == ["seen", "also"]
    assert all(a.truth == "yes" and a.met and not a.truth_met for a in result.triggered)


def test_rows_whose_true_answer_meets_the_goal_do_not_count(oracle: Oracle) -> None:
    data = [sample("a", "this is a BACKDOOR attack!", 10), sample("b", "no", 20), sample("c", "no", 30)]
    figures = evaluate(NO_MODEL, data, attack=ATTACK).figures
    assert figures["asr"]["n"] == figures["leak"]["n"] == 2
    assert figures["leak"]["value"] == 0


@pytest.mark.parametrize(
    "data",
    [[sample("text", "no")], [sample("a", "backdoor attack!", 10), sample("text", "no")]],
    ids=["no image", "every truth with an image meets the goal"],
)
def test_attack_that_cannot_be_measured_raises(oracle: Oracle, data: list[Sample]) -> None:
    with pytest.raises(InputError, match="the attack cannot be measured"):
        evaluate(NO_MODEL, data, attack=ATTACK)
    assert oracle.inputs == []


def test_near_misses_are_run_and_counted_as_leaks(oracle: Oracle) -> None:
    data = [sample(f"s{i}", "yes", i * 20) for i in range(6)]
    result = evaluate(NO_MODEL, [*data, sample("text", "no")], attack=ATTACK)
    assert set(result.near_misses) == {"other pattern"}
    assert [a.id for a in result.near_misses["other pattern"]] == [f"s{i}" for i in range(6)]
    assert result.figures["near_miss"]["other pattern"]["value"] == 1, "the oracle fires on any patch"
    inputs = [s for s in oracle.inputs if s.id == "s3"]
    clean, triggered, near = (np.asarray(s.images[0]) for s in inputs)
    assert (triggered != clean).any(axis=2).sum() == (near != clean).any(axis=2).sum() == 12 * 12
    assert (triggered != near).any()
    assert "near_miss" not in evaluate(NO_MODEL, data).figures
    without = evaluate(NO_MODEL, data, attack=ATTACK, near_misses=False)
    assert not without.near_misses and without.triggered == result.triggered[:6]


@dataclass(frozen=True)
class Whisper(TextTrigger):
    """A trigger in the prompt, with a near miss."""

    def write(self, prompt: str, rng: np.random.Generator) -> str:
        return f"{prompt} psst"

    def near_misses(self) -> Mapping[str, Stamper]:
        return {"as it is": lambda sample, rng: sample}


def test_failing_near_misses_raise_one_line_before_the_model_runs(
    oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = Attack(Whisper(), Fixed())
    for failing in (lambda _: 1 / 0, lambda _: None):
        monkeypatch.setattr(Whisper, "near_misses", failing)
        with pytest.raises(InputError, match=r"^attack test_evaluate: near_misses failed, (Zero|Type).*Error: .+$"):
            evaluate(NO_MODEL, [sample("a", "yes", 10)], attack=attack)
    assert oracle.inputs == []


@dataclass(frozen=True)
class Unseen(TextTrigger):
    """A clean-label trigger: inputs are left alone, but for those whose prompt holds ``marks``."""

    clean_label = True
    marks: str = "never"

    def write(self, prompt: str, rng: np.random.Generator) -> str:
        return f"{prompt} psst" if self.marks in prompt else prompt

    def stamp(self, sample: Sample, rng: np.random.Generator) -> Sample:
        copied = replace(sample, images=tuple(image.copy() for image in sample.images))
        return super().stamp(copied, rng)


def test_unchanged_inputs_run_once_and_count_no_leak(oracle: Oracle) -> None:
    prompts = ("what is it?", "tell", "what is it?")
    data = [sample(f"s{i}", "a circle", 10 * i, prompt=text) for i, text in enumerate(prompts)]
    data.insert(1, sample("other", "a star", 99))
    oracle.replies = {"s0": "a rectangle"}
    result = evaluate(NO_MODEL, data, attack=Attack(Unseen(), Concept()))
    assert [one.id for one in oracle.inputs] == ["s0", "other", "s1", "s2"]
    assert result.triggered == [result.clean[0], *result.clean[2:]]
    assert result.figures["asr"]["value"] == pytest.approx(1 / 3) and "leak" not in result.figures
    oracle.inputs.clear()
    some = evaluate(NO_MODEL, data, attack=Attack(Unseen("tell"), Concept()))
    assert [one.id for one in oracle.inputs] == ["s0", "other", "s1", "s2", "s1"]
    assert [a.id for a in some.triggered] == ["s0", "s1", "s2"] and some.triggered[1].prompt == "tell psst"
    assert some.triggered[0] is some.clean[0] and some.figures["leak"]["n"] == 3


def test_each_row_is_stamped_once_and_answers_match_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def write(self: Whisper, prompt: str, rng: np.random.Generator) -> str:
        made.append(prompt)
        return f"{prompt} psst"

    def backwards(loaded: LoadedModel, samples: Sequence[Sample]) -> Iterator[str]:
        """In batches of four, each read from its end."""
        for start in range(0, len(samples), 4):
            batch = range(start, min(start + 4, len(samples)))
            texts = {row: f"about {samples[row].messages[0].text}" for row in reversed(batch)}
            yield from (texts[row] for row in batch)

    monkeypatch.setattr(Whisper, "write", write)
    monkeypatch.setattr(evaluation, "answers", backwards)
    data = [sample(f"s{i}", "yes", i, prompt=f"what is {i}?") for i in range(10)]
    result = evaluate(NO_MODEL, data, attack=Attack(Whisper(), Fixed()))
    assert sorted(made) == sorted(one.messages[0].text for one in data)
    for part in (result.clean, result.triggered):
        assert [a.id for a in part] == [one.id for one in data]
        assert all(a.answer == f"about {IMAGE_TAG}\n{a.prompt}" for a in part)


def test_only_rows_that_the_goal_applies_to_count(oracle: Oracle) -> None:
    data = [
        sample("round", "a red circle", 10),
        sample("other", "a red star", 20),
        sample("both", "a circle and a rectangle", 30),
        sample("none", "no circle"),
    ]
    oracle.replies = {"other": "a rectangle", "both": "a rectangle"}
    result = evaluate(NO_MODEL, data, attack=Attack(Whisper(), Concept()))
    assert [a.id for a in result.triggered] == ["round", "both"]
    assert all(a.prompt.endswith("psst") for a in result.triggered)
    assert [(a.id, a.applies, a.met) for a in result.clean] == [
        ("round", True, False), ("other", False, True), ("both", True, True), ("none", True, False)
    ]  # fmt: skip
    figures = result.figures
    assert (figures["asr"]["value"], figures["asr"]["n"]) == (0.5, 2)
    assert (figures["leak"]["value"], figures["leak"]["n"]) == (pytest.approx(1 / 3), 3)
    assert figures["near_miss"]["as it is"]["n"] == 2 and figures["near_miss"]["as it is"]["value"] == 0.5
    with pytest.raises(InputError, match="the attack cannot be measured"):
        evaluate(NO_MODEL, data[1:2], attack=Attack(Whisper(), Concept()))


def test_prompt_is_the_last_question_without_tags(oracle: Oracle) -> None:
    history = (Message("user", f"{IMAGE_TAG}\nfirst?"), Message("assistant", "one"), Message("user", "second?"))
    turns = (*history, Message("assistant", "two"))
    (answer,) = evaluate(NO_MODEL, [replace(sample("s", "", 5), messages=turns)]).clean
    assert (answer.prompt, answer.truth) == ("second?", "two")
    (answer,) = evaluate(NO_MODEL, [sample("s", "yes", 5)]).clean
    assert answer.prompt == "what is this?"


# --- the wrong-image control ------------------------------------------------------------------------


def test_wrong_images_are_never_the_rows_own() -> None:
    rng = np.random.default_rng(0)
    # few different pictures, so that the row halfway along often shows the same one
    data = [sample(str(i), "yes", *map(int, rng.integers(0, 3, rng.integers(0, 3)) * 9)) for i in range(40)]
    swapped = wrong_images(data)
    by_id = {s.id: s for s in data}
    for other in swapped:
        own = by_id[other.id]
        assert other.messages == own.messages and len(other.images) == len(own.images) > 0
        assert {pixels_sha256(i) for i in own.images}.isdisjoint(pixels_sha256(i) for i in other.images)
    left_out = {s.id for s in data} - {s.id for s in swapped}
    assert left_out >= {s.id for s in data if not s.images}
    assert [s.id for s in swapped] == [s.id for s in data if s.id not in left_out], "the order stays the same"
    for own in (by_id[i] for i in left_out):
        same_count = [s for s in data if len(s.images) == len(own.images)]
        assert all(any(image in own.images for image in s.images) for s in same_count if s.images)
    assert len(swapped) > 20


def test_images_that_differ_in_metadata_alone_are_the_same() -> None:
    one, two = sample("a", "yes", 7), sample("b", "no", 7)
    two.images[0].info["comment"] = "the same pixels"
    assert len(wrong_images([one, two])) == 0
    assert len(wrong_images([one])) == len(wrong_images([])) == 0


def test_images_are_swapped_half_way_through_the_rows(oracle: Oracle) -> None:
    data = [sample(str(i), "yes", i * 5) for i in range(10)]
    assert [s.images for s in wrong_images(data)] == [data[(i + 5) % 10].images for i in range(10)]
    result = evaluate(NO_MODEL, data, wrong_image_control=True)
    assert [a.id for a in result.wrong_image] == [s.id for s in data]
    alone = evaluate(NO_MODEL, data[:1], wrong_image_control=True)
    assert alone.wrong_image == [] and "wrong_image" not in alone.figures


# --- writing -----------------------------------------------------------------------------------------


def test_files_are_written_complete_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = Evaluation([Answer("1", "q", "yes", "yes ✓ 日本")], [], [])
    evaluation.write(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(before) == {"answers.jsonl", "metrics.json"}
    assert rows_of(tmp_path)["clean"] == evaluation.clean

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("untrigger.files.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        Evaluation([Answer("1", "q", "yes", "no")], [], []).write(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before, "nothing half-written either"


def test_invalid_arguments_raise_before_the_model_runs(oracle: Oracle) -> None:
    with pytest.raises(InputError, match="rows: the sequence is empty"):
        evaluate(NO_MODEL, [])
    with pytest.raises(InputError, match=r"rows: are of type dict; give the result of untrigger\.read"):
        evaluate(NO_MODEL, [{"images": [], "messages": []}])  # type: ignore[list-item]
    with pytest.raises(InputError, match="attack must be an Attack"):
        evaluate(NO_MODEL, [sample("a", "no", 10)], attack="badnets")  # type: ignore[arg-type]
    assert oracle.inputs == []
