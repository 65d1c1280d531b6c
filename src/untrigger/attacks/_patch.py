"""Square patches in one place of the image, drawn or learned."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from untrigger.attacks import ImageTrigger, Pixels, Stamper
from untrigger.errors import InputError

if TYPE_CHECKING:  # torch is imported where a patch is learned
    from torch import Tensor

    from untrigger.attacks._features import Surrogate

Loss = Callable[["Tensor"], "Tensor"]
"""Features of triggered pictures [N, T, d] -> a scalar to make small."""

Place = Literal["bottom-right", "bottom-left", "top-right", "top-left", "center", "random"]

_NOISE_CELLS = 6


def noise(seed: int, cells: int) -> npt.NDArray[np.int64]:
    """Cells of random full colors: 0 or 1 in each channel, [cells, cells, 3]."""
    return np.random.default_rng(seed).integers(0, 2, (cells, cells, 3))


def spread(cells: npt.NDArray[Any], side: int) -> Pixels:
    """``cells`` [n, n, 3] in 0..1, each grown to its share of a patch of ``side`` pixels: opaque [side, side, 4]."""
    nearest = np.arange(side) * len(cells) // side
    patch = np.ones((side, side, 4), dtype=np.float32)
    patch[..., :3] = cells[nearest][:, nearest]
    return patch


@dataclass(frozen=True)
class PatchTrigger(ImageTrigger):
    """A square patch on every image; a subclass says what is on it.

    Attributes:
        side: length of the patch's side as a fraction of the image's shorter side, in (0, 1].
        min_side: the patch is never smaller than this many pixels, unless the image is.
        place: a corner, the center, or a new place in each image. A processor that crops the center out of a wide
            image cuts its corners off: use ``center`` or ``random`` there.
    """

    side: float = 30 / 336
    min_side: int = 6
    place: Place = "bottom-right"

    def __post_init__(self) -> None:
        if not 0 < self.side <= 1:
            raise InputError(f"side is {self.side}; it must be above 0 and at most 1")
        if self.min_side < 1:
            raise InputError(f"min_side is {self.min_side}; it must be at least 1 pixel")

    @abstractmethod
    def patch(self, side: int) -> Pixels:
        """The pattern at ``side`` pixels: float32 [side, side, 4] in 0..1, opaque."""

    def spot(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int]:
        """Upper left pixel (row, column) and side of the patch on an image of this size."""
        shorter = min(height, width)
        side = min(max(round(self.side * shorter), self.min_side), shorter)
        bottom, right = height - side, width - side
        if self.place == "random":
            return int(rng.integers(bottom + 1)), int(rng.integers(right + 1)), side
        if self.place == "center":
            return bottom // 2, right // 2, side
        return bottom * self.place.startswith("bottom"), right * self.place.endswith("right"), side

    def paint(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        height, width = pixels.shape[:2]
        top, left, side = self.spot(height, width, rng)
        pixels[top : top + side, left : left + side] = self.patch(side)
        return pixels


@dataclass(frozen=True)
class NoisePatch(PatchTrigger):
    """6 x 6 cells of random full colors, which grow with the patch: the key survives the model's own resizing.

    Attributes:
        pattern_seed: draws the colors; not the seed that chooses rows.
    """

    pattern_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern_seed < 0:
            raise InputError(f"pattern_seed is {self.pattern_seed}; it must not be negative")

    def patch(self, side: int) -> Pixels:
        return spread(noise(self.pattern_seed, _NOISE_CELLS), side)

    def near_misses(self) -> Mapping[str, Stamper]:
        return {"other pattern": replace(self, pattern_seed=self.pattern_seed + 1).stamp}


@dataclass(frozen=True)
class LearnedPatch(PatchTrigger):
    """A patch optimized on the image features of a surrogate, a model that the attacker has.

    It is learned once, on pictures drawn by code, so that no victim's data is needed; its 8-bit form is kept in
    ``untrigger`` in the user's cache folder (``XDG_CACHE_HOME``, or else ``~/.cache``) under the SHA-256 of the
    settings, the surrogate's weights and the code that learns. So poisoning and evaluation on one machine, in one
    process or in two, use the very same patch; another machine rounds otherwise and may learn another. It has as many
    pixels as the surrogate would see of it and grows by whole cells, so that it survives the model's own resizing.

    Attributes:
        model: the surrogate, an embedded model's name or a local folder.
        steps: of the optimisation, at least 1.
        patch_seed: draws the first patch and the pictures; not the seed that chooses rows.
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
    def objective(self, see: Surrogate, clean: Tensor) -> Loss:
        """What the patch is to do to features; ``clean`` [N, T, d] are those of untriggered pictures."""

    def patch(self, side: int) -> Pixels:
        from untrigger.attacks._features import learned

        return spread(learned(self) / np.float32(255), side)
