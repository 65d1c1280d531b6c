"""What a defence is: how it views the rows of a batch, and which loss it takes at the answer tokens."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from untrigger.views import PATCH_VIEWS, View, ViewMix


@dataclass(frozen=True)
class Pair:
    """Both views of a batch at its N answer tokens, teacher-forced.

    ``target`` [N] holds token ids; ``logits`` and ``view_logits`` [N, V] the next-token logits under the
    original and the viewed image; ``hidden`` and ``view_hidden`` [N, d] what the vocabulary head read.
    """

    target: Tensor
    logits: Tensor
    view_logits: Tensor
    hidden: Tensor
    view_hidden: Tensor


@dataclass(frozen=True)
class Defense(ABC):
    """A frozen set of weights and views; its fields are the command line's flags."""

    def _check(self, low: float, high: float, *names: str) -> None:
        """Raises ValueError unless these fields are finite numbers in [low, high]."""
        for name in names:
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                raise ValueError(f"{name} is {value}; it must be a finite number from {low:g} to {high:g}")

    @property
    @abstractmethod
    def paired(self) -> View | None:
        """The view that makes the second half of each training batch; None where there is no second half."""

    @property
    def replaced(self) -> tuple[View, float] | None:
        """A view that takes an image's place, and the share of rows it does so for."""
        return None

    @abstractmethod
    def terms(self, pair: Pair) -> dict[str, Tensor]:
        """Weighted terms [N] by name; their sum over terms and tokens, per counted token, is the loss.

        Only called where ``paired`` is set; otherwise the host's own loss is left as it is.
        """


def patch_view(name: str, patch: float, ratio: float) -> View:
    """The patch view of this name (``mask``, ``meanfill``, ``noise``, ...), or ``mix``, which draws one per image.

    Raises:
        ValueError: there is no view of that name, or a field is out of range.
    """
    views = {cls.__name__.lower(): cls(patch=patch, ratio=ratio) for cls in PATCH_VIEWS}
    if name == "mix":
        return ViewMix(tuple(views.values()))
    if name not in views:
        raise ValueError(f"no patch view is called {name!r}; there are: mix, {', '.join(views)}")
    return views[name]
