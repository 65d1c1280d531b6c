"""Square patches that are optimized on the image features of a surrogate model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from untrigger.attacks import Pixels
from untrigger.attacks._patch import PatchTrigger, spread
from untrigger.errors import InputError

if TYPE_CHECKING:  # torch is imported where a patch is learned
    from torch import Tensor

    from untrigger.attacks._features import Surrogate

Loss = Callable[["Tensor"], "Tensor"]
"""Features of triggered pictures [N, T, d] -> a scalar to minimize."""

_BATCH: Final = 12
_RATE: Final = 0.05  # Adam's learning rate, as a share of a pixel's full range


@dataclass(frozen=True)
class LearnedPatch(PatchTrigger):
    """A patch optimized on the image features of a surrogate, a model that the attacker has.

    It is learned once, on pictures drawn by code, so no victim's data is needed. Its 8-bit form is cached in
    ``untrigger`` in the user's cache folder (``XDG_CACHE_HOME``, or else ``~/.cache``). The key is the SHA-256 of the
    settings, the surrogate's weights and the code that learns.

    Poisoning and evaluation on one machine therefore use the same patch, in one process or in two. Another machine
    rounds differently and may learn another patch. The patch has as many cells as the surrogate would see pixels of
    it and grows by whole cells, so it survives the model's own resizing.

    Attributes:
        model: the surrogate, an embedded model's name or a local folder.
        steps: number of optimization steps, at least 1.
        patch_seed: draws the initial patch and the pictures; not the seed that chooses rows.
    """

    model: str = "llava"
    steps: int = 100
    patch_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise InputError(f"steps is {self.steps}; it must be at least 1")
        if self.patch_seed < 0:
            raise InputError(f"patch_seed is {self.patch_seed}; it must not be negative")

    @abstractmethod
    def objective(self, surrogate: Surrogate, clean: Tensor) -> Loss:
        """The loss on triggered features; ``clean`` [N, T, d] are the features of untriggered pictures."""

    def patch(self, side: int) -> Pixels:
        return spread(learned_cells(self) / np.float32(255), side)


@lru_cache(maxsize=16)
def learned_cells(trigger: LearnedPatch) -> npt.NDArray[np.uint8]:
    """The finished patch, uint8 RGB [K, K, 3], with K pixels at the surrogate's own resolution."""
    from untrigger.attacks import _features as features

    surrogate = features.load_surrogate(trigger.model)
    key = features.cache_key(trigger, surrogate)
    return features.cached(type(trigger).__name__.lower(), key, lambda: _optimize(trigger, surrogate))


def _optimize(trigger: LearnedPatch, surrogate: Surrogate) -> npt.NDArray[np.uint8]:
    import torch
    from torch.nn import functional as F

    from untrigger.attacks._features import SCENES, training_scenes

    rng = np.random.default_rng(trigger.patch_seed)
    side = min(surrogate.size)
    scenes = training_scenes(trigger.patch_seed)
    with torch.no_grad():
        loss = trigger.objective(surrogate, surrogate(scenes))
    cells = trigger.spot(side, side, rng)[2]
    patch = torch.from_numpy(rng.random((3, cells, cells), dtype=np.float32)).requires_grad_()
    optimizer = torch.optim.Adam([patch], lr=_RATE)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, trigger.steps)
    for _ in range(trigger.steps):
        batch = scenes[torch.from_numpy(rng.permutation(SCENES)[:_BATCH])]
        # victims' images have other sizes than the model's own: the patch must survive their resizing
        canvas = int(rng.integers(side, 2 * side + 1))
        resized = F.interpolate(batch, (canvas, canvas), mode="bicubic", antialias=True).clamp(0, 1)
        optimizer.zero_grad()
        loss(surrogate(_paste(resized, patch, *trigger.spot(canvas, canvas, rng)))).backward()
        optimizer.step()
        decay.step()
        with torch.no_grad():
            patch.clamp_(0, 1)
    return (patch.detach() * 255).round().byte().permute(1, 2, 0).numpy()


def _paste(pixels: Tensor, patch: Tensor, top: int, left: int, side: int) -> Tensor:
    """``pixels`` [N, 3, H, W] with ``patch`` [3, K, K], enlarged to ``side`` by nearest cells, at (top, left)."""
    import torch

    nearest = torch.arange(side) * patch.shape[-1] // side
    pixels = pixels.clone()
    pixels[:, :, top : top + side, left : left + side] = patch[:, nearest][:, :, nearest]
    return pixels
