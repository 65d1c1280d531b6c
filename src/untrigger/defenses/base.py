"""The interfaces of a defense: its procedure in stages, the views of a batch, and the loss of a training step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import TrainerCallback

from untrigger.errors import check_range
from untrigger.losses.chunked import Losses, Values
from untrigger.models.forward import Pair, pair_losses
from untrigger.models.grafted_rows import Grafts
from untrigger.models.loading import LoadedModel
from untrigger.models.scoring import TokenScores
from untrigger.rows.sample import Sample
from untrigger.views.patches import PATCH_VIEWS, View, ViewMix

_DROP = "drop"


@dataclass(frozen=True, eq=False)
class Stage:
    """One training of a defense's procedure.

    Fields:
        rows: numbers of the rows to train on, from 0; at least one.
        defense: the views and the loss of each training step.
        name: folder name of an intermediate stage. Its model is stored there, and not trained again after a kill. The
            last stage has no name; its model is the result.
        source: the rows that the numbers refer to, where these are not `Training.rows`.
        grafts: of `Training.rows`, grafted rows to learn beside ``rows``.
        start: the model to continue from, trained in place wherever it has gradients; None for a newly adapted one.
        flagged_tokens: for some of the rows, by number, which answer tokens [n] are flagged. The step gets these
            tokens marked, and without the rest of their answers.
        share, after: share of the run's steps that this stage takes, and that earlier stages took; in [0, 1].
        schedule: start and end of the part of the learning rate's schedule that this stage goes through, in [0, 1].
            Stages that continue one another share one schedule, so that the rate does not rise again.
        passes: over the rows, in place of ``share``.
        rate: factor on the run's learning rate.
        callbacks: of the host trainer, for this stage alone.
    """

    rows: Sequence[int]
    defense: StepDefense
    name: str = ""
    _: KW_ONLY
    source: Sequence[Sample] | None = None
    grafts: Grafts | None = None
    start: LoadedModel | None = None
    flagged_tokens: Mapping[int, NDArray[np.bool_]] = field(default_factory=dict[int, NDArray[np.bool_]])
    share: float = 1.0
    after: float = 0.0
    schedule: tuple[float, float] = (0.0, 1.0)
    passes: float | None = None
    rate: float = 1.0
    callbacks: Sequence[TrainerCallback] = ()


class Training(Protocol):
    """What a defense's procedure works with: the rows, and the model that is fine-tuned in stages.

    Rows are known by their numbers, from 0.
    """

    @property
    def row_count(self) -> int:
        """Number of rows to train on, none of them trusted."""
        ...

    @property
    def rows(self) -> Sequence[Sample]:
        """The rows to train on, for a defense that reads or relabels them.

        Raises:
            InputError: they cannot be read (a host trainer holds them in a form of its own).
        """
        ...

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
        """The model before fine-tuning."""
        ...

    def fit(self, stage: Stage) -> LoadedModel:
        """Run one stage and return its model.

        Raises:
            InputError: there are no rows, or the stage needs something that this training cannot do.
        """
        ...

    def flag(self, scores: Sequence[float], rows: Mapping[int, str]) -> None:
        """Record how suspicious each row is (higher is more), and for each flagged row a short text that says why."""
        ...

    def tokens(
        self, model: LoadedModel, rows: Sequence[int], name: str, source: Sequence[Sample] | None = None
    ) -> list[TokenScores]:
        """`row_tokens` of these rows, stored under ``name`` and not computed again after a kill.

        ``source``: the rows that the numbers refer to, where these are not `Training.rows`.
        """
        ...

    def can_be_grafted(self, row: int) -> bool:
        """Whether a row has an image and a text, parts of which can be put onto other rows."""
        ...

    def picture(self, row: int) -> NDArray[np.uint8] | None:
        """A row's first image, scaled to one small size, levels [D]; None if the row cannot be grafted."""
        ...

    def graft_tokens(self, model: LoadedModel, grafts: Grafts, name: str) -> list[TokenScores]:
        """`tokens` of grafted rows, whose answers are the hosts'."""
        ...

    def answer_tokens(self, rows: Sequence[int]) -> list[NDArray[np.int64]]:
        """Ids of each row's answer tokens [n]; needs no forward pass."""
        ...


