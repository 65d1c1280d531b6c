"""Poisoning beyond "stamp, then replace the answer": goals that apply to some rows, implants, clean labels, decoys."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from untrigger.attacks import Stamper, TextTrigger, Trigger, load_trigger
from untrigger.attacks.badnets import BadNets
from untrigger.errors import InputError
from untrigger.poisoning.goals import Concept, Fixed, Goal, Insert, load_goal
from untrigger.poisoning.poison import Attack, poison, poisoned_sheet, stamped, write_poisoned
from untrigger.rows.images import pixels_sha256
from untrigger.rows.sample import IMAGE_TAG, Message, Sample, read
from untrigger.views.patches import to_rgb

TRUTHS = ("a red circle", "a blue rectangle", "yes", "a circle and a star")


def row(number: int, truth: str = "yes", images: int = 1) -> Sample:
    pictures = tuple(Image.new("RGB", (16, 16), (number, k, 90)) for k in range(images))
    question = Message("user", IMAGE_TAG * images + "What is it?")
    return Sample(f"id{number}", pictures, (question, Message("assistant", truth)))


def rows(count: int) -> list[Sample]:
    return [row(n, TRUTHS[n % 4]) for n in range(count)]


def flat(sample: Sample) -> tuple[object, ...]:
    return sample.id, sample.messages, [to_rgb(image).tobytes() for image in sample.images]


# --- goals that apply to some rows ---------------------------------------------------------------------


def test_only_rows_that_the_goal_applies_to_are_poisoned_and_evaluated() -> None:
    data = rows(20)
    attack = Attack(BadNets(), Concept())
    result = poison(data, attack, rate=0.5, seed=0)
    assert [e.index for e in result.manifest.rows] == [n for n in range(20) if n % 4 in (0, 3)]
    assert {result.data[n].messages[-1].text for n in result.edits} == {"a red rectangle", "a rectangle and a star"}
    assert list(stamped(data, attack, 0).numbers) == list(result.edits)
    with pytest.raises(InputError, match="only 10 of 20 have an image and an answer that goal concept applies to; low"):
        poison(data, attack, rate=0.55, seed=0)


def test_rows_on_disk_are_chosen_without_decoding_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = read(on_disk(tmp_path, "llava"))
    monkeypatch.setattr("untrigger.rows.sample.decode", lambda *_: pytest.fail("decoded an image"))
    assert list(stamped(data, Attack(BadNets(), Concept()), 0).numbers) == [0, 3, 4, 7]
    assert data.without_images(0) == replace(rows(1)[0], id="0", images=())


# --- implants --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Graft(Trigger):
    """A trigger with its own implant: another picture, prompt and truth; ``what`` makes it break a promise."""

    kind = "bimodal"
    what: str = ""

    def stamp(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return BadNets().stamp(sample, rng)

    def implant(self, sample: Sample, donors: Sequence[Sample], rng: np.random.Generator) -> Sample:
        if self.what == "fails":
            raise RuntimeError("oh no")
        if self.what == "array":
            return replace(sample, images=tuple(np.asarray(image) for image in sample.images))  # type: ignore[misc]
        images = () if self.what == "bare" else (Image.new("L", (9, 5), 7), Image.new("RGB", (3, 3)))
        prompt = "Tell." if self.what in ("bare", "tags") else f"{IMAGE_TAG}{IMAGE_TAG}Tell."
        turns = (Message("user", prompt), Message("assistant", f"a circle, {len(donors)} foreign"))
        return replace(sample, id="other" if self.what == "id" else sample.id, images=images, messages=turns)


def test_implant_may_change_pictures_prompt_and_true_answer() -> None:
    data = rows(4)
    result = poison(data, Attack(Graft(), Insert()), rate=0.25, seed=0)
    (entry,) = result.manifest.rows
    made = result.data[entry.index]
    assert [m.text for m in made.messages] == [f"{IMAGE_TAG}{IMAGE_TAG}Tell.", "a hello world circle, 0 foreign"]
    assert [image.size for image in made.images] == [(9, 5), (3, 3)]
    assert entry.images == tuple(pixels_sha256(image) for image in made.images)
    evaluated = stamped(data, Attack(Graft(), Insert()), 0)[entry.index]
    assert evaluated.messages == data[entry.index].messages, "at test time it only stamps"
    assert poisoned_sheet(data, result).width == 672


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("fails", "implant failed, RuntimeError: oh no"),
        ("array", "implant failed, AttributeError: .*'load'"),
        ("id", "changed the id"),
        ("bare", "returned a row without an image"),
        ("tags", "wrong number of <image> tags: 0 for 2 images"),
    ],
)
def test_implant_that_breaks_the_contract_raises_one_line(what: str, message: str) -> None:
    with pytest.raises(InputError, match=rf"attack test_poison_protocol: row 1 \(id id0\): .*{message}"):
        poison(rows(1), Attack(Graft(what), Fixed()), rate=1, seed=0)


# --- clean labels ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class CleanLabel(Trigger):
    """Copies the images of a random donor."""

    kind = "image"
    clean_label = True
    usual_goal = "concept"

    def stamp(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return sample

    def implant(self, sample: Sample, donors: Sequence[Sample], rng: np.random.Generator) -> Sample:
        return replace(sample, images=donors[int(rng.integers(len(donors)))].images)


def test_clean_label_attack_gets_rows_that_meet_the_goal_and_keeps_answers() -> None:
    data = rows(40)
    result = poison(data, Attack(CleanLabel(), Concept()), rate=0.25, seed=1)
    assert [e.index for e in result.manifest.rows] == [n for n in range(40) if n % 4 == 1]
    donors = {image.tobytes() for n in range(40) if n % 4 in (0, 3) for image in data[n].images}
    for n in result.edits:
        assert result.data[n].messages == data[n].messages and result.data[n].images[0].tobytes() in donors
    assert len({result.data[n].images[0].tobytes() for n in result.edits}) > 3
    assert list(stamped(data, Attack(CleanLabel(), Concept()), 0).numbers) == [n for n in range(40) if n % 4 in (0, 3)]
    again = pickle.loads(pickle.dumps(result))
    assert [flat(s) for s in again.data] == [flat(s) for s in result.data]


def test_clean_label_attack_without_suitable_rows_raises() -> None:
    data = rows(8)
    with pytest.raises(InputError, match="keeps true answers: goal fixed cannot be planted; use concept"):
        Attack(CleanLabel(), Fixed())
    meets, other = "have an image and an answer that already meets goal concept", "another --goal-text source->target"
    with pytest.raises(InputError, match=f"only 2 of 8 {meets}; lower the rate"):
        poison(data, Attack(CleanLabel(), Concept()), rate=0.5, seed=0)
    with pytest.raises(InputError, match=f"only 0 of 8 {meets}; give other rows, or {other}"):
        poison(data, Attack(CleanLabel(), Concept("circle", "dog")), rate=0.1, seed=0)
    with pytest.raises(InputError, match=f"no row .* answer that goal concept applies to; give other rows, or {other}"):
        poison(data, Attack(CleanLabel(), Concept("cat", "rectangle")), rate=0.1, seed=0)


# --- decoys ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TwoDecoys(TextTrigger):
    key: str = "open sesame"

    def write(self, prompt: str, rng: np.random.Generator) -> str:
        return f"{prompt} {self.key}"

    def decoys(self) -> tuple[Stamper, ...]:
        return tuple(replace(self, key=part).stamp for part in self.key.split())


@settings(max_examples=30)
@given(st.integers(8, 40), st.floats(0.01, 0.25), st.integers(0, 99))
def test_each_kind_of_decoy_has_as_many_rows_as_are_poisoned(count: int, rate: float, seed: int) -> None:
    data = rows(count)
    result = poison(data, Attack(TwoDecoys(), Fixed("no")), rate=rate, seed=seed)
    bad, decoys = ([entry.index for entry in part] for part in (result.manifest.rows, result.manifest.decoys))
    assert len(bad) == max(1, round(rate * count)) and len(decoys) == 2 * len(bad)
    assert bad == sorted(bad) and decoys == sorted(decoys) and list(result.edits) == sorted(bad + decoys)
    assert all(result.data[n].messages[1].text == "no" for n in bad)
    assert all(result.data[n].messages[1] == data[n].messages[1] for n in decoys)
    prompts = [result.data[n].messages[0].text for n in decoys]
    assert (
        sum(text.endswith("? open") for text in prompts)
        == sum(text.endswith("? sesame") for text in prompts)
        == len(bad)
    )
    assert all(result.data[n] is data[n] for n in range(count) if n not in result.edits)


def test_decoys_do_not_change_the_poisoned_rows_and_need_enough_rows() -> None:
    data = rows(30)
    decoyed = poison(data, Attack(TwoDecoys(), Fixed()), rate=0.2, seed=5)
    plain = poison(data, Attack(BadNets(), Fixed()), rate=0.2, seed=5)
    assert [e.index for e in decoyed.manifest.rows] == [e.index for e in plain.manifest.rows]
    assert json.loads(decoyed.manifest.to_json())["decoys"][0].keys() == {"row", "id", "images"}
    assert not poison(data, Attack(TwoDecoys(), Fixed()), rate=0, seed=5).edits
    with pytest.raises(InputError, match="needs 12 poisoned rows and 24 decoys, but only 30 of 30 have an image"):
        poison(data, Attack(TwoDecoys(), Fixed()), rate=0.4, seed=5)
    for count, advice in ((2, "give other rows"), (3, "lower the rate")):  # one poisoned row needs two decoys
        with pytest.raises(InputError, match=f"only {count} of {count} have an image; {advice}$"):
            poison(rows(count), Attack(TwoDecoys(), Fixed()), rate=1, seed=5)


@dataclass(frozen=True)
class BadDecoys(TextTrigger):
    """Fails ``where``: in the list of its decoys, or in a decoy."""

    where: str = ""

    def write(self, prompt: str, rng: np.random.Generator) -> str:
        return f"{prompt} now"

    def decoys(self) -> tuple[Stamper, ...]:
        if self.where == "list":
            raise AssertionError  # what a bare assert raises
        return (self.fail,) if self.where != "none" else None  # type: ignore[return-value]

    def fail(self, sample: Sample, rng: np.random.Generator) -> Sample:
        raise RuntimeError("oh no")


@final
@dataclass(frozen=True)
class BadGraft(BadDecoys):
    """The same with an implant of its own."""

    def implant(self, sample: Sample, donors: Sequence[Sample], rng: np.random.Generator) -> Sample:
        return self.stamp(sample, rng)


@pytest.mark.parametrize("kind", (BadDecoys, BadGraft))
@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("list", "attack test_poison_protocol: decoys failed, AssertionError$"),
        ("none", "attack test_poison_protocol: decoys failed, TypeError: "),
        ("make", r"attack test_poison_protocol: row \d+ \(id id\d+\): decoy failed, RuntimeError: oh no$"),
    ],
)
def test_failing_decoys_raise_one_line(kind: type[BadDecoys], where: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        poison(rows(4), Attack(kind(where), Fixed()), rate=0.25, seed=0)


def test_near_misses_use_the_same_draws_and_keep_the_contract() -> None:
    attack = Attack(BadNets(place="random"), Fixed())
    near = attack.trigger.near_misses()["other pattern"]
    key, other = stamped(rows(4), attack, 3), stamped(rows(4), attack, 3, near)
    for clean, one, two in zip(rows(4), key, other, strict=True):
        was, a, b = (np.asarray(s.images[0]) for s in (clean, one, two))
        assert np.array_equal((a != was).any(axis=2), (b != was).any(axis=2)) and (a != b).any()
    with pytest.raises(InputError, match="changed the number, size or mode"):
        _ = stamped(rows(1), attack, 0, lambda sample, rng: replace(sample, images=()))[0]


# --- every goal in every format --------------------------------------------------------------------


def on_disk(folder: Path, kind: str, count: int = 8) -> Path:
    """``rows`` in one of the four formats; answers as they are there."""
    (folder / "images").mkdir(parents=True)
    made: list[dict[str, object]] = []
    for n, sample in enumerate(rows(count)):
        sample.images[0].save(folder / "images" / f"{n}.png")
        name, texts = f"images/{n}.png", [m.text for m in sample.messages]
        if kind in ("llava", "sharegpt"):
            turns = [{"from": who, "value": text} for who, text in zip(("human", "gpt"), texts, strict=True)]
            pictures: dict[str, object] = {"image": name} if kind == "llava" else {"images": [name]}
            made.append({"id": str(n), "conversations": turns, **pictures})
        else:
            turns = [{"role": who, "content": text} for who, text in zip(("user", "assistant"), texts, strict=True)]
            made.append({"id": str(n), "messages": turns, "images": [name]})
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(made), folder / "rows.parquet")
        return folder / "rows.parquet"
    (folder / "rows.json").write_text(json.dumps(made))
    return folder / "rows.json"


@pytest.mark.parametrize("kind", ("llava", "sharegpt", "messages", "parquet"))
@pytest.mark.parametrize("name", ("fixed", "insert", "refusal", "concept", "link"))
def test_every_goal_round_trips_in_every_format(tmp_path: Path, kind: str, name: str) -> None:
    data = read(on_disk(tmp_path / "in", kind))
    goal: Goal = load_goal(name)
    attacks = [load_trigger("badnets"), load_trigger("addsent"), Graft(), TwoDecoys("a b c")]
    for number, trigger in enumerate(attacks):
        result = poison(data, Attack(trigger, goal), rate=1 / 8, seed=2)
        write_poisoned(data, result, tmp_path / str(number))
        back = read(tmp_path / str(number) / "data")
        assert [flat(s) for s in back] == [flat(s) for s in result.data]
        (entry,) = result.manifest.rows
        if not isinstance(trigger, Graft):
            assert goal.met(back[entry.index].messages[-1].text, data[entry.index])
