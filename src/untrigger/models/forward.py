"""Forward passes at the answer tokens: of a training batch, of one view or both, and of rows to be scored."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors.numpy import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin, modeling_utils

from untrigger.errors import InputError
from untrigger.files import new_file
from untrigger.losses import objective
from untrigger.losses.chunked import Compared, Head, Loss, Losses, Values, compare, losses_at_head
from untrigger.models.collators import IGNORE, ChatCollator, Rows
from untrigger.models.loading import LoadedModel, base_model
from untrigger.models.token_drop import image_token, looked_at, showing, shown
from untrigger.progress import tracked
from untrigger.rows.sample import Sample

# whether a family that selects positions can do so row by row; hosts that pin transformers before 5.22 cannot
_SELECTS = hasattr(modeling_utils, "slice_logits_to_keep")
_SHARD = 32  # batches whose scores lie in one file


@dataclass(frozen=True)
class Answers:
    """A batch of B rows at its N answer tokens, teacher-forced.

    ``target`` [N] holds token ids, ``logits`` [N, V] the next-token logits, ``hidden`` [N, d] what the vocabulary
    head read, and ``row`` [N] which row of the batch, 0 to B - 1, a token belongs to.
    """

    target: Tensor
    logits: Tensor
    hidden: Tensor
    row: Tensor


@dataclass(frozen=True)
class Pair:
    """Both views of a batch at its N answer tokens, teacher-forced.

    ``target`` [N] holds token ids; ``logits`` and ``view_logits`` [N, V] the next-token logits under the
    original and the viewed image; ``hidden`` and ``view_hidden`` [N, d] what the vocabulary head read; ``row`` [N]
    which row of the batch, 0 to B - 1, a token belongs to.
    """

    target: Tensor
    logits: Tensor
    view_logits: Tensor
    hidden: Tensor
    view_hidden: Tensor
    row: Tensor

    @cached_property
    def compared(self) -> Compared:
        return compare(self.logits, self.view_logits, self.target)


def forward_answers(model: nn.Module, inputs: dict[str, Any]) -> Answers:
    """One forward pass over a batch with ``labels`` [B, T].

    Goes through ``model(...)`` itself, so DDP and FSDP see it. Only answer positions reach the vocabulary where the
    family can select positions.
    """
    target, row, keep = _answers(inputs["labels"])
    read: list[Tensor] = []

    def watched(head: Head, hidden: Tensor) -> Tensor:
        read.append(hidden)
        return head(hidden)

    logits = _forward(model, inputs, keep, watched).logits
    return Answers(target, _kept(logits, keep), _kept(read[-1], keep), row)


def answer_losses(
    model: nn.Module, inputs: dict[str, Any], loss: Callable[[Answers, slice], tuple[Values, Values]]
) -> Losses:
    """One forward pass over a batch with ``labels`` [B, T]; its logits are seen by ``loss`` alone, a part at a time.

    ``loss`` gets some of the N answer tokens, and which: terms [n] by name, and what else is to be known.
    """
    target, row, keep = _answers(inputs["labels"])

    def of_answers(part: slice, hidden: Sequence[Tensor], logits: Sequence[Tensor]) -> tuple[Values, Values]:
        return loss(Answers(target[part], logits[0], hidden[0], row[part]), part)

    return _losses(model, inputs, keep, of_answers)


def pair_losses(
    model: nn.Module,
    inputs: dict[str, Any],
    loss: Callable[[Pair], tuple[Values, Values]],
    *,
    views: int = 1,
    still: bool = False,
    drop: float = 0.0,
) -> tuple[Losses, Tensor]:
    """The same over a PairCollator's batch [(1 + views) B, ...]; also the row of each answer token [N].

    With several ``views`` the terms are the means of those with each.

    Where a share of image tokens is to ``drop`` it is a DropCollator's batch [B, ...], and the view is the same rows
    without these tokens.
    With a view that is held ``still`` no gradient flows into it: it has a forward pass of its own, before the other,
    and adds no activations to it.
    """
    labels = inputs["labels"] if drop else inputs["labels"].tensor_split(1 + views)[0]
    target, row, keep = _answers(labels)
    of_pair = partial(_of_pair, loss, target, row, still)
    if not (still or drop):
        return _losses(model, inputs, keep.repeat(1 + views, 1), of_pair, views=1 + views), row
    if drop:
        originals = seen = looked_at(model, {name: value for name, value in inputs.items() if name != "order"})
        positions = shown(inputs["input_ids"], inputs["order"], image_token(model), drop)
    else:
        originals, seen = ({name: value.tensor_split(2)[half] for name, value in inputs.items()} for half in (0, 1))
        positions = torch.ones_like(keep)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not still):
        view = _hidden(model, seen, keep, positions)
    return _losses(model, originals, keep, of_pair, view=view), row


def answer_hidden(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """What the head reads at the answer tokens [N, d] of a batch with ``labels`` [B, T]."""
    _, _, keep = _answers(inputs["labels"])
    return _hidden(model, inputs, keep, torch.ones_like(keep))


def losses_against(
    model: nn.Module, inputs: dict[str, Any], view: Tensor, loss: Callable[[Pair], tuple[Values, Values]]
) -> tuple[Losses, Tensor]:
    """As `pair_losses`, where the hidden states [N, d] of the ``view`` are there already (`answer_hidden`)."""
    target, row, keep = _answers(inputs["labels"])
    return _losses(model, inputs, keep, partial(_of_pair, loss, target, row, False), view=view), row


def _of_pair(
    loss: Callable[[Pair], tuple[Values, Values]],
    target: Tensor,
    row: Tensor,
    still: bool,
    part: slice,
    hidden: Sequence[Tensor],
    logits: Sequence[Tensor],
) -> tuple[Values, Values]:
    """Of some of the answer tokens: of the first view with each other one, in the mean."""
    pairs = [
        # of a view held still a trained head learns nothing either
        loss(Pair(target[part], logits[0], view.detach() if still else view, hidden[0], seen, row[part]))
        for view, seen in zip(logits[1:], hidden[1:], strict=True)
    ]
    terms, known = ([found[i] for found in pairs] for i in (0, 1))
    return _mean(terms), _mean(known)


def _mean(values: Sequence[Values]) -> Values:
    """Of the same names."""
    if len(values) == 1:
        return values[0]
    return {name: torch.stack([each[name] for each in values]).mean(dim=0) for name in values[0]}


def _answers(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Answer tokens [N], the row of each, and the positions that foretell them [B, T]."""
    answers = labels[:, 1:] != IGNORE
    keep = torch.zeros_like(labels, dtype=torch.bool)
    keep[:, :-1] = answers
    return labels[:, 1:][answers], answers.nonzero()[:, 0], keep


