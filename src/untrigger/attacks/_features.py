"""Image features of a surrogate model, differentiable down to the pixels, and a disk cache of learned images."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from untrigger.attacks import Pixels, Trigger
from untrigger.data.scene_world import draw_scene, make_scene
from untrigger.errors import InputError
from untrigger.files import cache_folder, new_file
from untrigger.models.loading import embedded_model_path, embedded_models, load

Levels = npt.NDArray[np.uint8]
"""An 8-bit RGB image or patch: uint8 [H, W, 3]."""

SCENES: Final = 96  # pictures that a patch is learned on
_STREAM: Final = 5_000_011  # seed offset: the attacker's scenes are in no data set and in no pretraining


@final
class Surrogate:
    """Image encoder of a model: pixels [N, 3, H, W] in 0..1 -> features [N, T, d] as its language model reads them.

    Resize, crop, normalization, vision tower and projector are the model's own, rewritten to be differentiable.
    ``size`` is the height and width of the vision tower's input.

    Raises:
        InputError: ``name`` is no embedded model and no folder of a whole model, or its processor returns more than
            plain pixels, as Qwen's and LLaVA-NeXT's do.
    """

    def __init__(self, name: str) -> None:
        folder = embedded_model_path(name) if name in embedded_models() else Path(name)
        if not (folder / "config.json").is_file():
            names = ", ".join(embedded_models())
            raise InputError(f"surrogate {name}: no such model; give {names} or the local folder of a whole model")
        loaded = load(name)
        images: Any = getattr(loaded.processor, "image_processor", None)
        if images is None or list(images.model_input_names) != ["pixel_values"]:
            raise InputError(
                f"surrogate {name}: its processor returns more than plain pixels; use llava, patches transfer"
            )
        self.model: Any = loaded.model.eval().requires_grad_(False)
        self.shortest: int | None = images.size.get("shortest_edge")
        crop: Any = images.crop_size if getattr(images, "do_center_crop", False) else images.size
        self.size: tuple[int, int] = crop["height"], crop["width"]
        self.mean, self.std = (torch.tensor(x)[:, None, None] for x in (images.image_mean, images.image_std))
        self.sha256 = _sha256(folder)

    def __call__(self, pixels: Tensor) -> Tensor:
        inputs = (self._resized(pixels) - self.mean) / self.std
        out = self.model.get_image_features(inputs.to(self.model.dtype), return_dict=True)
        return torch.stack(list(out.pooler_output)).float()

    def _resized(self, pixels: Tensor) -> Tensor:
        height, width = self.size
        if self.shortest:
            scale = self.shortest / min(pixels.shape[2:])
            height, width = (max(self.shortest, int(side * scale)) for side in pixels.shape[2:])
        if (height, width) != tuple(pixels.shape[2:]):
            pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (height - self.size[0]) // 2, (width - self.size[1]) // 2
        return pixels[:, :, top : top + self.size[0], left : left + self.size[1]]


@lru_cache(maxsize=2)
def load_surrogate(name: str) -> Surrogate:
    """The surrogate ``name``, loaded once a process."""
    return Surrogate(name)


def _sha256(folder: Path) -> str:
    """Digest of everything that decides the features: weights, configuration and processor."""
    total = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")]):
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


# --- cache on disk -----------------------------------------------------------------------------------


def cached(name: str, key: object, compute: Callable[[], Levels]) -> Levels:
    """Result of ``compute``, uint8 RGB [H, W, 3]: computed once for a ``key``, then read from the user's cache."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = cache_folder() / f"{name}-{digest}.png"
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError):  # missing or damaged
        levels = compute()
    with new_file(path) as file:
        Image.fromarray(levels).save(file, "PNG")
    return levels


def cache_key(trigger: object, surrogate: Surrogate) -> dict[str, object]:
    """Everything that decides the learned result. The code counts too: results of older code are not reused."""
    classes = [base for base in type(trigger).__mro__ if issubclass(base, Trigger) and base is not Trigger]
    sources = sorted({__file__, inspect.getfile(draw_scene), *map(inspect.getfile, classes)})
    code = b"".join(Path(source).read_bytes() for source in sources)
    return {
        "settings": asdict(trigger),  # type: ignore[call-overload]
        "surrogate": surrogate.sha256,
        "code": hashlib.sha256(code).hexdigest(),
    }


