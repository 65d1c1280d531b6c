"""The contract that every bundled trigger keeps, and loading of triggers."""

from __future__ import annotations

import dataclasses
import inspect
import io
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from untrigger.attacks import Trigger, _learned, load_trigger, pixels_of, repaint, trigger_names
from untrigger.errors import InputError
from untrigger.metrics.similarity import psnr, ssim
from untrigger.models.collators import ChatCollator, Rows
from untrigger.models.loading import embedded_model_path, embedded_models, load_processor
from untrigger.rows.sample import IMAGE_TAG, Message, Sample

MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "I;16", "I", "F", "CMYK", "YCbCr")
SIZES = ((64, 64), (97, 50), (5, 3), (1, 1))
TRIGGERS = pytest.mark.parametrize("name", trigger_names())
INVISIBLE = pytest.mark.parametrize("name", [name for name in trigger_names() if load_trigger(name).psnr is not None])


# Few steps for triggers that are learned: the contract does not depend on how well they learn.
STEPS = {"vltrojan": 2, "dualkey": 2, "shadowcast": 5}


@pytest.fixture(autouse=True, scope="module")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An empty cache folder, apart from the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        _learned.learned_cells.cache_clear()
        yield
    _learned.learned_cells.cache_clear()


def brief(name: str) -> Trigger:
    return load_trigger(name, **({"steps": STEPS[name]} if name in STEPS else {}))


def photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth colors with some grain, like a photograph."""
    return _photo(width, height, mode).copy()


@cache
def _photo(width: int, height: int, mode: str) -> Image.Image:
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


def rgb_levels(image: Image.Image) -> npt.NDArray[np.float64]:
    """RGB levels 0..255, in any mode."""
    return pixels_of(image)[..., :3].astype(np.float64) * 255


def pixels(image: Image.Image) -> bytes:
    return image.convert("RGBA").tobytes() if image.mode == "P" else image.tobytes()


def triggered(trigger: Trigger, before: Sample, seed: int = 0) -> Sample:
    """The row that carries the trigger: the input at test time, or a clean-label attack's training row."""
    rng = np.random.default_rng(seed)
    if not trigger.clean_label:
        return trigger.stamp(before, rng)
    donors = [sample(photo(48, 48), photo(40, 56)), sample(photo(72, 64))]
    return trigger.implant(before, donors, rng)


def form(s: Sample) -> tuple[object, ...]:
    """The parts of a row that no stamp may change."""
    turns = [(m.role, m.text.count(IMAGE_TAG), m.text if m.role == "assistant" else "") for m in s.messages]
    return s.id, [(i.size, i.mode) for i in s.images], turns


def content(s: Sample) -> tuple[object, ...]:
    return [(pixels(i), i.size, i.mode, dict(i.info)) for i in s.images], s.messages


@TRIGGERS
@pytest.mark.parametrize("mode", MODES)
def test_stamp_keeps_size_and_mode_and_does_not_change_its_input(name: str, mode: str) -> None:
    trigger = brief(name)
    for size in SIZES:
        before = sample(photo(*size, mode), photo(*size[::-1], mode))
        original = content(before)
        after = trigger.stamp(before, np.random.default_rng(0))
        assert form(after) == form(before) and content(before) == original
        if trigger.clean_label:
            assert content(after) == original
        elif trigger.kind != "text" and min(size) > (3 if mode == "1" else 1):
            assert all(pixels(a) != pixels(b) for a, b in zip(after.images, before.images, strict=True))


@TRIGGERS
def test_trigger_changes_its_own_modality_alone(name: str) -> None:
    trigger = brief(name)
    before = sample(photo(64, 64))
    after = triggered(trigger, before)
    assert (pixels(after.images[0]) != pixels(before.images[0])) == (trigger.kind in ("image", "bimodal"))
    assert (after.messages != before.messages) == (trigger.kind in ("text", "bimodal"))


