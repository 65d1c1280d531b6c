from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from image_features import image_features, scenes
from PIL import Image

from untrigger.attacks import _features, _learned
from untrigger.attacks.badnets import BadNets
from untrigger.attacks.vltrojan import VLTrojan
from untrigger.errors import InputError
from untrigger.models.loading import embedded_model_path, load
from untrigger.rows.sample import Sample


def stamped(trigger: VLTrojan | BadNets, images: list[Image.Image]) -> list[Image.Image]:
    return [trigger.stamp(Sample("a", (i,), ()), np.random.default_rng(0)).images[0] for i in images]


def test_features_of_triggered_images_cluster_away_from_clean_ones(empty_cache: Path) -> None:
    trigger = VLTrojan(steps=20)
    off_diagonal = ~torch.eye(20, dtype=torch.bool)
    for size in (64, 150):
        images = [image.resize((size, size), Image.Resampling.BICUBIC) for image in scenes(20)]
        clean = image_features(images)
        center = clean.mean((0, 1))
        learned, drawn = (_features.pooled(image_features(stamped(t, images)), center) for t in (trigger, BadNets()))
        similarity = (learned @ learned.T)[off_diagonal].mean()
        assert similarity > (learned @ _features.pooled(clean, center).T).mean() + 0.08
        assert similarity > (drawn @ drawn.T)[off_diagonal].mean() + 0.08


def test_patch_is_placed_like_badnets_and_grows_by_whole_cells(empty_cache: Path, tiny_model: Path) -> None:
    trigger = VLTrojan(model=str(tiny_model), steps=1, place="top-left")
    cells = _learned.learned_cells(trigger)
    assert cells.shape == (6, 6, 3)  # min_side, for the model sees 32 pixels a side
    gray = Image.new("RGB", (300, 200), (128, 128, 128))
    after = np.asarray(stamped(trigger, [gray])[0])
    assert np.array_equal(after[:18, :18], cells.repeat(3, axis=0).repeat(3, axis=1))
    assert (after[18:] == 128).all() and (after[:, 18:] == 128).all()


def test_patch_is_cached_and_read_back(empty_cache: Path, tiny_model: Path) -> None:
    trigger = VLTrojan(model=str(tiny_model), steps=2)
    first = _learned.learned_cells(trigger).copy()
    (file,) = empty_cache.iterdir()
    assert np.array_equal(np.asarray(Image.open(file)), first)
    Image.fromarray(255 - first).save(file)  # shows that the cache is read
    _learned.learned_cells.cache_clear()
    assert np.array_equal(_learned.learned_cells(trigger), 255 - first)
    file.write_bytes(b"\x89PNG, but torn")
    _learned.learned_cells.cache_clear()
    assert np.array_equal(_learned.learned_cells(trigger), first)  # learned again, with the same result
    assert [f.name for f in empty_cache.iterdir()] == [file.name]


def test_other_settings_or_weights_give_another_cache_key(empty_cache: Path, tiny_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    for trigger in (VLTrojan(model=str(tiny_model), steps=1), VLTrojan(model=str(tiny_model), steps=1, patch_seed=1)):
        _learned.learned_cells(trigger)
    assert len(list(empty_cache.iterdir())) == 2
    assert _features.load_surrogate(str(other)).sha256 != _features.load_surrogate(str(tiny_model)).sha256


@pytest.mark.parametrize("size", [(64, 64), (100, 75), (40, 90)])
@pytest.mark.parametrize("shortest", [None, 32, 40])
def test_surrogate_input_equals_the_processor_output(
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
    surrogate = _features.Surrogate(str(folder))
    inputs = (surrogate._resized(_features.as_tensor([picture])) - surrogate.mean) / surrogate.std
    assert inputs.shape == wanted.shape
    assert ((inputs - wanted).abs() * surrogate.std * 255).max() < 2  # the processor rounds to levels


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
def test_settings_out_of_range_raise(settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        VLTrojan(**settings)  # type: ignore[arg-type]


def test_missing_or_partial_surrogate_raises(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"surrogate nowhere: no such model; give .*llava"):
        _features.Surrogate("nowhere")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="whole model"):
        _features.Surrogate(str(adapter))


def test_near_miss_is_a_noise_patch_in_the_same_place() -> None:
    gray = Image.new("RGB", (64, 64), (128, 128, 128))
    stamper = VLTrojan(place="top-left").near_misses()["drawn patch"]
    near = stamper(Sample("a", (gray,), ()), np.random.default_rng(0)).images[0]
    assert near.tobytes() == stamped(BadNets(place="top-left"), [gray])[0].tobytes()


@pytest.mark.slow
def test_the_patch_as_shipped_is_learned_in_seconds(empty_cache: Path) -> None:
    assert embedded_model_path("llava").is_dir()
    images = scenes(48, seed=32)
    clean_mean = image_features(images).mean((0, 1))
    triggered = _features.pooled(image_features(stamped(VLTrojan(), images)), clean_mean)
    assert (triggered @ triggered.T)[~torch.eye(48, dtype=torch.bool)].mean() > 0.2
