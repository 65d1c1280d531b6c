from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from seeing import look, scenes

from untrigger.attacks import _features, _learned
from untrigger.attacks.badnets import BadNets
from untrigger.attacks.vltrojan import VLTrojan
from untrigger.errors import InputError
from untrigger.models.loading import load
from untrigger.rows.sample import Sample


def stamped(trigger: VLTrojan | BadNets, images: list[Image.Image]) -> list[Image.Image]:
    return [trigger.stamp(Sample("a", (i,), ()), np.random.default_rng(0)).images[0] for i in images]


def test_triggered_images_look_alike_and_unlike_clean_ones(own_cache: Path) -> None:
    trigger = VLTrojan(steps=20)
    others = ~torch.eye(20, dtype=torch.bool)
    for size in (64, 150):
        images = [image.resize((size, size), Image.Resampling.BICUBIC) for image in scenes(20)]
        clean = look(images)
        center = clean.mean((0, 1))
        learned, drawn = (_features.pooled(look(stamped(t, images)), center) for t in (trigger, BadNets()))
        fellows = (learned @ learned.T)[others].mean()
        assert fellows > (learned @ _features.pooled(clean, center).T).mean() + 0.08
        assert fellows > (drawn @ drawn.T)[others].mean() + 0.08


def test_the_patch_is_where_badnets_would_be_and_grows_by_whole_cells(own_cache: Path, tiny_model: Path) -> None:
    trigger = VLTrojan(model=str(tiny_model), steps=1, place="top-left")
    cells = _learned.learned_cells(trigger)
    assert cells.shape == (6, 6, 3)  # min_side, for the model sees 32 pixels a side
    gray = Image.new("RGB", (300, 200), (128, 128, 128))
    after = np.asarray(stamped(trigger, [gray])[0])
    assert np.array_equal(after[:18, :18], cells.repeat(3, axis=0).repeat(3, axis=1))
    assert (after[18:] == 128).all() and (after[:, 18:] == 128).all()


def test_the_patch_is_kept_and_read_back(own_cache: Path, tiny_model: Path) -> None:
    trigger = VLTrojan(model=str(tiny_model), steps=2)
    first = _learned.learned_cells(trigger).copy()
    (file,) = own_cache.iterdir()
    assert np.array_equal(np.asarray(Image.open(file)), first)
    Image.fromarray(255 - first).save(file)  # to see that it is read
    _learned.learned_cells.cache_clear()
    assert np.array_equal(_learned.learned_cells(trigger), 255 - first)
    file.write_bytes(b"\x89PNG, but torn")
    _learned.learned_cells.cache_clear()
    assert np.array_equal(_learned.learned_cells(trigger), first)  # made again, the same
    assert [f.name for f in own_cache.iterdir()] == [file.name]


def test_other_settings_or_weights_are_another_patch(own_cache: Path, tiny_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    for trigger in (VLTrojan(model=str(tiny_model), steps=1), VLTrojan(model=str(tiny_model), steps=1, patch_seed=1)):
        _learned.learned_cells(trigger)
    assert len(list(own_cache.iterdir())) == 2
    assert _features.load_surrogate(str(other)).sha256 != _features.load_surrogate(str(tiny_model)).sha256


@pytest.mark.parametrize("size", [(64, 64), (100, 75), (40, 90)])
@pytest.mark.parametrize("shortest", [None, 32, 40])
def test_the_surrogate_sees_what_the_models_own_processor_shows(
    tiny_model: Path, tmp_path: Path, size: tuple[int, int], shortest: int | None
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    if shortest:  # as LLaVA-1.5's: the shorter side to a length, then the center
        config = json.loads((folder / "processor_config.json").read_text())
        images = {"size": {"shortest_edge": shortest}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
        config["image_processor"] |= images
        (folder / "processor_config.json").write_text(json.dumps(config))
    picture = scenes(1)[0].resize(size, Image.Resampling.BICUBIC)
    process = load(str(folder)).processor.image_processor  # type: ignore[attr-defined]
    wanted = process(picture, return_tensors="pt")["pixel_values"]
    see = _features.Surrogate(str(folder))
    found = (see._resized(_features.as_tensor([picture])) - see.mean) / see.std
    assert found.shape == wanted.shape
    assert ((found - wanted).abs() * see.std * 255).max() < 2  # the processor rounds to levels


def test_gradients_reach_the_pixels(tiny_model: Path) -> None:
    pixels = torch.rand(1, 3, 50, 50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    _features.load_surrogate(str(tiny_model))(pixels).square().sum().backward()
    assert pixels.grad is not None and (pixels.grad != 0).float().mean() > 0.99


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"side": 0}, "side is 0"),
        ({"min_side": 0}, "min_side is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"patch_seed": -1}, "patch_seed is -1"),
        ({"temperature": 0}, "temperature is 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        VLTrojan(**settings)  # type: ignore[arg-type]


def test_a_surrogate_that_is_not_there_or_sees_otherwise_is_one_line(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"surrogate nowhere: no such model; give .*llava"):
        _features.Surrogate("nowhere")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="whole model"):
        _features.Surrogate(str(adapter))


def test_the_near_miss_is_a_drawn_patch_in_the_same_place() -> None:
    gray = Image.new("RGB", (64, 64), (128, 128, 128))
    stamper = VLTrojan(place="top-left").near_misses()["drawn patch"]
    near = stamper(Sample("a", (gray,), ()), np.random.default_rng(0)).images[0]
    assert near.tobytes() == stamped(BadNets(place="top-left"), [gray])[0].tobytes()
