"""A surrogate's image features, differentiable down to the pixels, and what attacks learn on them."""

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
from untrigger.attacks._patch import LearnedPatch
from untrigger.data.scene_world import draw_scene, make_scene
from untrigger.errors import InputError
from untrigger.files import cache_folder, new_file
from untrigger.models.loading import embedded_model_path, embedded_models, load

Levels = npt.NDArray[np.uint8]

_STREAM: Final = 5_000_011  # of scenes: the attacker's own pictures, in no data set and no pretraining
_PICTURES, _BATCH = 96, 12
_RATE: Final = 0.05  # of Adam, in shares of the full range of a pixel


@final
class Surrogate:
    """The eyes of a model: pixels [N, 3, H, W] in 0..1 -> image features [N, T, d] as its language model reads them.

    The way from pixels to features (resize, crop, normalisation, vision tower, projector) is the model's own,
    rewritten so that it can be differentiated. ``size`` is the height and width that the vision tower sees.

    Raises:
        InputError: ``name`` is no embedded model and no folder of a whole model, or its processor gives more than
            plain pixels, as Qwen's and LLaVA-NeXT's do.
    """

    def __init__(self, name: str) -> None:
        folder = embedded_model_path(name) if name in embedded_models() else Path(name)
        if not (folder / "config.json").is_file():
            known = ", ".join(embedded_models())
            raise InputError(f"surrogate {name}: no such model; give {known} or the local folder of a whole model")
        loaded = load(name)
        images: Any = getattr(loaded.processor, "image_processor", None)
        if images is None or list(images.model_input_names) != ["pixel_values"]:
            raise InputError(
                f"surrogate {name}: its processor gives more than plain pixels; use llava, patches transfer"
            )
        self.model: Any = loaded.model.eval().requires_grad_(False)
        self.shortest: int | None = images.size.get("shortest_edge")
        crop: Any = images.crop_size if getattr(images, "do_center_crop", False) else images.size
        self.size: tuple[int, int] = crop["height"], crop["width"]
        self.mean, self.std = (torch.tensor(x)[:, None, None] for x in (images.image_mean, images.image_std))
        self.sha256 = _sha256(folder)

    def __call__(self, pixels: Tensor) -> Tensor:
        seen = (self._resized(pixels) - self.mean) / self.std
        out = self.model.get_image_features(seen.to(self.model.dtype), return_dict=True)
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
def surrogate(name: str) -> Surrogate:
    """The surrogate called ``name``, loaded once."""
    return Surrogate(name)


def _sha256(folder: Path) -> str:
    """Of all that decides the features: weights, configuration and processor."""
    total = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")]):
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


# --- kept results ----------------------------------------------------------------------------------


def kept(name: str, key: object, make: Callable[[], Levels]) -> Levels:
    """What ``make`` returns, 8-bit RGB [H, W, 3]: made once for a ``key``, then read from the user's cache folder."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = cache_folder() / f"{name}-{digest}.png"
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError):  # not there, or damaged
        levels = make()
    with new_file(path) as file:
        Image.fromarray(levels).save(file, "PNG")
    return levels


def recipe(trigger: object, see: Surrogate) -> dict[str, object]:
    """What the outcome of learning depends on, the code included: a patch of older code is not read back."""
    kinds = [kind for kind in type(trigger).__mro__ if issubclass(kind, Trigger) and kind is not Trigger]
    sources = sorted({__file__, inspect.getfile(draw_scene), *map(inspect.getfile, kinds)})
    code = b"".join(Path(source).read_bytes() for source in sources)
    return {
        "settings": asdict(trigger),  # type: ignore[call-overload]
        "surrogate": see.sha256,
        "code": hashlib.sha256(code).hexdigest(),
    }


# --- learning a patch ------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def learned(trigger: LearnedPatch) -> Levels:
    """The finished patch of a trigger, 8-bit RGB [K, K, 3], K pixels at the surrogate's own resolution."""
    see = surrogate(trigger.model)
    return kept(type(trigger).__name__.lower(), recipe(trigger, see), lambda: _learn(trigger, see))


def _learn(trigger: LearnedPatch, see: Surrogate) -> Levels:
    rng = np.random.default_rng(trigger.patch_seed)
    side = min(see.size)
    scenes = pictures(trigger.patch_seed)
    with torch.no_grad():
        loss = trigger.objective(see, see(scenes))
    cells = trigger.spot(side, side, rng)[2]
    patch = torch.from_numpy(rng.random((3, cells, cells), dtype=np.float32)).requires_grad_()
    optimizer = torch.optim.Adam([patch], lr=_RATE)
    slower = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, trigger.steps)
    for _ in range(trigger.steps):
        batch = scenes[torch.from_numpy(rng.permutation(_PICTURES)[:_BATCH])]
        # victims' images come in other sizes than the model's own: the patch must survive their resizing
        canvas = int(rng.integers(side, 2 * side + 1))
        shown = F.interpolate(batch, (canvas, canvas), mode="bicubic", antialias=True).clamp(0, 1)
        optimizer.zero_grad()
        loss(see(stuck(shown, patch, *trigger.spot(canvas, canvas, rng)))).backward()
        optimizer.step()
        slower.step()
        with torch.no_grad():
            patch.clamp_(0, 1)
    return (patch.detach() * 255).round().byte().permute(1, 2, 0).numpy()