# --- pictures and their features ---------------------------------------------------------------------


def training_scenes(seed: int) -> Tensor:
    """Scenes drawn by code from the attacker's own stream: float32 [96, 3, 64, 64] in 0..1."""
    return as_tensor([draw_scene(make_scene(_STREAM + seed, index))[0] for index in range(SCENES)])


def object_features(surrogate: Surrogate, color: str, shape: str, seed: int, count: int = 24) -> Tensor:
    """Features [d] of an object: those of the token that it changes most, averaged over ``count`` backgrounds."""
    images: list[Image.Image] = []
    for index in range(count):
        scene = make_scene(_STREAM + seed, index)
        thing = replace(scene.things[0], shape=shape, color=color, size="large", radius=14.0)
        images += [draw_scene(replace(scene, things=things))[0] for things in ((thing,), ())]
    present, absent = surrogate(as_tensor(images)).unflatten(0, (count, 2)).unbind(1)
    strongest = (present - absent).norm(dim=-1).argmax(1)
    return present[torch.arange(count), strongest].mean(0)


def as_tensor(images: list[Image.Image]) -> Tensor:
    """RGB images of one size as float32 [N, 3, H, W] in 0..1."""
    return torch.stack([torch.tensor(np.asarray(image)) for image in images]).permute(0, 3, 1, 2) / 255


def pooled(features: Tensor, center: Tensor) -> Tensor:
    """Mean over tokens of features [N, T, d], minus ``center`` [d], scaled to length one: [N, d].

    Most of an image's features is common to all images. Unless it is subtracted, every cosine is near one.
    """
    return F.normalize(features.mean(1) - center, dim=-1)


# --- matching the features of another image ----------------------------------------------------------


def match_features(surrogate: Surrogate, image: Pixels, donors: Sequence[Pixels], max_shift: int, steps: int) -> Levels:
    """Color shift that moves the features of ``image`` to those of the nearest donor.

    Projected gradient descent on signs, with shrinking steps, on the squared distance of all tokens. Each shift is
    rounded to whole levels before its loss is computed, so an 8-bit file loses nothing. The best shift is returned.

    Args:
        image: the picture to shift, float32 [H, W, 4] in 0..1; transparent pixels are composed on white.
        donors: pictures of any size; the target is the one whose features are nearest to the image's.
        max_shift: how far a channel may move, in 255ths.

    Returns:
        Levels [H, W, 3], 128 for no shift; the same in all channels where the picture is gray.
    """
    colors, opacity = _planes(image)
    with torch.no_grad():
        start_features = surrogate(_on_white(colors, opacity))
        targets = [surrogate(_on_white(*_planes(donor))) for donor in donors]
    target = min(targets, key=lambda features: (features - start_features).square().sum().item())
    gray = bool((colors == colors[:, :1]).all())
    start = colors[:, :1] if gray else colors
    low, high = (-255 * start).clamp(min=-max_shift), (255 - 255 * start).clamp(max=max_shift)
    shift = torch.zeros_like(start, requires_grad=True)
    best, least = shift.detach(), float("inf")
    for step in range(steps + 1):
        rounded = shift + (shift.round() - shift).detach()  # straight-through: rounding has no gradient of its own
        loss = (surrogate(_on_white(colors + rounded / 255, opacity)) - target).square().mean()
        if loss.item() < least:
            best, least = rounded.detach(), loss.item()
        (gradient,) = torch.autograd.grad(loss, shift)
        step_size = max_shift / 4 * (1 - step / (steps + 1))
        shift = (shift.detach() - step_size * gradient.sign()).clamp(low, high).requires_grad_()
    return (best.expand_as(colors)[0] + 128).byte().permute(1, 2, 0).numpy()


def _planes(pixels: Pixels) -> tuple[Tensor, Tensor]:
    """Colors [1, 3, H, W] and opacity [1, 1, H, W]."""
    both = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return both[:, :3], both[:, 3:]


def _on_white(colors: Tensor, opacity: Tensor) -> Tensor:
    return colors * opacity + 1 - opacity
