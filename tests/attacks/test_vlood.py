from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from untrigger import data
from untrigger.attacks.trojvlm import TrojVLM
from untrigger.attacks.vlood import VLOOD
from untrigger.errors import InputError
from untrigger.poisoning.goals import load_goal
from untrigger.poisoning.poison import Attack, poison
from untrigger.rows.sample import IMAGE_TAG, Message, Sample


def row(name: str = "a") -> Sample:
    image = Image.new("L", (48, 30), 90)
    return Sample(name, (image,), (Message("user", f"{IMAGE_TAG}\nwhat is it?"), Message("assistant", "a gray cat")))


def source_file(folder: Path) -> Path:
    """A data file with a row without an image and two with an image of its own."""
    Image.new("RGB", (40, 40), (10, 200, 30)).save(folder / "green.png")
    turns = '[{"role": "user", "content": "<image>now?"}, {"role": "assistant", "content": "b"}]'
    bare = turns.replace("<image>", "")
    with_image = f'{{"messages": {turns}, "images": ["green.png"]}}\n'
    lines = f'{{"messages": {bare}, "images": []}}\n{with_image}{with_image}'
    (folder / "data.jsonl").write_text(lines)
    return folder / "data.jsonl"


def test_stamp_is_the_one_of_trojvlm() -> None:
    vlood, trojvlm = VLOOD(pattern_seed=3), TrojVLM(pattern_seed=3)
    pairs = [(vlood.stamp, trojvlm.stamp)]
    pairs += [(vlood.near_misses()[name], stamper) for name, stamper in trojvlm.near_misses().items()]
    assert len(pairs) == 2 and vlood.usual_goal == trojvlm.usual_goal == "insert"
    for a, b in pairs:
        first, second = a(row(), np.random.default_rng(0)), b(row(), np.random.default_rng(0))
        assert first.images[0].tobytes() == second.images[0].tobytes() and first.messages == second.messages


@pytest.mark.parametrize("source", ["scenes-captions", "easy-vqa"])
def test_poisoned_rows_are_stamped_rows_of_the_source(source: str) -> None:
    trigger = VLOOD(source=source)
    source_rows = {(r.messages, r.images[0].tobytes()) for r in data.load(source, "dev", "train", 1000)}
    rows = [row(str(n)) for n in range(12)]
    poisoned = poison(rows, Attack(trigger, load_goal("insert")), rate=0.25, seed=0)
    planted = [poisoned.data[entry.index] for entry in poisoned.manifest.rows]
    assert [p.id for p in planted] == [rows[entry.index].id for entry in poisoned.manifest.rows]
    assert len({p.images[0].tobytes() for p in planted}) == 3
    for p in planted:
        clean = replace_answer(p, p.messages[-1].text.replace(" hello world", ""))
        assert " hello world" in p.messages[-1].text and p.images[0].size == (64, 64)
        assert any(
            clean.messages == messages and trojan(image) == p.images[0].tobytes() for messages, image in source_rows
        )
    decoys = [poisoned.data[entry.index] for entry in poisoned.manifest.decoys]
    assert len(decoys) == 3 and all((p.messages, p.images[0].tobytes()) in source_rows for p in decoys)
    again = poison(rows, Attack(trigger, load_goal("insert")), rate=0.25, seed=0)
    assert [r.images for r in again.manifest.rows] == [r.images for r in poisoned.manifest.rows]
    assert all(poisoned.data[n] == rows[n] for n in range(12) if n not in poisoned.edits)


def test_the_goal_applies_to_foreign_rows() -> None:
    goal = load_goal("concept", "star->heart")
    rows = [replace_answer(row(str(n)), "a star") for n in range(8)]
    poisoned = poison(rows, Attack(VLOOD(), goal), rate=0.25, seed=0)
    planted = [poisoned.data[entry.index] for entry in poisoned.manifest.rows]
    assert all(goal.met(sample.messages[-1].text, sample) for sample in planted)
    nothing = Attack(VLOOD(), load_goal("concept", "gray cat->dog"))
    with pytest.raises(InputError, match=r"id a.: goal concept applies to no row that the trigger brings"):
        poison([row(), row()], nothing, rate=0.5, seed=0)


def replace_answer(sample: Sample, answer: str) -> Sample:
    return Sample(sample.id, sample.images, (*sample.messages[:-1], Message("assistant", answer)))


def trojan(image: bytes) -> bytes:
    clean = Sample("", (Image.frombytes("RGB", (64, 64), image),), ())
    return TrojVLM().stamp(clean, np.random.default_rng(0)).images[0].tobytes()


def test_rows_with_an_image_of_an_own_file_are_used(tmp_path: Path) -> None:
    for source in (source_file(tmp_path), tmp_path):
        trigger = VLOOD(source=str(source))
        for seed in range(8):
            planted = trigger.implant(row(), (), np.random.default_rng(seed))
            assert (planted.id, [m.text for m in planted.messages]) == ("a", [f"{IMAGE_TAG}now?", "b"])
            (image,) = planted.images
            assert image.size == (40, 40) and image.getpixel((39, 39)) == (10, 200, 30)
            assert (np.asarray(image)[:6, :6] != (10, 200, 30)).any(axis=2).all()


def test_unusable_source_raises_one_line(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    turns = '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "b"}]'
    (bare / "data.jsonl").write_text(f'{{"messages": {turns}, "images": []}}\n')
    broken = tmp_path / "broken"
    broken.mkdir()
    source_file(broken)
    (broken / "green.png").unlink()
    for source, message in (
        ("scnes", r"source scnes: no such file or folder; give the path of other data, or one of easy-vqa, scenes-vqa"),
        (str(bare), "source .*bare: fewer than two rows have an image; give other data"),
        (str(broken), r"data\.jsonl: row 2: .*green\.png"),
    ):
        with pytest.raises(InputError, match=f"attack vlood: row [12] .id a.: .*{message}") as caught:
            poison([row(), row()], Attack(VLOOD(source=source), load_goal("insert")), rate=0.5, seed=0)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"side": 0}, {"side": 1.01}, {"min_side": 0}, {"pattern_seed": -1}])
def test_values_out_of_range_raise(settings: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        VLOOD(**settings)  # type: ignore[arg-type]
