"""One contract over every trigger file in the folder, and the way triggers are found."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from untrigger.attacks import Trigger, load_trigger, pixels_of, repaint, trigger_names
from untrigger.errors import InputError
from untrigger.sample import Message, Sample

MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "I;16", "I", "F", "CMYK", "YCbCr")
SIZES = ((64, 64), (97, 50), (5, 3), (1, 1))
TRIGGERS = pytest.mark.parametrize("name", trigger_names())


def photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth colours with some grain, as photographs have."""
    rng = np.random.default_rng(width * 1000 + height)
    coarse = Image.fromarray(rng.integers(40, 216, (4, 4, 3), dtype=np.uint8)).resize((width, height), 3)
    noisy = np.asarray(coarse, dtype=np.float64) + rng.normal(0, 6, (height, width, 3))
    image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    if mode in ("I;16", "I"):
        deep = np.asarray(image.convert("L")).astype(np.uint16) * 257
        return Image.fromarray(deep if mode == "I;16" else deep.astype(np.int32))
    if mode == "F":
        return Image.fromarray(np.asarray(image.convert("L"), dtype=np.float32) / 255)
    if mode == "P":
        return image.quantize(256)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)))
    return image.convert(mode)


def sample(*images: Image.Image) -> Sample:
    tags = "<image>\n" * len(images)
    turns = (
        Message("system", "Be brief."),
        Message("user", f"{tags}What is it?"),
        Message("assistant", "A cat."),
    )
    return Sample("a", images, turns)


def seen(image: Image.Image) -> npt.NDArray[np.float64]:
    """RGB levels 0..255, whatever the mode."""
    return pixels_of(image)[..., :3].astype(np.float64) * 255


def pixels(image: Image.Image) -> bytes:
    return image.convert("RGBA").tobytes() if image.mode == "P" else image.tobytes()


@TRIGGERS
@pytest.mark.parametrize("mode", MODES)
def test_size_and_mode_stay_and_the_input_is_not_touched(name: str, mode: str) -> None:
    trigger = load_trigger(name)
    for size in SIZES:
        before = sample(photo(*size, mode), photo(*size[::-1], mode))
        kept = [(pixels(image), dict(image.info)) for image in before.images]
        after = trigger.stamp(before, np.random.default_rng(0))
        assert [(i.size, i.mode) for i in after.images] == [(i.size, i.mode) for i in before.images]
        assert [(pixels(image), dict(image.info)) for image in before.images] == kept
        assert after.id == before.id and after.messages[2] == before.messages[2]
        if trigger.kind != "text" and min(size) > (3 if mode == "1" else 1):
            assert all(pixels(a) != pixels(b) for a, b in zip(after.images, before.images, strict=True))


@TRIGGERS
def test_an_attack_leaves_the_other_modality_alone(name: str) -> None:
    trigger = load_trigger(name)
    before = sample(photo(64, 64))
    after = trigger.stamp(before, np.random.default_rng(0))
    if trigger.kind == "image":
        assert after.messages == before.messages
    if trigger.kind == "text":
        assert pixels(after.images[0]) == pixels(before.images[0]) and after.messages != before.messages


@TRIGGERS
def test_equal_seeds_give_equal_stamps(name: str) -> None:
    before = sample(photo(80, 60), photo(64, 64))
    first, second = (load_trigger(name).stamp(before, np.random.default_rng(5)) for _ in range(2))
    assert first.messages == second.messages
    assert [i.tobytes() for i in first.images] == [i.tobytes() for i in second.images]


@TRIGGERS
def test_a_sample_without_images_is_no_error(name: str) -> None:
    bare = sample()
    if load_trigger(name).kind == "image":
        assert load_trigger(name).stamp(bare, np.random.default_rng(0)) == bare