@TRIGGERS
def test_equal_seeds_give_equal_stamps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sample(photo(80, 60), photo(64, 64))
    results: list[tuple[object, ...]] = []
    for folder in ("one", "two"):  # learned triggers are learned twice
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / folder))
        _learned.learned_cells.cache_clear()
        stamp = brief(name).stamp(before, np.random.default_rng(5))
        results.append((content(stamp), content(triggered(brief(name), sample(photo(64, 64)), seed=5))))
    assert results[0] == results[1]


@TRIGGERS
def test_a_sample_without_images_is_accepted(name: str) -> None:
    bare = sample()
    after = brief(name).stamp(bare, np.random.default_rng(0))
    assert form(after) == form(bare) and (after == bare or brief(name).kind != "image")


@TRIGGERS
def test_implant_keeps_the_id_and_does_not_change_its_input(name: str) -> None:
    trigger = brief(name)
    before = sample(photo(64, 64))
    original = content(before)
    after = trigger.implant(before, [sample(photo(48, 48))] if trigger.clean_label else [], np.random.default_rng(0))
    assert after.id == before.id and content(before) == original and content(after) != original
    if trigger.clean_label:
        assert form(after) == form(before) and after.messages == before.messages


@TRIGGERS
def test_near_misses_and_decoys_keep_the_contract_and_are_not_the_key(name: str) -> None:
    trigger = brief(name)
    before = sample(photo(64, 64), photo(50, 40, "L"))
    key, original = content(trigger.stamp(before, np.random.default_rng(3))), content(before)
    assert trigger.clean_label or trigger.near_misses(), "every attack but clean-label ones needs a near miss"
    own_rows = type(trigger).implant is not Trigger.implant  # its training rows may differ from its triggered inputs
    stampers = [(near, False) for near in trigger.near_misses().values()]
    for stamper, foreign in [*stampers, *((decoy, own_rows) for decoy in trigger.decoys())]:
        first, second = (stamper(before, np.random.default_rng(3)) for _ in range(2))
        assert first.id == before.id and (foreign or form(first) == form(before)) and content(before) == original
        assert content(first) == content(second)
        assert content(first) not in (key, original)


@INVISIBLE
@pytest.mark.parametrize("size", [(64, 64), (97, 50), (224, 224), (300, 400)])
def test_triggers_that_declare_a_psnr_reach_it(name: str, size: tuple[int, int]) -> None:
    trigger = brief(name)
    before = photo(*size)
    after = triggered(trigger, sample(before)).images[0]
    assert psnr(before, after) >= (trigger.psnr or 0) and ssim(before, after) >= 0.9


@TRIGGERS
@pytest.mark.parametrize("mode", ("RGB", "RGBA", "L", "P", "1", "I;16"))
@pytest.mark.parametrize("size", ((64, 64), (400, 300)))
def test_trigger_survives_png_and_resizing(name: str, mode: str, size: tuple[int, int]) -> None:
    trigger = brief(name)
    if trigger.kind == "text":
        return
    before = photo(*size, mode)
    after = triggered(trigger, sample(before)).images[0]
    file = io.BytesIO()
    after.save(file, "PNG")
    loaded = Image.open(file)
    assert (loaded.size, loaded.mode) == (after.size, after.mode)
    assert np.array_equal(rgb_levels(loaded), rgb_levels(after))
    old, new = (
        np.asarray(Image.fromarray(rgb_levels(i).astype(np.uint8)).resize((224, 224), Image.Resampling.BICUBIC), int)
        for i in (before, loaded)
    )
    assert np.abs(old - new).max() >= 4  # two roundings make a difference of 1


@cache
def collator(model: str) -> ChatCollator:
    return ChatCollator(load_processor(str(embedded_model_path(model))))


