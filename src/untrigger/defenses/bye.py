"""Filter rows by attention entropy, after Believe Your Eyes (Rong et al., NeurIPS 2025, arXiv 2505.16916)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from untrigger.defenses.base import Defense, Stage, Training
from untrigger.defenses.plain import Plain
from untrigger.errors import InputError
from untrigger.models.collators import IGNORE, ChatCollator, Rows
from untrigger.models.forward import batches, decoder, decoder_layers, evaluating, forward_answers, on_device
from untrigger.models.loading import LoadedModel
from untrigger.models.token_drop import image_token
from untrigger.rows.sample import Sample


@final
@dataclass(frozen=True)
class BYE(Defense):
    """Train, leave out the rows on which the model's attention collapses onto few image tokens, and train again.

    A model with a backdoor attends to the trigger almost alone.

    Fields:
        separation: distance in standard deviations that the two clusters of a layer's entropies must have for the
            layer to count (paper: 2). If no layer counts, no row is left out.
    """

    separation: float = 2.0

    def __post_init__(self) -> None:
        self._check(0, math.inf, "separation")

    def fine_tune(self, training: Training) -> LoadedModel:
        rows = range(training.row_count)
        undefended = training.fit(Stage(rows, Plain(), "undefended"))
        entropy = attention_entropy(undefended, training.rows)
        mean, collapsed = collapsed_rows(entropy, self.separation, training.seed)
        training.flag((-mean).tolist(), dict.fromkeys(collapsed, "attention in one place"))
        return training.fit(Stage([row for row in rows if row not in collapsed], Plain()))


def collapsed_rows(entropy: NDArray[np.float64], separation: float, seed: int) -> tuple[NDArray[np.float64], set[int]]:
    """Mean entropy [n] over the layers with two separate clusters, and the rows in the lower cluster of that mean.

    entropy: [n, layers]. Clusters are the components of a Gaussian mixture, ``|m1 - m2| / sqrt(s1^2 + s2^2)`` apart. If
    no layer reaches ``separation``, the mean is over all layers and the set of rows is empty.
    Source: Rong et al., NeurIPS 2025, arXiv 2505.16916, equations 6 to 8.
    """
    bimodal = [layer for layer in entropy.T if _distance(layer, seed) >= separation]
    if not bimodal:
        return entropy.mean(axis=1), set()
    mean = np.mean(bimodal, axis=0)
    mixture = _mixture(mean, seed)
    lower = int(np.argmin(mixture.means_[:, 0]))
    return mean, set(np.flatnonzero(mixture.predict(mean[:, None]) == lower).tolist())


def _distance(values: NDArray[np.float64], seed: int) -> float:
    """Between the two clusters, in standard deviations."""
    mixture = _mixture(values, seed)
    (first, second), spread = mixture.means_[:, 0], mixture.covariances_[:, 0, 0]
    return abs(first - second) / math.sqrt(spread.sum())


def _mixture(values: NDArray[np.float64], seed: int) -> Any:
    from sklearn.exceptions import ConvergenceWarning  # here: slow to import, and no other defense needs it
    from sklearn.mixture import GaussianMixture

    with warnings.catch_warnings():  # few distinct values or slow convergence: no user can change it
        warnings.simplefilter("ignore", ConvergenceWarning)
        return GaussianMixture(2, random_state=seed).fit(values[:, None])


def attention_entropy(loaded: LoadedModel, rows: Sequence[Sample], *, batch_size: int = 32) -> NDArray[np.float64]:
    """Entropy of the attention from the token before a row's first answer to the image tokens, per decoder layer.

    Returns [n, layers], in [0, 1]: the entropy of the attention's mean over heads, divided by the largest possible one,
    so that images of different sizes compare. A row without an image gets the mean of the other rows.

    Raises:
        InputError: no row has an image, or the model returns no attention weights.
    """
    collate, data = ChatCollator(loaded.processor), Rows(rows)
    image = image_token(loaded.model)
    parts: list[Tensor] = []
    with evaluating(loaded.model) as model, torch.no_grad():
        for batch in batches(len(data), batch_size, "measuring attention"):
            inputs = on_device(collate([data[i] for i in batch]), model)
            labels = inputs["labels"]
            query = (labels != IGNORE).int().argmax(dim=1) - 1
            before = torch.arange(labels.shape[1], device=labels.device) < query[:, None]
            with _attention_weights(model, query) as layers:
                forward_answers(model, inputs)
            image_tokens = (inputs["input_ids"] == image) & before
            parts.append(torch.stack([_entropy(weights, image_tokens) for weights in layers], dim=1).cpu())
    entropy = torch.cat(parts).double().numpy()
    if np.isnan(entropy).all():
        raise InputError("defense bye: no row has an image; choose another defense, this one compares image attention")
    return np.where(np.isnan(entropy), np.nanmean(entropy, axis=0), entropy)


def _entropy(weights: Tensor, tokens: Tensor) -> Tensor:
    """Relative entropy [B] of attention weights [B, heads, T] over the marked ``tokens`` [B, T]."""
    share = weights.float().mean(dim=1) * tokens
    share = share / share.sum(dim=1, keepdim=True)
    return -torch.xlogy(share, share).sum(dim=1) / tokens.sum(dim=1).log()


@contextmanager
def _attention_weights(model: nn.Module, query: Tensor) -> Generator[list[Tensor]]:
    """Collect from each decoder layer the attention weights [B, heads, T] of row b's token ``query[b]``."""
    inner, layers = decoder(model), list[Tensor]()
    usual = str(inner.config._attn_implementation)
    batch = torch.arange(len(query), device=query.device)

    def collect(_: nn.Module, __: object, output: tuple[Tensor, Tensor | None]) -> None:
        if output[1] is None:
            raise InputError(
                f"defense bye: a {type(inner).__name__} returns no attention weights; choose another defense or model"
            )
        layers.append(output[1][batch, :, query])

    with ExitStack() as hooks:
        for layer in decoder_layers(model):
            hooks.enter_context(cast(nn.Module, layer.self_attn).register_forward_hook(collect))
        inner.set_attn_implementation("eager")  # the other implementations return no weights
        try:
            yield layers
        finally:
            inner.set_attn_implementation(usual)