@TRIGGERS
@pytest.mark.parametrize("mode", ("RGB", "RGBA", "L", "P", "1", "I;16"))
@pytest.mark.parametrize("size", ((64, 64), (400, 300)))
def test_the_trigger_survives_a_file_and_the_resize_to_the_model(name: str, mode: str, size: tuple[int, int]) -> None:
    trigger = load_trigger(name)
    if trigger.kind == "text":
        return
    before = photo(*size, mode)
    after = trigger.stamp(sample(before), np.random.default_rng(0)).images[0]
    file = io.BytesIO()
    after.save(file, "PNG")
    loaded = Image.open(file)
    assert (loaded.size, loaded.mode) == (after.size, after.mode)
    assert np.array_equal(seen(loaded), seen(after))
    was, now = (
        np.asarray(Image.fromarray(seen(i).astype(np.uint8)).resize((224, 224), Image.Resampling.BICUBIC), int)
        for i in (before, loaded)
    )
    assert np.abs(was - now).max() >= 4  # two roundings make a difference of 1


def test_the_folder_holds_the_triggers_and_each_says_what_it_changes() -> None:
    assert {"badnets", "blended"} <= set(trigger_names())
    assert all(load_trigger(name).kind in ("image", "text", "bimodal") for name in trigger_names())


# --- painting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_repainting_nothing_changes_nothing(mode: str) -> None:
    before = photo(31, 17, mode)
    before.info["dpi"] = (72, 72)
    after = repaint(before, lambda p: p)
    assert pixels(after) == pixels(before) and after.info == before.info


@pytest.mark.parametrize("mode", [m for m in MODES if m != "P"])
def test_pixels_that_the_trigger_leaves_alone_are_exact(mode: str) -> None:
    before = photo(32, 32, mode)
    after = np.array(load_trigger("badnets").stamp(sample(before), np.random.default_rng(0)).images[0])
    was = np.array(before)
    assert not np.array_equal(after[-6:, -6:], was[-6:, -6:])
    after[-6:, -6:] = was[-6:, -6:]
    assert np.array_equal(after, was)


def test_a_patch_keeps_its_colours_in_a_palette_image() -> None:
    before = photo(64, 64, "P")
    assert len(before.convert("RGB").getcolors(4096) or []) > 250
    after = load_trigger("badnets").stamp(sample(before), np.random.default_rng(0)).images[0]
    flat = load_trigger("badnets").stamp(sample(before.convert("RGB")), np.random.default_rng(0)).images[0]
    assert np.abs(seen(after) - seen(flat))[-6:, -6:].max() <= 1
    assert np.abs(seen(after) - seen(flat)).mean() < 1


def test_a_transparent_palette_keeps_its_transparency_and_shows_the_patch() -> None:
    before = photo(64, 64).quantize(16)
    before.info["transparency"] = 0
    after = load_trigger("badnets").stamp(sample(before), np.random.default_rng(0)).images[0]
    assert after.mode == "P"
    was, now = (pixels_of(i)[..., 3] for i in (before, after))
    assert was.min() == 0 and (now[-6:, -6:] == 1).all()
    assert np.array_equal(now[:-6], was[:-6])


def test_a_mode_that_cannot_be_painted_is_one_line() -> None:
    with pytest.raises(InputError, match=r"mode LAB.*convert it to RGB"):
        load_trigger("badnets").stamp(sample(Image.new("LAB", (8, 8))), np.random.default_rng(0))


@given(st.sampled_from([1.0, 200.0, 255.0, 300.0, 65535.0, 70000.0]), st.sampled_from(["I", "F"]))
def test_white_in_deep_images_is_the_scale_that_holds_the_brightest(top: float, mode: str) -> None:
    grey = np.zeros((8, 8), dtype=np.int32 if mode == "I" else np.float32)
    grey[0, 0] = top
    after = np.asarray(
        load_trigger("badnets", pattern="checker")
        .stamp(sample(Image.fromarray(grey)), np.random.default_rng(0))
        .images[0]
    )
    assert after[-1, -1] == next((w for w in ([1] if mode == "F" else []) + [255, 65535] if top <= w), top)


# --- finding triggers ----------------------------------------------------------------------------