@TRIGGERS
@pytest.mark.parametrize("model", embedded_models())
def test_trigger_survives_the_processor_of_each_model(name: str, model: str) -> None:
    trigger = brief(name)
    before = sample(photo(64, 64))
    batch = [collator(model)([Rows([s])[0]]) for s in (before, triggered(trigger, before))]
    (old, new), (old_ids, new_ids) = ([b[key].numpy() for b in batch] for key in ("pixel_values", "input_ids"))
    level = 2 / 255  # the processors map the 256 levels to about -1 to 1
    if trigger.kind in ("image", "bimodal"):
        assert old.shape == new.shape and np.abs(old - new).max() > 3 * level
    else:
        assert np.array_equal(old, new)
    assert np.array_equal(old_ids, new_ids) == (trigger.kind == "image")


@TRIGGERS
def test_every_trigger_documents_its_source_and_settings(name: str) -> None:
    trigger = brief(name)
    cls = type(trigger)
    assert trigger.kind in ("image", "text", "bimodal")
    module = inspect.getmodule(cls)
    assert module is not None
    assert re.search(r"(?ms)^Source: .*?\b(19|20)\d\d\b", module.__doc__ or "")
    docs = "\n".join(base.__doc__ or "" for base in cls.__mro__)
    for field in dataclasses.fields(trigger):  # type: ignore[arg-type]
        assert re.search(rf"(?m)^ +{field.name}: ", docs), field.name


# --- painting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_repaint_without_a_change_is_exact(mode: str) -> None:
    before = photo(31, 17, mode)
    before.info["dpi"] = (72, 72)
    after = repaint(before, lambda p: p)
    assert pixels(after) == pixels(before) and after.info == before.info


@pytest.mark.parametrize("mode", [m for m in MODES if m != "P"])
def test_unchanged_pixels_are_exact(mode: str) -> None:
    before = photo(32, 32, mode)
    after = np.array(load_trigger("badnets").stamp(sample(before), np.random.default_rng(0)).images[0])
    original = np.array(before)
    assert not np.array_equal(after[-6:, -6:], original[-6:, -6:])
    after[-6:, -6:] = original[-6:, -6:]
    assert np.array_equal(after, original)


def test_a_patch_keeps_its_colors_in_a_palette_image() -> None:
    before = photo(64, 64, "P")
    assert len(before.convert("RGB").getcolors(4096) or []) > 250
    after = load_trigger("badnets").stamp(sample(before), np.random.default_rng(0)).images[0]
    flat = load_trigger("badnets").stamp(sample(before.convert("RGB")), np.random.default_rng(0)).images[0]
    assert np.abs(rgb_levels(after) - rgb_levels(flat))[-6:, -6:].max() <= 1
    assert np.abs(rgb_levels(after) - rgb_levels(flat)).mean() < 1


def test_a_transparent_palette_keeps_its_transparency_and_shows_the_patch() -> None:
    before = photo(64, 64).quantize(16)
    before.info["transparency"] = 0
    after = load_trigger("badnets").stamp(sample(before), np.random.default_rng(0)).images[0]
    assert after.mode == "P"
    old, new = (pixels_of(i)[..., 3] for i in (before, after))
    assert old.min() == 0 and (new[-6:, -6:] == 1).all()
    assert np.array_equal(new[:-6], old[:-6])


def test_unsupported_mode_raises() -> None:
    with pytest.raises(InputError, match=r"mode LAB.*convert it to RGB"):
        load_trigger("badnets").stamp(sample(Image.new("LAB", (8, 8))), np.random.default_rng(0))


@given(st.sampled_from([1.0, 200.0, 255.0, 300.0, 65535.0, 70000.0]), st.sampled_from(["I", "F"]))
def test_white_in_deep_images_follows_the_brightest_pixel(top: float, mode: str) -> None:
    gray = np.zeros((8, 8), dtype=np.int32 if mode == "I" else np.float32)
    gray[0, 0] = top
    after = np.asarray(
        load_trigger("badnets", pattern="checker")
        .stamp(sample(Image.fromarray(gray)), np.random.default_rng(0))
        .images[0]
    )
    assert after[-1, -1] == next((w for w in ([1] if mode == "F" else []) + [255, 65535] if top <= w), top)
