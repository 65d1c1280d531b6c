"""Rows filtered by attention entropy, after Believe Your Eyes (Rong et al., NeurIPS 2025, arXiv 2505.16916)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from untrigger.defenses.base import Defense, Training
from untrigger.defenses.plain import Plain
from untrigger.errors import InputError
from untrigger.models.collators import IGNORE, ChatCollator, Rows
from untrigger.models.forward import batches, decoder, decoder_layers, evaluating, forward_answers, on_device
from untrigger.models.loading import LoadedModel
from untrigger.models.token_drop import image_token_id
from untrigger.rows.sample import Sample, without


@final
@dataclass(frozen=True)
class BYE(Defense):
    """A model with a backdoor looks hard at the trigger: rows that it looks at so are left out of a second training.

    Fields:
        separation: how far apart, in standard deviations, the two clusters of a layer's entropies must lie for the
            layer to count (paper: 2). Where none does, no row is left out.
    """

    separation: float = 2.0

    def __post_init__(self) -> None:
        self._check(0, math.inf, "separation")

    def fine_tune(self, rows: Sequence[Sample], training: Training) -> LoadedModel:
        undefended = training.fit(rows, Plain(), "undefended")
        entropy = attention_entropy(undefended, rows)
        spread, collapsed = verdict(entropy, self.separation, training.seed)
        training.flag((-spread).tolist(), dict.fromkeys(collapsed, "attention in one place"))
        return training.fit(exclude_rows(rows, collapsed), Plain())


def verdict(entropy: NDArray[np.float64], separation: float, seed: int) -> tuple[NDArray[np.float64], set[int]]:
    """Mean entropy [n] over the layers whose two clusters lie apart, and the rows that belong to its lower cluster.

    entropy: [n, layers]. Clusters are the parts of a Gaussian mixture, ``|m1 - m2| / sqrt(s1^2 + s2^2)`` apart. Where
    no layer's are so far apart as ``separation``, the mean is over all and no row belongs.
    Source: Rong et al., NeurIPS 2025, arXiv 2505.16916, equations 6 to 8.
    """
    telling = [layer for layer in entropy.T if _apart(layer, seed) >= separation]
    if not telling:
        return entropy.mean(axis=1), set()
    mean = np.mean(telling, axis=0)
    mixture = _mixture(mean, seed)
    lower = int(np.argmin(mixture.means_[:, 0]))
    return mean, set(np.flatnonzero(mixture.predict(mean[:, None]) == lower).tolist())


def _apart(values: NDArray[np.float64], seed: int) -> float:
    mixture = _mixture(values, seed)
    (first, second), spread = mixture.means_[:, 0], mixture.covariances_[:, 0, 0]
    return abs(first - second) / math.sqrt(spread.sum())


def _mixture(values: NDArray[np.float64], seed: int) -> Any:
    from sklearn.exceptions import ConvergenceWarning  # slow to import, and no other defense needs it
    from sklearn.mixture import GaussianMixture

    with warnings.catch_warnings():  # few distinct values, or slow convergence: nobody can mend it
        warnings.simplefilter("ignore", ConvergenceWarning)
        return GaussianMixture(2, random_state=seed).fit(values[:, None])


def attention_entropy(loaded: LoadedModel, rows: Sequence[Sample], *, batch_size: int = 32) -> NDArray[np.float64]:
    """How widely the token before a row's first answer looks over the image, in each layer of the decoder.

    Returns [n, layers], in [0, 1]: the entropy of the head mean of its attention to the image's tokens, as a share of
    the largest possible (so images of other sizes compare). A row without an image gets the mean of the others.

    Raises:
        InputError: no row has an image, or the model does not tell its attention.
    """
    collate, data = ChatCollator(loaded.processor), Rows(rows)
    image = image_token_id(loaded.model)
    found: list[Tensor] = []
    with evaluating(loaded.model) as model, torch.no_grad():
        for batch in batches(len(data), batch_size, "looking at attention"):
            inputs = on_device(collate([data[i] for i in batch]), model)
            labels = inputs["labels"]
            asking = (labels != IGNORE).int().argmax(dim=1) - 1
            before = torch.arange(labels.shape[1], device=labels.device) < asking[:, None]
            with _watched(model, asking) as seen:
                forward_answers(model, inputs)
            shown = (inputs["input_ids"] == image) & before
            found.append(torch.stack([_spread(weights, shown) for weights in seen], dim=1).cpu())
    entropy = torch.cat(found).double().numpy()
    if np.isnan(entropy).all():
        raise InputError("defense bye: no row shows an image; it can tell rows apart by their images alone")
    return np.where(np.isnan(entropy), np.nanmean(entropy, axis=0), entropy)


def _spread(weights: Tensor, shown: Tensor) -> Tensor:
    """Relative entropy [B] of attention weights [B, heads, T] over the tokens that are ``shown`` [B, T]."""
    share = weights.float().mean(dim=1) * shown
    share = share / share.sum(dim=1, keepdim=True)
    return -torch.xlogy(share, share).sum(dim=1) / shown.sum(dim=1).log()


@contextmanager
def _watched(model: nn.Module, asking: Tensor) -> Generator[list[Tensor]]:
    """Collect from each decoder layer where row b's token ``asking[b]`` looks: weights [B, heads, T]."""
    inner, seen = decoder(model), list[Tensor]()
    usual = str(inner.config._attn_implementation)
    each = torch.arange(len(asking), device=asking.device)

    def look(_: nn.Module, __: object, output: tuple[Tensor, Tensor | None]) -> None:
        if output[1] is None:
            raise InputError(f"defense bye: a {type(inner).__name__} does not tell its attention weights")
        seen.append(output[1][each, :, asking])

    handles = [cast(nn.Module, layer.self_attn).register_forward_hook(look) for layer in decoder_layers(model)]
    inner.set_attn_implementation("eager")  # the others do not tell
    try:
        yield seen
    finally:
        inner.set_attn_implementation(usual)
        for handle in handles:
            handle.remove()