def stuck(pixels: Tensor, patch: Tensor, top: int, left: int, side: int) -> Tensor:
    """``pixels`` [N, 3, H, W] with ``patch`` [3, K, K], enlarged to ``side`` by its nearest cells, at a place."""
    nearest = torch.arange(side) * patch.shape[-1] // side
    pixels = pixels.clone()
    pixels[:, :, top : top + side, left : left + side] = patch[:, nearest][:, :, nearest]
    return pixels


def pictures(seed: int) -> Tensor:
    """Generated scenes of the attacker's own stream, float32 [96, 3, 64, 64] in 0..1."""
    return as_tensor([draw_scene(make_scene(_STREAM + seed, index))[0] for index in range(_PICTURES)])


def likeness(see: Surrogate, color: str, shape: str, seed: int, count: int = 24) -> Tensor:
    """What an object looks like to the surrogate, [d]: the token that it changes most, on average over backgrounds."""
    images: list[Image.Image] = []
    for index in range(count):
        scene = make_scene(_STREAM + seed, index)
        thing = replace(scene.things[0], shape=shape, color=color, size="large", radius=14.0)
        images += [draw_scene(replace(scene, things=things))[0] for things in ((thing,), ())]
    present, absent = see(as_tensor(images)).unflatten(0, (count, 2)).unbind(1)
    strongest = (present - absent).norm(dim=-1).argmax(1)
    return present[torch.arange(count), strongest].mean(0)


def as_tensor(images: list[Image.Image]) -> Tensor:
    """RGB images of one size as float32 [N, 3, H, W] in 0..1."""
    return torch.stack([torch.tensor(np.asarray(image)) for image in images]).permute(0, 3, 1, 2) / 255


def pooled(features: Tensor, center: Tensor) -> Tensor:
    """Features [N, T, d], averaged over tokens, seen from ``center`` [d] and scaled to length one: [N, d].

    What all images have in common is most of their features; without taking it away every cosine is near one.
    """
    return F.normalize(features.mean(1) - center, dim=-1)


# --- making one picture look like another ------------------------------------------------------------


def imitation(see: Surrogate, image: Pixels, donors: Sequence[Pixels], levels: int, steps: int) -> Levels:
    """How to shift the colors of ``image`` for its features to become those of the nearest donor.

    Projected gradient descent on signs, with shrinking steps, on the squared distance of all tokens. Each shift is
    rounded to whole levels before it is judged, so that nothing is lost in an 8-bit file; the best one is returned.

    Args:
        image: the picture to shift, float32 [H, W, 4] in 0..1; a transparent one is seen on white.
        donors: pictures of any size; the one whose features are nearest to the image's is imitated.
        levels: how far a channel may move, in 255ths.

    Returns:
        Levels [H, W, 3], 128 for no shift; the same in all channels where the picture is gray.
    """
    colors, opacity = _planes(image)
    with torch.no_grad():
        own = see(_on_white(colors, opacity))
        targets = [see(_on_white(*_planes(donor))) for donor in donors]
    target = min(targets, key=lambda features: (features - own).square().sum().item())
    gray = bool((colors == colors[:, :1]).all())
    start = colors[:, :1] if gray else colors
    low, high = (-255 * start).clamp(min=-levels), (255 - 255 * start).clamp(max=levels)
    shift = torch.zeros_like(start, requires_grad=True)
    best, least = shift.detach(), float("inf")
    for step in range(steps + 1):
        whole = shift + (shift.round() - shift).detach()  # the rounding has no gradient of its own
        loss = (see(_on_white(colors + whole / 255, opacity)) - target).square().mean()
        if loss.item() < least:
            best, least = whole.detach(), loss.item()
        (slope,) = torch.autograd.grad(loss, shift)
        pace = levels / 4 * (1 - step / (steps + 1))
        shift = (shift.detach() - pace * slope.sign()).clamp(low, high).requires_grad_()
    return (best.expand_as(colors)[0] + 128).byte().permute(1, 2, 0).numpy()


def _planes(pixels: Pixels) -> tuple[Tensor, Tensor]:
    """Colors [1, 3, H, W] and opacity [1, 1, H, W]."""
    both = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return both[:, :3], both[:, 3:]


def _on_white(colors: Tensor, opacity: Tensor) -> Tensor:
    return colors * opacity + 1 - opacity
