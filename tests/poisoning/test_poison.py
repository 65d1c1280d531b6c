from __future__ import annotations

import hashlib
import json
import pickle
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_rows import ATTACK, picture, row, rows
from PIL import Image

import untrigger.attacks.badnets as badnets_file
from untrigger.attacks import ImageTrigger, Pixels, Trigger, load_trigger
from untrigger.attacks.badnets import BadNets
from untrigger.errors import InputError
from untrigger.poisoning.goals import Fixed, Goal
from untrigger.poisoning.poison import Attack, poison, stamped
from untrigger.rows.images import decode, encode, pixels_sha256
from untrigger.rows.sample import Message, Sample


def flat(sample: Sample) -> tuple[object, ...]:
    return sample.id, sample.messages, [image.tobytes() for image in sample.images]


# --- choice of rows ----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.floats(0, 1), st.integers(0, 2**64))
def test_rate_sets_the_number_of_poisoned_rows_and_no_other_row_changes(count: int, rate: float, seed: int) -> None:
    data = [Sample(str(n), (Image.new("L", (2, 2), n),), row(n).messages) for n in range(count)]
    result = poison(data, ATTACK, rate=rate, seed=seed)
    chosen = [entry.index for entry in result.manifest.rows]
    assert len(chosen) == (max(1, round(rate * count)) if rate else 0)
    assert chosen == sorted(set(chosen)) == list(result.edits)
    assert len(result.data) == count and [s.id for s in result.data] == [s.id for s in data]
    for number, (before, after) in enumerate(zip(data, result.data, strict=True)):
        assert (after is before) == (number not in chosen)


@settings(max_examples=20, deadline=None)
@given(st.sets(st.integers(0, 19), min_size=5), st.integers(0, 99))
def test_only_rows_with_an_image_are_chosen(with_image: set[int], seed: int) -> None:
    data = [row(n, images=int(n in with_image)) for n in range(20)]
    result = poison(data, ATTACK, rate=5 / 20, seed=seed)
    assert {entry.index for entry in result.manifest.rows} <= with_image
    assert list(stamped(data, ATTACK, seed).numbers) == sorted(with_image)


def test_rows_are_drawn_uniformly_by_seed() -> None:
    data = rows(10)
    counts = np.zeros(10)
    for seed in range(300):
        counts[[e.index for e in poison(data, ATTACK, rate=0.3, seed=seed).manifest.rows]] += 1
    assert counts.sum() == 900 and abs(counts - 90).max() < 35  # 4 standard deviations of about 8


