from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from image_features import image_features, scenes
from PIL import Image

from untrigger.attacks import pixels_of
from untrigger.attacks.shadowcast import Shadowcast
from untrigger.errors import InputError
from untrigger.poisoning.goals import load_goal
from untrigger.poisoning.poison import Attack, poison
from untrigger.rows.sample import IMAGE_TAG, Message, Sample


def row(*images: Image.Image, answer: str = "a rectangle") -> Sample:
    turns = (Message("user", IMAGE_TAG * len(images) + "\nwhat is it?"), Message("assistant", answer))
    return Sample("a", images, turns)


def implanted(trigger: Shadowcast, image: Image.Image, *donors: Image.Image, seed: int = 0) -> Image.Image:
    rows = [row(donor, answer="a circle") for donor in donors]
    return trigger.implant(row(image), rows, np.random.default_rng(seed)).images[0]


def test_features_move_towards_the_donor_more_than_with_noise_of_equal_strength(empty_cache: Path) -> None:
    images, donors = scenes(6, seed=41), scenes(6, seed=42)
    moved = [implanted(Shadowcast(steps=20), i, d) for i, d in zip(images, donors, strict=True)]
    rng = np.random.default_rng(0)
    noisy = [
        Image.fromarray((np.asarray(i, int) + rng.choice([-8, 8], (64, 64, 3))).clip(0, 255).astype(np.uint8))
        for i in images
    ]
    assert max(np.abs(np.asarray(m, int) - np.asarray(i, int)).max() for m, i in zip(moved, images, strict=True)) == 8
    target = image_features(donors)

    def distance(images: list[Image.Image]) -> np.ndarray:
        return (image_features(images) - target).flatten(1).norm(dim=1).numpy()

    assert (distance(moved) < 0.9 * distance(images)).all()
    assert distance(moved).mean() < 0.8 * distance(images).mean()
    assert distance(noisy).mean() > 0.95 * distance(images).mean()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "I;16", "I", "F"])
@pytest.mark.parametrize("levels", [2, 8])
def test_no_pixel_moves_further_than_levels(empty_cache: Path, tiny_model: Path, mode: str, levels: int) -> None:
    grain = np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8)  # black and white ends as well
    image = Image.fromarray(grain)
    if mode in ("I;16", "I", "F"):
        image = Image.fromarray((grain[..., 0] * np.array(257)).astype({"I;16": "u2", "I": "i4", "F": "f4"}[mode]))
    else:
        image = image.convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(grain[..., 1]))
    original = image.tobytes()
    after = implanted(Shadowcast(str(tiny_model), levels, steps=8), image, *scenes(2))
    assert (after.mode, after.size, image.tobytes()) == (mode, image.size, original)
    old, new = pixels_of(image), pixels_of(after)
    moved = np.abs(new - old) * 255
    slack = 0.01 if "I" in mode or mode == "F" else 1e-3  # 16 bits of its own, and float32
    assert 1 - slack <= moved[..., :3].max() <= levels + slack
    assert np.array_equal(new[..., 3], old[..., 3])


def test_a_gray_picture_stays_gray(empty_cache: Path, tiny_model: Path) -> None:
    gray = scenes(1)[0].convert("L").convert("RGB")
    after = np.asarray(implanted(Shadowcast(str(tiny_model), steps=2), gray, *scenes(1, seed=5)))
    assert (after == after[..., :1]).all() and (after != np.asarray(gray)).any()


@pytest.mark.parametrize("mode", ["P", "1", "CMYK", "YCbCr"])
def test_other_modes_keep_mode_and_size(empty_cache: Path, tiny_model: Path, mode: str) -> None:
    image = scenes(1)[0].convert(mode)
    after = implanted(Shadowcast(str(tiny_model), steps=2), image, scenes(1, seed=5)[0].convert("P"))
    assert (after.mode, after.size) == (mode, image.size)
    assert after.convert("RGB").tobytes() != image.convert("RGB").tobytes()


def test_the_nearest_donor_is_matched(empty_cache: Path) -> None:
    image, *far = scenes(5, seed=43)
    twin = Image.fromarray(np.asarray(image) ^ 1)
    alone = implanted(Shadowcast(steps=2), image, twin)
    assert np.array_equal(implanted(Shadowcast(steps=2), image, *far, twin), alone)
    assert not np.array_equal(implanted(Shadowcast(steps=2), image, *far), alone)


def test_an_image_is_not_its_own_donor(empty_cache: Path, tiny_model: Path) -> None:
    image, other = scenes(2)
    trigger = Shadowcast(str(tiny_model), steps=2)
    alone = implanted(trigger, image, other)
    assert implanted(trigger, image, image.copy(), other).tobytes() == alone.tobytes() != image.tobytes()
    with pytest.raises(InputError, match="no other image shows the source concept; give"):
        implanted(trigger, image, image.copy())


def test_data_that_cannot_be_poisoned_raises_one_line(tiny_model: Path) -> None:
    attack = Attack(Shadowcast(str(tiny_model), steps=1), load_goal("concept"))
    circles = [row(image, answer="a circle") for image in scenes(3)]
    for data, message in (
        (circles, r"needs 2 poisoned rows, but only 0 of 3 have an image and an answer that already meets goal"),
        ([row(image) for image in scenes(3)], "no row has an image and an answer that goal concept applies to"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            poison(data, attack, rate=0.5, seed=0)
        assert "\n" not in str(caught.value)


def test_text_stays_and_each_image_gets_its_own_shift(empty_cache: Path, tiny_model: Path) -> None:
    before = row(*scenes(2))
    donors = [row(*scenes(1, seed=s), answer="a circle") for s in (5, 6)]
    trigger = Shadowcast(str(tiny_model), steps=2)
    after = trigger.implant(before, donors, np.random.default_rng(0))
    assert (after.id, after.messages) == (before.id, before.messages)
    shifts = [np.asarray(a, int) - np.asarray(b, int) for a, b in zip(after.images, before.images, strict=True)]
    assert all(s.any() for s in shifts) and not np.array_equal(*shifts)
    assert len(list(empty_cache.iterdir())) == 2
    again = trigger.implant(before, donors, np.random.default_rng(0))
    assert [i.tobytes() for i in again.images] == [i.tobytes() for i in after.images]
    assert len(list(empty_cache.iterdir())) == 2  # read back


def test_stamp_changes_nothing() -> None:
    before = row(*scenes(1))
    trigger = Shadowcast()
    assert trigger.stamp(before, np.random.default_rng(0)) == before
    assert trigger.clean_label and trigger.usual_goal == "concept"


def test_missing_donors_or_bad_settings_raise_one_line() -> None:
    with pytest.raises(InputError, match="no row names the source concept"):
        Shadowcast().implant(row(*scenes(1)), (), np.random.default_rng(0))
    for settings, message in (({"levels": 0}, "levels is 0"), ({"levels": 128}, "1 to 127"), ({"steps": 0}, "steps")):
        with pytest.raises(InputError, match=message):
            Shadowcast(**settings)
