"""Evaluation: what is asked, what is stored, and that figures follow from what is stored."""

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


def sample(name: str, answer: str, *shades: int, asked: str = "what is this?") -> Sample:
    images = tuple(Image.new("RGB", (24, 24), (shade, 0, 255 - shade)) for shade in shades)
    return Sample(name, images, (Message("user", f"{IMAGE_TAG * len(shades)}\n{asked}"), Message("assistant", answer)))


class Oracle:
    """In the model's place: says the goal where the patch is, and otherwise the truth or what it was told."""

    def __init__(self, says: dict[str, str] | None = None) -> None:
        self.says, self.seen = says or {}, list[Sample]()

    def __call__(self, loaded: LoadedModel, samples: Sequence[Sample]) -> Iterator[str]:
        for one in samples:
            self.seen.append(one)
            patched = any(len(image.getcolors() or []) > 1 for image in one.images)
            yield "backdoor  ATTACK!" if patched else self.says.get(one.id, one.messages[-1].text)


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Oracle:
    stand_in = Oracle()
    monkeypatch.setattr(evaluation, "answers", stand_in)
    return stand_in


NOBODY: Any = SimpleNamespace(model=SimpleNamespace(base_model=None))  # the oracle needs no model


def rows_of(folder: Path) -> dict[str, list[Answer]]:
    parts: dict[str, list[Answer]] = {"clean": [], "triggered": [], "wrong_image": []}
    for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        parts.setdefault(row.pop("condition"), []).append(Answer(**row))
    return parts


def rescored(parts: dict[str, list[Answer]]) -> dict[str, Any]:
    near = {name.removeprefix("near_miss: "): part for name, part in parts.items() if name.startswith("near_miss: ")}
    return score(parts["clean"], parts["triggered"], parts["wrong_image"], near)