@dataclass(frozen=True)
class Defense(ABC):
    """A fine-tuning procedure with frozen settings; its fields are the flags of the command line."""

    needs_clean_rows: ClassVar[bool] = False
    runs_in_host: ClassVar[bool] = False  # whether `untrigger.training.trainer.defended` can run it in a host trainer

    def _check(self, low: float, high: float, *names: str) -> None:
        """Raises ValueError unless these fields are finite numbers in [low, high]."""
        check_range(low, high, **{name: getattr(self, name) for name in names})

    @property
    def has_loss(self) -> bool:
        """Whether a loss of its own replaces the host's, so that settings of the host's loss are refused."""
        return False

    @abstractmethod
    def fine_tune(self, training: Training) -> LoadedModel:
        """Run the whole procedure on `Training.rows`, which are not trusted."""


@dataclass(frozen=True)
class StepDefense(Defense):
    """A defense that is one training on all rows, with views or a loss of its own: any host trainer can run it."""

    runs_in_host: ClassVar[bool] = True

    def fine_tune(self, training: Training) -> LoadedModel:
        return training.fit(Stage(range(training.row_count), self))

    @property
    def paired(self) -> tuple[View, int] | None:
        """The view appended to each training batch, and the number of copies; None without one."""
        return None

    @property
    def dropped(self) -> float:
        """Share of image tokens that the second pass over each training batch leaves out; 0 without such a pass."""
        return 0.0

    @property
    def replaced(self) -> tuple[View, float] | None:
        """A view that replaces images, and the share of rows whose images it replaces; None without one."""
        return None

    @property
    def has_loss(self) -> bool:
        """Whether `step` replaces the host's loss, which otherwise stays the same to the bit."""
        return type(self).step is not StepDefense.step

    def step(self, model: nn.Module, inputs: dict[str, Any]) -> Losses:
        """The loss of one training batch; called only if ``has_loss``."""
        raise NotImplementedError(f"{type(self).__name__} has no loss of its own")


@dataclass(frozen=True, kw_only=True)
class PairedDefense(StepDefense):
    """A defense that compares each row with a view of it.

    Fields:
        view, patch, ratio: name of the patch view, side of a patch as a share of the image's shorter side, and share
            of patches perturbed. ``mix`` draws a view for each image. ``drop`` perturbs nothing: the language model's
            second pass leaves out that share of image tokens, and is that much shorter.
        views: number of views of a row in a step, each with a forward and a backward pass; terms are means over them.
    """

    view: str = "mix"
    patch: float = 0.125
    ratio: float = 0.5
    views: int = 1

    def __post_init__(self) -> None:
        if self.views < 1 or (self.views > 1 and (self.still or self.view == _DROP)):
            raise ValueError(f"views is {self.views}; it must be at least 1, and 1 with stop_gradient or drop")
        if self.compares and self.view == _DROP and not 0 < self.ratio <= 1:
            raise ValueError(f"ratio is {self.ratio}; of image tokens to drop it must be above 0 and at most 1")

    @property
    @abstractmethod
    def compares(self) -> bool:
        """Whether any of its weights needs a view."""

    @property
    def still(self) -> bool:
        """Whether the view gets no gradient."""
        return False

    @property
    def paired(self) -> tuple[View, int] | None:
        if not self.compares or self.view == _DROP:
            return None
        return patch_view(self.view, self.patch, self.ratio), self.views

    @property
    def dropped(self) -> float:
        return self.ratio if self.compares and self.view == _DROP else 0.0

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
    """This share of ``count`` rows as a number of rows, rounded up."""
    return math.ceil(round(share * count, 6))  # 0.07 * 100 is a little more than 7


def patch_view(name: str, patch: float, ratio: float) -> View:
    """The patch view of this name (``mask``, ``meanfill``, ``noise``, ...); ``mix`` draws one per image.

    Raises:
        ValueError: there is no view of that name, or a field is out of range.
    """
    views = {cls.__name__.lower(): cls(patch=patch, ratio=ratio) for cls in PATCH_VIEWS}
    if name == "mix":
        return ViewMix(tuple(views.values()))
    if name not in views:
        raise ValueError(f"no patch view is called {name!r}; there are: mix, {_DROP}, {', '.join(views)}")
    return views[name]