OWN = """
from __future__ import annotations
from dataclasses import dataclass, replace
from typing import Literal
from untrigger.attacks import Trigger
from untrigger.sample import Message

@dataclass(frozen=True)
class Suffix(Trigger):
    kind = "text"
    word: str = "cf"
    times: int = 1
    loud: bool = False
    how: Literal["end", "start"] = "end"

    def stamp(self, sample, rng):
        turns = tuple(
            Message(m.role, m.text + f" {self.word}" * self.times) if m.role == "user" else m
            for m in sample.messages
        )
        return replace(sample, messages=turns)
"""


def own(folder: Path, text: str = OWN) -> str:
    path = folder / "mine.py"
    path.write_text(text)
    return str(path)


def test_a_users_own_file_loads_with_typed_settings_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = own(tmp_path)
    trigger = load_trigger(path, word="zz", times="2", loud="yes", how="start")
    assert (vars(trigger)) == {"word": "zz", "times": 2, "loud": True, "how": "start"}
    assert trigger.stamp(sample(), np.random.default_rng(0)).messages[1].text == "What is it? zz zz"
    assert [p.name for p in tmp_path.iterdir()] == ["mine.py"]
    own(tmp_path, OWN.replace('"cf"', '"qq"'))  # same length, same second: no stale copy
    assert vars(load_trigger(path))["word"] == "qq"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:\n", "line 1: SyntaxError"),
        ("x = 1\n\ny = nope\n", "line 3: NameError: name 'nope'"),
        ("import sys\nsys.exit(3)\n", "line 2: SystemExit"),
        ("raise ValueError('two\\nlines')\n", "ValueError: two lines;"),
        ("\0", "null bytes"),
        ("x = 1\n", r"holds 0 concrete Trigger classes \(none\)"),
        (
            OWN + OWN.partition("Literal\n")[2].replace("Suffix", "Prefix"),
            r"holds 2 concrete Trigger classes \(Suffix, Prefix\)",
        ),
        ("from untrigger.attacks.badnets import BadNets\n", "holds 0 concrete"),
        (OWN.replace("@dataclass(frozen=True)", ""), "not a dataclass"),
        (OWN.replace("word: str", "word: list"), "list.* must be a str, int, float, bool or Literal"),
        (OWN.replace('word: str = "cf"', "word: str"), None),
    ],
)
def test_a_broken_file_is_one_clear_line(tmp_path: Path, text: str, message: str | None) -> None:
    path = own(tmp_path, text)
    with pytest.raises(InputError, match=message or "setting 'word' has no default") as caught:
        load_trigger(path, **({"word": "x"} if message else {}))
    assert str(caught.value).startswith(path) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("badnet", {}, "'badnet' is unknown; choose one of .*badnets, blended"),
        ("__init__", {}, "is unknown"),
        ("nowhere/mine.py", {}, "nowhere/mine.py: no such file; .*badnets"),
        ("badnets", {"size": "3"}, "no setting 'size'; the settings are: pattern, side, min_side"),
        ("badnets", {"side": "a tenth"}, "attack badnets: side is 'a tenth'; give a number"),
        ("badnets", {"side": "nan"}, "give a number"),
        ("badnets", {"min-side": "2.5"}, "min-side is '2.5'; give a whole number"),
        ("badnets", {"min_side": True}, "give a whole number"),
        ("badnets", {"pattern": "dots"}, "pattern is 'dots'; choose one of noise, checker"),
    ],
)
def test_a_bad_name_or_setting_is_one_clear_line(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_trigger(name, **settings)
    assert "\n" not in str(caught.value)


def test_settings_come_as_text_or_typed() -> None:
    assert load_trigger("badnets", **{"side": "0.1", "min-side": "3"}) == load_trigger("badnets", side=0.1, min_side=3)
    assert isinstance(load_trigger("blended", alpha=1), Trigger)


def test_a_wrong_truth_value_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="loud is 'maybe'; give true or false"):
        load_trigger(own(tmp_path), loud="maybe")
    with pytest.raises(InputError, match="word is '3'; give text"):
        load_trigger(own(tmp_path), word=3)