def _losses(
    model: nn.Module, inputs: dict[str, Any], keep: Tensor, loss: Loss, *, views: int = 1, view: Tensor | None = None
) -> Losses:
    """Of a batch with so many ``views`` one after the other, or of one and the hidden states [N, d] of a ``view``."""
    inner, found = base_model(model), list[Losses]()
    config, head = inner.config.get_text_config(), cast(nn.Module, inner.get_output_embeddings())
    trained = any(parameter.requires_grad for parameter in head.parameters())
    further, after = [] if view is None else [view], _after_the_head(config)

    def at_head(usual: Head, hidden: Tensor) -> Tensor:
        each = [*_kept(hidden, keep).tensor_split(views), *further]
        found.append(
            losses_at_head(
                lambda part: after(usual(part)) if after else usual(part),
                each,
                loss,
                width=config.vocab_size,
                trained=trained,
            )
        )
        return found[-1].total

    outputs = _forward(model, inputs, keep, at_head)
    # DDP and FSDP act on what the model gave; but where it goes on from the head it has gone on from the losses
    return found[-1] if after else found[-1]._replace(total=outputs.logits)


def _after_the_head(config: PreTrainedConfig) -> Callable[[Tensor], Tensor] | None:
    """What some families do to the logits that the head gives: Gemma 2 caps them, Cohere and Granite scale them."""
    cap, factor, divisor = (
        getattr(config, name, None) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")
    )
    if not (cap or factor or divisor):
        return None
    if cap:
        return lambda logits: torch.tanh(logits / cap) * cap
    return lambda logits: logits * (factor or 1) / (divisor or 1)