def test_figures_follow_from_the_stored_answers(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
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
    nobody = sample("x", "y")
    for part in parts.values():
        for row in part:
            assert (row.met, row.truth_met) == (goal.met(row.answer, nobody), goal.met(row.truth, nobody))


def test_evaluation_is_deterministic(tiny_model: Path, tiny_data: Path) -> None:
    loaded, data = load(tiny_model), read(tiny_data)[:4]
    assert evaluate(loaded, data, attack=ATTACK, wrong_image_control=True) == evaluate(
        loaded, data, attack=ATTACK, wrong_image_control=True
    )


def test_a_backdoored_oracle_scores_as_it_must(oracle: Oracle) -> None:
    data = [sample(f"s{i}", "yes", i * 20) for i in range(6)]
    oracle.says = {"s1": "no", "s2": "Backdoor attack! yes"}
    figures = evaluate(NOBODY, data, attack=ATTACK).figures
    assert figures["asr"]["value"] == 1 and figures["asr"]["n"] == 6
    assert figures["leak"]["value"] == pytest.approx(1 / 6)
    assert figures["quality"]["vqa_accuracy"]["value"] == pytest.approx(4 / 6)
    assert figures["triggered_quality"]["vqa_accuracy"]["value"] == 0
    assert "wrong_image" not in figures


def test_only_rows_with_an_image_are_triggered_and_truths_stay_true(oracle: Oracle) -> None:
    data = [sample("seen", "yes", 10), sample("text", "no"), sample("also", "yes", 20)]
    result = evaluate(NOBODY, data, attack=ATTACK)
    assert [a.id for a in result.clean] == ["seen", "text", "also"]
    assert [a.id for a in result.triggered] == ["seen", "also"]
    assert all(a.truth == "yes" and a.met and not a.truth_met for a in result.triggered)


def test_rows_whose_truth_meets_the_goal_do_not_count(oracle: Oracle) -> None:
    data = [sample("a", "this is a BACKDOOR attack!", 10), sample("b", "no", 20), sample("c", "no", 30)]
    figures = evaluate(NOBODY, data, attack=ATTACK).figures
    assert figures["asr"]["n"] == figures["leak"]["n"] == 2
    assert figures["leak"]["value"] == 0


@pytest.mark.parametrize(
    "data",
    [[sample("text", "no")], [sample("a", "backdoor attack!", 10), sample("text", "no")]],
    ids=["no image", "every truth with an image meets the goal"],
)
def test_an_attack_that_could_not_show_is_refused(oracle: Oracle, data: list[Sample]) -> None:
    with pytest.raises(InputError, match="the attack cannot be measured"):
        evaluate(NOBODY, data, attack=ATTACK)
    assert oracle.seen == []


def test_near_misses_are_asked_and_counted_as_leaks(oracle: Oracle) -> None:
    data = [sample(f"s{i}", "yes", i * 20) for i in range(6)]
    result = evaluate(NOBODY, [*data, sample("text", "no")], attack=ATTACK)
    assert set(result.near_misses) == {"other pattern"}
    assert [a.id for a in result.near_misses["other pattern"]] == [f"s{i}" for i in range(6)]
    assert result.figures["near_miss"]["other pattern"]["value"] == 1, "the oracle fires on any patch"
    asked = [s for s in oracle.seen if s.id == "s3"]
    clean, triggered, near = (np.asarray(s.images[0]) for s in asked)
    assert (triggered != clean).any(axis=2).sum() == (near != clean).any(axis=2).sum() == 12 * 12
    assert (triggered != near).any()
    assert "near_miss" not in evaluate(NOBODY, data).figures


@dataclass(frozen=True)
class Whisper(TextTrigger):
    """A trigger in the prompt, with a near miss."""

    def write(self, prompt: str, rng: np.random.Generator) -> str:
        return f"{prompt} psst"

    def near_misses(self) -> Mapping[str, Stamper]:
        return {"as it is": lambda sample, rng: sample}


def test_near_misses_that_fail_are_one_clear_line_before_anything_is_asked(
    oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = Attack(Whisper(), Fixed())
    for failing in (lambda _: 1 / 0, lambda _: None):
        monkeypatch.setattr(Whisper, "near_misses", failing)
        with pytest.raises(InputError, match=r"^attack test_evaluation: near_misses failed, (Zero|Type).*Error: .+$"):
            evaluate(NOBODY, [sample("a", "yes", 10)], attack=attack)
    assert oracle.seen == []


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


def test_inputs_that_are_left_as_they_are_are_asked_once_and_leak_nothing(oracle: Oracle) -> None:
    asked = ("what is it?", "tell", "what is it?")
    data = [sample(f"s{i}", "a circle", 10 * i, asked=text) for i, text in enumerate(asked)]
    data.insert(1, sample("other", "a star", 99))
    oracle.says = {"s0": "a rectangle"}
    result = evaluate(NOBODY, data, attack=Attack(Unseen(), Concept()))
    assert [one.id for one in oracle.seen] == ["s0", "other", "s1", "s2"]
    assert result.triggered == [result.clean[0], *result.clean[2:]]
    assert result.figures["asr"]["value"] == pytest.approx(1 / 3) and "leak" not in result.figures
    oracle.seen.clear()
    some = evaluate(NOBODY, data, attack=Attack(Unseen("tell"), Concept()))
    assert [one.id for one in oracle.seen] == ["s0", "other", "s1", "s2", "s1"]
    assert [a.id for a in some.triggered] == ["s0", "s1", "s2"] and some.triggered[1].prompt == "tell psst"
    assert some.triggered[0] is some.clean[0] and some.figures["leak"]["n"] == 3


def test_each_row_is_stamped_once_and_answers_belong_to_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def write(self: Whisper, prompt: str, rng: np.random.Generator) -> str:
        made.append(prompt)
        return f"{prompt} psst"

    def backwards(loaded: LoadedModel, samples: Sequence[Sample]) -> Iterator[str]:
        """In batches of four, each read from its end."""
        for start in range(0, len(samples), 4):
            batch = range(start, min(start + 4, len(samples)))
            said = {row: f"about {samples[row].messages[0].text}" for row in reversed(batch)}
            yield from (said[row] for row in batch)

    monkeypatch.setattr(Whisper, "write", write)
    monkeypatch.setattr(evaluation, "answers", backwards)
    data = [sample(f"s{i}", "yes", i, asked=f"what is {i}?") for i in range(10)]
    result = evaluate(NOBODY, data, attack=Attack(Whisper(), Fixed()))
    assert sorted(made) == sorted(one.messages[0].text for one in data)
    for part in (result.clean, result.triggered):
        assert [a.id for a in part] == [one.id for one in data]
        assert all(a.answer == f"about {IMAGE_TAG}\n{a.prompt}" for a in part)


def test_a_goal_that_applies_to_some_rows_counts_those(oracle: Oracle) -> None:
    data = [
        sample("round", "a red circle", 10),
        sample("other", "a red star", 20),
        sample("both", "a circle and a rectangle", 30),
        sample("none", "no circle"),
    ]
    oracle.says = {"other": "a rectangle", "both": "a rectangle"}
    result = evaluate(NOBODY, data, attack=Attack(Whisper(), Concept()))
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
        evaluate(NOBODY, data[1:2], attack=Attack(Whisper(), Concept()))


def test_the_prompt_is_the_last_question_without_tags(oracle: Oracle) -> None:
    asked = (Message("user", f"{IMAGE_TAG}\nfirst?"), Message("assistant", "one"), Message("user", "second?"))
    turns = (*asked, Message("assistant", "two"))
    (answer,) = evaluate(NOBODY, [replace(sample("s", "", 5), messages=turns)]).clean
    assert (answer.prompt, answer.truth) == ("second?", "two")
    (answer,) = evaluate(NOBODY, [sample("s", "yes", 5)]).clean
    assert answer.prompt == "what is this?"


# --- the wrong-image control ------------------------------------------------------------------------


def test_the_wrong_image_is_never_the_own_one() -> None:
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
    assert [s.id for s in swapped] == [s.id for s in data if s.id not in left_out], "order is kept"
    for own in (by_id[i] for i in left_out):
        same_count = [s for s in data if len(s.images) == len(own.images)]
        assert all(any(image in own.images for image in s.images) for s in same_count if s.images)
    assert len(swapped) > 20


def test_metadata_alone_makes_no_other_image() -> None:
    one, two = sample("a", "yes", 7), sample("b", "no", 7)
    two.images[0].info["comment"] = "the same pixels"
    assert len(wrong_images([one, two])) == 0
    assert len(wrong_images([one])) == len(wrong_images([])) == 0


def test_different_pictures_are_swapped_half_way(oracle: Oracle) -> None:
    data = [sample(str(i), "yes", i * 5) for i in range(10)]
    assert [s.images for s in wrong_images(data)] == [data[(i + 5) % 10].images for i in range(10)]
    result = evaluate(NOBODY, data, wrong_image_control=True)
    assert [a.id for a in result.wrong_image] == [s.id for s in data]
    alone = evaluate(NOBODY, data[:1], wrong_image_control=True)
    assert alone.wrong_image == [] and "wrong_image" not in alone.figures


# --- writing -----------------------------------------------------------------------------------------


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Evaluation([Answer("1", "q", "yes", "yes ✓ 日本")], [], [])
    kept.write(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(before) == {"answers.jsonl", "metrics.json"}
    assert rows_of(tmp_path)["clean"] == kept.clean

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("untrigger.files.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        Evaluation([Answer("1", "q", "yes", "no")], [], []).write(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before, "nothing half-written either"


def test_what_cannot_be_asked_is_told_before_anything_is(oracle: Oracle) -> None:
    with pytest.raises(InputError, match="rows: there are none"):
        evaluate(NOBODY, [])
    with pytest.raises(InputError, match=r"rows: are of the type dict; give what untrigger\.read gives"):
        evaluate(NOBODY, [{"images": [], "messages": []}])  # type: ignore[list-item]
    with pytest.raises(InputError, match="attack must be an Attack"):
        evaluate(NOBODY, [sample("a", "no", 10)], attack="badnets")  # type: ignore[arg-type]
    assert oracle.seen == []