@pytest.mark.parametrize(
    ("rate", "seed", "message"),
    [
        (-0.1, 0, "rate is -0.1"),
        (1.5, 0, "rate is 1.5"),
        (float("nan"), 0, "rate is nan"),
        (0.5, -1, "seed is -1"),
    ],
)
def test_values_out_of_range_raise(rate: float, seed: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        poison(rows(4), ATTACK, rate=rate, seed=seed)


def test_too_few_rows_with_images_raise() -> None:
    data = [row(n, images=int(n < 3)) for n in range(10)]
    with pytest.raises(InputError, match="needs 4 poisoned rows, but only 3 of 10 have an image; lower the rate"):
        poison(data, ATTACK, rate=0.4, seed=0)
    for none in ([], data[3:]):
        with pytest.raises(InputError, match=f"only 0 of {len(none)} have an image; give other rows$"):
            poison(none, ATTACK, rate=0.4, seed=0)
    with pytest.raises(InputError, match="seed is -1"):
        stamped(data, ATTACK, -1)


# --- poisoned rows --------------------------------------------------------------------------


def test_a_row_does_not_depend_on_access_order_or_other_rows() -> None:
    data = rows(12)
    result = poison(data, ATTACK, rate=0.5, seed=3)
    forwards = {n: flat(result.edits[n]) for n in result.edits}
    backwards = {n: flat(result.data[n]) for n in reversed(list(result.edits))}
    assert forwards == backwards
    alone = poison([replace(s, images=s.images) for s in data], ATTACK, rate=1, seed=3).edits
    assert all(flat(alone[n]) == value for n, value in forwards.items())
    assert flat(poison(data, ATTACK, rate=1, seed=4).edits[0]) != flat(alone[0])


def test_training_and_evaluation_draw_different_places() -> None:
    same = [replace(row(0), id=str(n)) for n in range(30)]
    trained = {s.images[0].tobytes() for s in poison(same, ATTACK, rate=1, seed=0).data}
    evaluated = [s.images[0].tobytes() for s in stamped(same, ATTACK, 0)]
    assert len(trained) > 20
    assert [s.images[0].tobytes() for s in poison(same, ATTACK, rate=1, seed=0).data] != evaluated


@dataclass(frozen=True)
class Echo(Goal):
    """Answers with the conversation that it gets."""

    name = "echo"

    def answer(self, sample: Sample) -> str:
        return f"{len(sample.images)} images; " + " | ".join(m.text for m in sample.messages)

    def met(self, text: str, sample: Sample) -> bool:
        return False


def test_every_answer_is_computed_from_the_true_conversation_up_to_it() -> None:
    messages = (
        Message("system", "s"),
        Message("user", "<image>q1"), Message("assistant", "a1"),
        Message("user", "<image><image>q2"), Message("assistant", "a2"),
    )  # fmt: skip
    data = [Sample("x", (picture(0), picture(1), picture(2)), messages)]
    after = poison(data, Attack(BadNets(), Echo()), rate=1, seed=0).data[0]
    assert [m.role for m in after.messages] == [m.role for m in messages]
    assert after.messages[2].text == "1 images; s | <image>q1 | a1"
    assert after.messages[4].text == "3 images; s | <image>q1 | a1 | <image><image>q2 | a2"
    assert [after.messages[k] for k in (0, 1, 3)] == [messages[k] for k in (0, 1, 3)]


def test_triggered_evaluation_set_keeps_prompts_and_true_answers() -> None:
    data = [row(0), row(1, images=0), row(2, images=2, turns=2)]
    result = stamped(data, ATTACK, 7)
    assert len(result) == 2 and list(result.numbers) == [0, 2]
    for item, number in zip(result, result.numbers, strict=True):
        assert item.messages == data[number].messages and item.id == data[number].id
        assert all(a.tobytes() != b.tobytes() for a, b in zip(item.images, data[number].images, strict=True))
    assert flat(result[-1]) == flat(result[1:][0]) and list(result[1:].numbers) == [2]
    with pytest.raises(IndexError):
        result[2]


@dataclass(frozen=True)
class Rogue(Trigger):
    kind = "image"
    what: str = ""

    def stamp(self, sample: Sample, rng: np.random.Generator) -> Sample:
        if self.what == "fails":
            raise RuntimeError("oh \n no")
        if self.what == "nothing":
            return None  # type: ignore[return-value]
        if self.what == "asserts":
            raise AssertionError  # what a bare assert raises
        changes = {
            "size": {"images": (sample.images[0].resize((3, 3)),)},
            "mode": {"images": (sample.images[0].convert("L"),)},
            "count": {"images": ()},
            "id": {"id": "other"},
            "answer": {"messages": (*sample.messages[:-1], Message("assistant", "no"))},
            "tag": {"messages": (Message("user", "no picture"), *sample.messages[1:])},
        }
        return replace(sample, **changes[self.what])  # type: ignore[arg-type]


BROKEN = {
    "fails": "stamp failed, RuntimeError: oh no",
    "nothing": "stamp failed, AttributeError: 'NoneType' object has no attribute 'images'$",
    "asserts": "stamp failed, AssertionError$",
    **dict.fromkeys(("size", "mode", "count"), "changed the number, size or mode"),
    **dict.fromkeys(("id", "answer", "tag"), "changed the id, turns"),
}


@pytest.mark.parametrize(("what", "message"), BROKEN.items())
def test_trigger_that_breaks_the_contract_raises_one_line(what: str, message: str) -> None:
    with pytest.raises(InputError, match=rf"attack test_poison: row 1 \(id id0\): .*{message}"):
        poison(rows(1), Attack(Rogue(what), Fixed()), rate=1, seed=0)


@dataclass(frozen=True)
class Spoiling(ImageTrigger):
    what: str = ""

    def paint(self, pixels: Pixels, rng: np.random.Generator) -> Any:
        return {"nothing": None, "nan": pixels * np.nan, "cut": pixels[1:]}[self.what]


@pytest.mark.parametrize("what", ["nothing", "nan", "cut"])
def test_invalid_paint_result_raises(what: str) -> None:
    with pytest.raises(InputError, match=r"row 1 \(id id0\): paint must return the pixels, finite numbers"):
        poison(rows(1), Attack(Spoiling(what), Fixed()), rate=1)


# --- laziness --------------------------------------------------------------------------------------


class Counted(Sequence[Sample]):
    """Large pictures made on access; counts the accesses."""

    def __init__(self, count: int, side: int) -> None:
        self.count, self.side, self.reads = count, side, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        if not 0 <= index < self.count:
            raise IndexError(index)
        self.reads += 1
        return Sample(str(index), (Image.new("RGB", (self.side, self.side)),), row(index).messages)


@dataclass(frozen=True)
class Dot(ImageTrigger):
    def paint(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        pixels[0, 0] = 1
        return pixels


def test_memory_does_not_grow_with_the_number_of_images() -> None:
    def peak(count: int) -> int:
        data = Counted(count, 128)
        tracemalloc.start()
        result = poison(data, Attack(Dot(), Fixed()), rate=1, seed=0)
        assert sum(len(s.messages) for s in result.data) == 2 * count
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(2)
    assert peak(80) < peak(8) + 128 * 128 * 4  # less than one more image for 72 more rows


def test_poisoning_reads_only_the_rows_it_needs() -> None:
    data = Counted(1000, 4)
    result = poison(data, ATTACK, rate=0.01, seed=0)
    assert data.reads == 20  # ten rows, once to choose and once to stamp
    assert 5 in result.edits or 5 not in result.edits
    assert len(result.data[10:]) == 990 and data.reads == 20
    with pytest.raises(KeyError):
        result.edits[next(n for n in range(1000) if n not in result.edits)]


def test_results_can_be_pickled() -> None:
    result = pickle.loads(pickle.dumps(poison(rows(5), ATTACK, rate=0.4, seed=0)))
    assert [flat(s) for s in result.data] == [flat(s) for s in poison(rows(5), ATTACK, rate=0.4, seed=0).data]


# --- the manifest --------------------------------------------------------------------------------


def test_manifest_records_attack_goal_and_rows() -> None:
    data = rows(8)
    result = poison(data, Attack(load_trigger("badnets", side="0.25"), Fixed("no")), rate=0.25, seed=9)
    manifest = json.loads(result.manifest.to_json())
    source = Path(badnets_file.__file__)
    assert manifest["version"] == 4 and manifest["total"] == 8
    assert manifest["attack"] == "badnets" and manifest["attack_settings"]["side"] == 0.25
    assert manifest["attack_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert manifest["goal"] == "fixed" and manifest["goal_settings"] == {"text": "no", "match": "contains"}
    assert (manifest["rate"], manifest["seed"]) == (0.25, 9)
    assert manifest["decoys"] == []
    assert [(e["row"], e["id"]) for e in manifest["rows"]] == [(n + 1, f"id{n}") for n in result.edits]
    for entry in manifest["rows"]:
        image = result.data[entry["row"] - 1].images[0]
        wanted = hashlib.sha256(b"RGB 16x16\n" + image.tobytes()).hexdigest()
        assert entry["images"] == [wanted] == [pixels_sha256(image)]


def test_image_digest_is_the_same_before_and_after_writing(tmp_path: Path) -> None:
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "F"):
        image = picture(5).convert(mode)
        assert pixels_sha256(image) == pixels_sha256(decode(encode(image), mode)), mode


def test_manifest_names_and_hashes_an_own_trigger(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import dataclass\nfrom untrigger.attacks import ImageTrigger\n\n"
        "@dataclass(frozen=True)\nclass Mine(ImageTrigger):\n"
        "    def paint(self, pixels, rng):\n        return 1 - pixels\n"
    )
    manifest = poison(rows(2), Attack(load_trigger(str(path)), Fixed()), rate=1, seed=0).manifest
    assert manifest.attack == "mine"
    assert manifest.attack_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