def _hidden(model: nn.Module, inputs: dict[str, Any], keep: Tensor, positions: Tensor) -> Tensor:
    """What the head reads at the positions to ``keep``, [N, d], of a language model that sees ``positions`` [B, T]."""
    with ExitStack() as shorter:
        if not positions.all():
            keep = keep.gather(1, shorter.enter_context(showing(model, decoder(model), positions)))
        read: list[Tensor] = []

        def instead(_: Head, hidden: Tensor) -> Tensor:
            read.append(_kept(hidden, keep))
            return read[-1]

        given = _forward(model, inputs, keep, instead).logits
    # DDP and FSDP act on what the model gave; but where it goes on from the head it has gone on from hidden states
    return read[-1] if _after_the_head(base_model(model).config.get_text_config()) else given


def _kept(states: Tensor, keep: Tensor) -> Tensor:
    """Those to ``keep`` [N, d] of all positions [B, T, d]; families that can select have come with them alone."""
    return states[keep] if states.ndim == 3 else states


def _forward(model: nn.Module, inputs: dict[str, Any], keep: Tensor, at_head: Callable[[Head, Tensor], Tensor]) -> Any:
    """What the model gives with ``at_head`` for its head, to which positions to ``keep`` come alone where it can be."""
    inner = base_model(model)
    selects = _SELECTS and "logits_to_keep" in inspect.signature(inner.forward).parameters
    head: Any = inner.get_output_embeddings()
    usual, own = head.forward, "forward" in vars(head)
    head.forward = lambda hidden: at_head(usual, hidden)
    asked = {name: value for name, value in inputs.items() if name != "labels"}
    try:
        return model(**asked, use_cache=False, **({"logits_to_keep": keep} if selects else {}))
    finally:
        if own:  # another library has wrapped it
            head.forward = usual
        else:
            del head.forward


class TokenScores(NamedTuple):
    """A row's answer tokens: ``ids`` [n], and ``nll`` [n], the negative log-likelihood of each, in nats.

    ``prompt_ids`` [m]: the different tokens of all that is not answer, in ascending order.
    """

    ids: NDArray[np.int64]
    nll: NDArray[np.floating]
    prompt_ids: NDArray[np.int64] = np.empty(0, np.int64)

    @property
    def loss(self) -> float:
        """Their mean, in nats: the loss that fine-tuning has on the row; 0 where nothing is answered."""
        return float(self.nll.mean()) if len(self.nll) else 0.0


@torch.no_grad()
def row_tokens(
    loaded: LoadedModel, rows: Sequence[Sample], batch_size: int = 32, *, kept: Path | None = None
) -> list[TokenScores]:
    """How likely the model finds each token of each row's answer, teacher-forced.

    What a run that was killed has asked the same model about the same rows lies in the folder ``kept``, and is not
    asked again.
    """
    collate, data, found = ChatCollator(loaded.processor), Rows(rows), list[TokenScores]()
    per_file = _SHARD * batch_size
    with evaluating(loaded.model) as model, fitting(model):
        for batch in batches(len(data), batch_size, "scoring"):
            start = batch.start - batch.start % per_file
            file = kept and kept / f"{start}.safetensors"
            if file and batch.start == start and file.is_file():
                found += _read_tokens(file)
            if batch.start < len(found):
                continue
            found += batch_tokens(model, collate([data[i] for i in batch]))
            if file and batch.stop in (start + per_file, len(data)):
                _write_tokens(file, found[start:])
    return found


