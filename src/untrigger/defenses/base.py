"""What a defense is: how a whole fine-tuning goes, how it views the rows of a batch, which loss it takes of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import TrainerCallback

from untrigger.losses.chunked import Losses, Values
from untrigger.models.forward import Pair, pair_losses
from untrigger.models.loading import LoadedModel
from untrigger.models.scoring import TokenScores
from untrigger.rows.sample import Sample
from untrigger.views.patches import PATCH_VIEWS, View, ViewMix

_DROP = "drop"


class Training(Protocol):
    """What a defense's procedure works with: the model that is fine-tuned, in stages."""

    @property
    def clean_rows(self) -> Sequence[Sample]:
        """Rows known to be clean.

        Raises:
            InputError: the user gave none.
        """
        ...

    @property
    def seed(self) -> int: ...

    def reference(self) -> LoadedModel:
        """The model as it is before fine-tuning."""
        ...

    def fit(
        self,
        rows: Sequence[Sample],
        defense: StepDefense,
        name: str = "",
        *,
        start: LoadedModel | None = None,
        flagged_tokens: Mapping[int, NDArray[np.bool_]] | None = None,
        share: float = 1.0,
        after: float = 0.0,
        passes: float | None = None,
        rate: float = 1.0,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> LoadedModel:
        """One stage: fine-tune on ``rows`` with the step of ``defense``, a model of its own or on from ``start``.

        The last stage has no name; what it gives is what the user gets. The others are kept under theirs, and not
        run again after a kill. ``start`` is trained in place, whatever of it has gradients. It takes a ``share`` of the
        steps that were asked for, ``after`` the share that earlier stages took, or so many ``passes`` over the rows;
        ``rate`` scales the learning rate.
        ``doubted``: of some rows, by number, which answer tokens [n] are not believed; they reach the step marked, and
        without the rest of their answers.

        Raises:
            InputError: there are no rows.
        """
        ...

    def flag(self, scores: Sequence[float], rows: Mapping[int, str]) -> None:
        """Tell what was found: how suspicious each row is, the higher the more; of rows that were acted on, why."""
        ...

    def tokens(self, model: LoadedModel, rows: Sequence[Sample], name: str) -> list[TokenScores]:
        """`row_tokens`, kept under a name of the judgment's own: not asked again after a kill."""
        ...

    def answer_tokens(self, rows: Sequence[Sample]) -> list[NDArray[np.int64]]:
        """The answer tokens of each row [n]; no model is asked."""
        ...


@dataclass(frozen=True)
class Defense(ABC):
    """A frozen set of weights and views; its fields are the command line's flags."""

    needs_clean_rows: ClassVar[bool] = False  # whether it can do nothing without rows known to be clean

    def _check(self, low: float, high: float, *names: str) -> None:
        """Raises ValueError unless these fields are finite numbers in [low, high]."""
        for name in names:
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                raise ValueError(f"{name} is {value}; it must be a finite number from {low:g} to {high:g}")

    @abstractmethod
    def fine_tune(self, rows: Sequence[Sample], training: Training) -> LoadedModel:
        """The whole procedure, on rows that are not trusted."""


@dataclass(frozen=True)
class StepDefense(Defense):
    """A defense that is all in the training step, of one training on all rows: any host trainer can take it."""

    def fine_tune(self, rows: Sequence[Sample], training: Training) -> LoadedModel:
        return training.fit(rows, self)

    @property
    def paired(self) -> tuple[View, int] | None:
        """The view that follows the originals in each training batch, and how often; None where nothing follows."""
        return None

    @property
    def dropped(self) -> float:
        """The share of image tokens that a second pass over each training batch is not shown; 0 without such a pass."""
        return 0.0

    @property
    def replaced(self) -> tuple[View, float] | None:
        """A view that takes an image's place, and the share of rows it does so for."""
        return None

    @property
    def has_loss(self) -> bool:
        """Whether `step` takes the place of the host's own loss, which otherwise is left as it is to the bit."""
        return type(self).step is not StepDefense.step

    def step(self, model: nn.Module, inputs: dict[str, Any]) -> Losses:
        """The loss of one training batch; only called where it ``has_loss``."""
        raise NotImplementedError(f"{type(self).__name__} has no loss of its own")


@dataclass(frozen=True, kw_only=True)
class PairedDefense(StepDefense):
    """A defense that compares each row with a view of it.

    Fields:
        view, patch, ratio: which patch view, the side of a patch as a share of the image's shorter side, and the share
            of patches perturbed. ``mix`` draws a view per image; ``drop`` perturbs nothing and does not show the
            language model that share of an image's tokens, which makes its pass so much shorter.
        views: how many views a row has in a step, each a forward and a backward pass; terms are means over them.
    """

    view: str = "mix"
    patch: float = 0.125
    ratio: float = 0.5
    views: int = 1

    @property
    @abstractmethod
    def compares(self) -> bool:
        """Whether any of its weights asks for a view."""

    @property
    def still(self) -> bool:
        """Whether no gradient flows into the view."""
        return False

    @property
    def paired(self) -> tuple[View, int] | None:
        if not self.compares or self.view == _DROP:
            return None
        return patch_view(self.view, self.patch, self.ratio), self.views

    @property
    def dropped(self) -> float:
        if self.views < 1 or (self.views > 1 and (self.still or self.view == _DROP)):
            raise ValueError(f"views is {self.views}; it must be at least 1, and 1 with stop_gradient or drop")
        if not self.compares or self.view != _DROP:
            return 0.0
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio is {self.ratio}; of image tokens to drop it must be above 0 and at most 1")
        return self.ratio

    @property
    def has_loss(self) -> bool:
        return self.compares

    @abstractmethod
    def terms(self, pair: Pair) -> Values:
        """Weighted terms [N] by name."""

    def step(self, model: nn.Module, inputs: dict[str, Any]) -> Losses:
        return pair_losses(
            model, inputs, self._terms_and_views, views=self.views, stop_gradient=self.still, drop=self.dropped
        )[0]

    def _terms_and_views(self, pair: Pair) -> tuple[Values, Values]:
        nll, view_nll, js, entropy = pair.compared
        return self.terms(pair), {"js": js, "entropy": entropy, "ce": nll, "ce_view": view_nll}


def part(share: float, count: int) -> int:
    """How many of ``count`` rows that is, rounded up."""
    return math.ceil(round(share * count, 6))  # 0.07 * 100 is a little more than 7


def patch_view(name: str, patch: float, ratio: float) -> View:
    """The patch view of this name (``mask``, ``meanfill``, ``noise``, ...), or ``mix``, which draws one per image.

    Raises:
        ValueError: there is no view of that name, or a field is out of range.
    """
    views = {cls.__name__.lower(): cls(patch=patch, ratio=ratio) for cls in PATCH_VIEWS}
    if name == "mix":
        return ViewMix(tuple(views.values()))
    if name not in views:
        raise ValueError(f"no patch view is called {name!r}; there are: mix, {_DROP}, {', '.join(views)}")
    return views[name]