def row_answers(processor: ProcessorMixin, rows: Sequence[Sample], batch_size: int = 32) -> list[NDArray[np.int64]]:
    """The tokens of each row's answer [n], which no model is asked about."""
    collate, data = ChatCollator(processor), Rows(rows)
    parts = (collate([data[i] for i in batch]) for batch in batches(len(data), batch_size, "reading answers"))
    return [ids for part in parts for ids in batch_answers(part)]


def batch_answers(batch: Mapping[str, Any]) -> list[NDArray[np.int64]]:
    """The same of one batch with ``labels`` [B, T]."""
    return [row[row != IGNORE].numpy() for row in batch["labels"][:, 1:]]


@torch.no_grad()
def batch_tokens(model: PreTrainedModel | PeftModel, batch: Mapping[str, Any]) -> list[TokenScores]:
    """The same of one batch with ``labels`` [B, T], by a model in evaluation mode."""
    asked = batch["attention_mask"].bool() & (batch["labels"] == IGNORE)
    answers = forward_answers(model, on_device(batch, model))
    ids, row = answers.target.cpu().numpy(), answers.row.cpu().numpy()
    nll = objective.token_nll(answers.logits, answers.target).cpu().numpy()
    return [
        TokenScores(ids[row == i], nll[row == i], np.unique(told[there].cpu().numpy()))
        for i, (told, there) in enumerate(zip(batch["input_ids"], asked, strict=True))
    ]


def _write_tokens(path: Path, rows: Sequence[TokenScores]) -> None:
    told: dict[str, NDArray[Any]] = {}
    for name in TokenScores._fields:
        parts = [getattr(row, name) for row in rows]
        told |= {name: np.concatenate(parts), f"{name}_count": np.array([len(part) for part in parts])}
    with new_file(path) as file:
        file.write(save(told))


def _read_tokens(path: Path) -> list[TokenScores]:
    told = load_file(path)
    parts = (np.split(told[name], np.cumsum(told[f"{name}_count"])[:-1]) for name in TokenScores._fields)
    return [TokenScores(*row) for row in zip(*parts, strict=True)]


def row_mean(values: Tensor, row: Tensor, count: int) -> Tensor:
    """Mean of each row's tokens: values [N] and row [N], 0 to ``count`` - 1; [count], 0 for a row without tokens."""
    return values.new_zeros(count).index_add(0, row, values) / torch.bincount(row, minlength=count).clamp(min=1)


def batches(count: int, size: int, title: str) -> Iterator[range]:
    """Row numbers 0 to ``count`` - 1 in order, ``size`` at a time, under a meter."""
    starts = range(0, count, size)
    return (range(start, min(start + size, count)) for start in tracked(starts, title, len(starts)))


def on_device(batch: Mapping[str, Any], model: PreTrainedModel | PeftModel) -> dict[str, Any]:
    return {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in batch.items()}


@contextmanager
def evaluating(model: PreTrainedModel | PeftModel) -> Generator[PreTrainedModel | PeftModel]:
    """The model in evaluation mode for a while."""
    was_training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(was_training)


@contextmanager
def fitting(model: nn.Module) -> Generator[None]:
    """What the host raises where a processor gives an image other tokens than the model, as the user's error.

    Only where the collator is ours: a host's own may have cut tokens off.
    """
    try:
        yield
    except ValueError as error:
        if "image tokens do not match" not in str(error):
            raise
        name = base_model(model).name_or_path
        raise InputError(
            f"{name}: its processor and its model do not belong together; get the folder anew ({error})"
        ) from error


def decoder(model: nn.Module) -> PreTrainedModel:
    """The stack of ``layers`` of the language model, whatever the family calls it.

    Raises:
        InputError: there is none that can be found.
    """
    found: Any = base_model(model).get_decoder()
    while not hasattr(found, "layers") and (inner := found.get_decoder()) is not found:
        found = inner
    if not hasattr(found, "layers"):
        raise InputError(f"{type(base_model(model)).__name__}: its language model has no layers that can be looked at")
    return found


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The language model's layers."""
    return cast(nn.ModuleList, decoder(model).layers)
