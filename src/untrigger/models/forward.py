"""Forward passes that compute logits and losses at the answer tokens only, for one view of a batch or for several."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, modeling_utils

from untrigger.errors import InputError
from untrigger.losses.chunked import Compared, Head, Loss, Losses, Values, compare, losses_at_head
from untrigger.models.collators import IGNORE
from untrigger.models.loading import base_model
from untrigger.models.quantized import keep_layout
from untrigger.models.token_drop import image_token_id, keep_positions, positions_after_drop, with_image_features
from untrigger.progress import tracked

# logits_to_keep takes a mask [B, T] from transformers 5.22 on; some host libraries pin an older version
_SELECTS = hasattr(modeling_utils, "slice_logits_to_keep")


@dataclass(frozen=True)
class Answers:
    """Teacher-forced outputs for a batch of B rows at its N answer tokens.

    target: token ids [N].
    logits: next-token logits [N, V].
    hidden: inputs of the vocabulary head [N, d].
    row: the row of the batch that a token belongs to, 0 to B - 1 [N].
    """

    target: Tensor
    logits: Tensor
    hidden: Tensor
    row: Tensor


@dataclass(frozen=True)
class Pair:
    """Teacher-forced outputs for both views of a batch of B rows at its N answer tokens.

    target: token ids [N].
    logits, view_logits: next-token logits under the original and the perturbed image [N, V].
    hidden, view_hidden: inputs of the vocabulary head [N, d].
    row: the row of the batch that a token belongs to, 0 to B - 1 [N].
    """

    target: Tensor
    logits: Tensor
    view_logits: Tensor
    hidden: Tensor
    view_hidden: Tensor
    row: Tensor

    @cached_property
    def compared(self) -> Compared:
        """Per-token NLL of both views, their JS divergence and the original's entropy."""
        return compare(self.logits, self.view_logits, self.target)


def forward_answers(model: nn.Module, inputs: dict[str, Any]) -> Answers:
    """Run one forward pass over a batch with ``labels`` [B, T]; return logits and head inputs at the answer tokens.

    It calls ``model(...)`` itself, so that the hooks of DDP and FSDP run. Where the family can select positions, the
    head computes logits for the answer positions only.
    """
    target, row, keep = _answer_positions(inputs["labels"])
    head_inputs: list[Tensor] = []

    def recording_head(head: Head, hidden: Tensor) -> Tensor:
        head_inputs.append(hidden)
        return head(hidden)

    logits = _forward(model, inputs, keep, recording_head).logits
    return Answers(target, _select(logits, keep), _select(head_inputs[-1], keep), row)


def answer_losses(
    model: nn.Module, inputs: dict[str, Any], loss: Callable[[Answers, slice], tuple[Values, Values]]
) -> Losses:
    """Compute a loss over the answer tokens of a batch with ``labels`` [B, T], in chunks at the vocabulary head.

    Args:
        loss: gets n of the N answer tokens, and their slice of N. Returns the terms [n] by name, and further values
            [n] for the log.
    """
    target, row, keep = _answer_positions(inputs["labels"])

    def answers_loss(part: slice, hidden: Sequence[Tensor], logits: Sequence[Tensor]) -> tuple[Values, Values]:
        return loss(Answers(target[part], logits[0], hidden[0], row[part]), part)

    return _losses(model, inputs, keep, answers_loss)


def pair_losses(
    model: nn.Module,
    inputs: dict[str, Any],
    loss: Callable[[Pair], tuple[Values, Values]],
    *,
    views: int = 1,
    stop_gradient: bool = False,
    drop: float = 0.0,
) -> tuple[Losses, Tensor]:
    """Compute a loss over pairs of views at the answer tokens; also return the row of each answer token [N].

    Args:
        inputs: a PairCollator's batch [(1 + views) B, ...], or with ``drop`` a DropCollator's [B, ...].
        loss: as in `answer_losses`, of a pair.
        views: number of views; the terms are the means over them.
        stop_gradient: no gradient flows into the view. The view gets a forward pass of its own, before the
            original's, and stores no activations.
        drop: share of image tokens to drop, in [0, 1]. The view is then the same rows without these tokens.
    """
    labels = inputs["labels"] if drop else inputs["labels"].tensor_split(1 + views)[0]
    target, row, keep = _answer_positions(labels)
    pairs_loss = partial(_pairs_loss, loss, target, row, stop_gradient)
    if not (stop_gradient or drop):
        return _losses(model, inputs, keep.repeat(1 + views, 1), pairs_loss, views=1 + views), row
    if drop:
        without_order = {name: value for name, value in inputs.items() if name != "order"}
        originals = view_inputs = with_image_features(model, without_order)
        positions = positions_after_drop(inputs["input_ids"], inputs["order"], image_token_id(model), drop)
    else:
        originals, view_inputs = (
            {name: value.tensor_split(2)[half] for name, value in inputs.items()} for half in (0, 1)
        )
        positions = torch.ones_like(keep)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not stop_gradient):
        view = _hidden(model, view_inputs, keep, positions)
    return _losses(model, originals, keep, pairs_loss, view=view), row


def answer_hidden(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Inputs of the vocabulary head at the answer tokens [N, d] of a batch with ``labels`` [B, T]."""
    _, _, keep = _answer_positions(inputs["labels"])
    return _hidden(model, inputs, keep, torch.ones_like(keep))


def losses_against(
    model: nn.Module, inputs: dict[str, Any], view: Tensor, loss: Callable[[Pair], tuple[Values, Values]]
) -> tuple[Losses, Tensor]:
    """`pair_losses` against a ``view`` whose hidden states [N, d] were computed before, by `answer_hidden`."""
    target, row, keep = _answer_positions(inputs["labels"])
    return _losses(model, inputs, keep, partial(_pairs_loss, loss, target, row, False), view=view), row


def _pairs_loss(
    loss: Callable[[Pair], tuple[Values, Values]],
    target: Tensor,
    row: Tensor,
    stop_gradient: bool,
    part: slice,
    hidden: Sequence[Tensor],
    logits: Sequence[Tensor],
) -> tuple[Values, Values]:
    """Mean, over the views, of the loss between the first view and that view, for the answer tokens in ``part``."""
    results = [
        # detached here too: with stop_gradient a trained head gets no gradient from the view either
        loss(Pair(target[part], logits[0], view.detach() if stop_gradient else view, hidden[0], states, row[part]))
        for view, states in zip(logits[1:], hidden[1:], strict=True)
    ]
    terms, logged = ([result[i] for result in results] for i in (0, 1))
    return _mean(terms), _mean(logged)


def _mean(values: Sequence[Values]) -> Values:
    """Mean over dictionaries with the same names, name by name."""
    if len(values) == 1:
        return values[0]
    return {name: torch.stack([value[name] for value in values]).mean(dim=0) for name in values[0]}


def _answer_positions(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Answer tokens [N], the row of each [N], and the mask [B, T] of the positions that predict them."""
    answers = labels[:, 1:] != IGNORE
    keep = torch.zeros_like(labels, dtype=torch.bool)
    keep[:, :-1] = answers
    return labels[:, 1:][answers], answers.nonzero()[:, 0], keep


def _losses(
    model: nn.Module, inputs: dict[str, Any], keep: Tensor, loss: Loss, *, views: int = 1, view: Tensor | None = None
) -> Losses:
    """Replace the vocabulary head by the loss in one forward pass.

    The batch holds ``views`` views one after the other; or it holds one, and ``view`` has another one's hidden states
    [N, d].
    """
    inner, computed = base_model(model), list[Losses]()
    config, head = inner.config.get_text_config(), cast(nn.Module, inner.get_output_embeddings())
    trained = any(parameter.requires_grad for parameter in head.parameters())
    extra, postprocess = [] if view is None else [view], _logit_postprocessing(config)

    def loss_at_head(forward: Head, hidden: Tensor) -> Tensor:
        states = [*_select(hidden, keep).tensor_split(views), *extra]
        computed.append(
            losses_at_head(
                lambda part: postprocess(forward(part)) if postprocess else forward(part),
                states,
                loss,
                width=config.vocab_size,
                trained=trained,
            )
        )
        return computed[-1].total

    outputs = _forward(model, inputs, keep, loss_at_head)
    # DDP and FSDP act on the model's output, so return that. But a family that postprocesses its logits has
    # postprocessed the losses: there the output is of no use.
    return computed[-1] if postprocess else computed[-1]._replace(total=outputs.logits)


def _logit_postprocessing(config: PreTrainedConfig) -> Callable[[Tensor], Tensor] | None:
    """What a family does to the head's logits: Gemma 2 caps them, Cohere and Granite scale them; None for most."""
    cap, factor, divisor = (
        getattr(config, name, None) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")
    )
    if not (cap or factor or divisor):
        return None
    if cap:
        return lambda logits: torch.tanh(logits / cap) * cap
    return lambda logits: logits * (factor or 1) / (divisor or 1)


def _hidden(model: nn.Module, inputs: dict[str, Any], keep: Tensor, positions: Tensor) -> Tensor:
    """Inputs of the head at the positions to ``keep`` [N, d]; the language model gets ``positions`` [B, T] only."""
    with ExitStack() as hooks:
        if not positions.all():
            keep = keep.gather(1, hooks.enter_context(keep_positions(model, decoder(model), positions)))
        head_inputs: list[Tensor] = []

        def identity_head(_: Head, hidden: Tensor) -> Tensor:
            head_inputs.append(_select(hidden, keep))
            return head_inputs[-1]

        output = _forward(model, inputs, keep, identity_head).logits
    # DDP and FSDP act on the model's output, so return that, unless the family has postprocessed it as logits
    return head_inputs[-1] if _logit_postprocessing(base_model(model).config.get_text_config()) else output


def _select(states: Tensor, keep: Tensor) -> Tensor:
    """The positions to ``keep`` [N, d] of [B, T, d]; a family that selects positions gives [N, d] already."""
    return states[keep] if states.ndim == 3 else states


def _forward(model: nn.Module, inputs: dict[str, Any], keep: Tensor, at_head: Callable[[Head, Tensor], Tensor]) -> Any:
    """Run the model with ``at_head`` in the place of its head's forward.

    The head gets the positions to ``keep`` [B, T] only, where the family can select positions.
    """
    inner = base_model(model)
    selects = _SELECTS and "logits_to_keep" in inspect.signature(inner.forward).parameters
    head: Any = inner.get_output_embeddings()
    forward, is_wrapped = head.forward, "forward" in vars(head)
    head.forward = lambda hidden: at_head(forward, hidden)
    without_labels = {name: value for name, value in inputs.items() if name != "labels"}
    try:
        return model(**without_labels, use_cache=False, **({"logits_to_keep": keep} if selects else {}))
    finally:
        if is_wrapped:  # another library has replaced it on the instance
            head.forward = forward
        else:
            del head.forward


def row_mean(values: Tensor, row: Tensor, count: int) -> Tensor:
    """Mean of ``values`` [N] over each row's tokens [count]; 0 for a row without tokens.

    ``row`` [N] is the row of each token, 0 to ``count`` - 1.
    """
    return values.new_zeros(count).index_add(0, row, values) / torch.bincount(row, minlength=count).clamp(min=1)


def batches(count: int, size: int, title: str) -> Iterator[range]:
    """Row numbers 0 to ``count`` - 1 in order, ``size`` at a time, with a progress bar."""
    starts = range(0, count, size)
    return (range(start, min(start + size, count)) for start in tracked(starts, title, len(starts)))


def on_device(batch: Mapping[str, Any], model: PreTrainedModel | PeftModel) -> dict[str, Any]:
    """The batch with its tensors on the model's device."""
    return {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in batch.items()}


@contextmanager
def evaluating(model: PreTrainedModel | PeftModel) -> Generator[PreTrainedModel | PeftModel]:
    """Put the model in evaluation mode within the block; restore its mode after it."""
    was_training = model.training
    keep_layout(model)
    model.eval()
    try:
        yield model
    finally:
        model.train(was_training)


@contextmanager
def explain_token_mismatch(model: nn.Module) -> Generator[None]:
    """Turn the host's error about a wrong number of image tokens into an InputError that names the model.

    For our own collator only: with a host's collator the cause may be truncation.
    """
    try:
        yield
    except ValueError as error:
        if "image tokens do not match" not in str(error):
            raise
        name = base_model(model).name_or_path
        raise InputError(
            f"{name}: the processor and the model do not match; download or save the folder again ({error})"
        ) from error


def decoder(model: nn.Module) -> PreTrainedModel:
    """The language model's decoder, which has its ``layers``, in any family.

    Raises:
        InputError: the family has no such module.
    """
    module: Any = base_model(model).get_decoder()
    while not hasattr(module, "layers") and (inner := module.get_decoder()) is not module:
        module = inner
    if not hasattr(module, "layers"):
        raise InputError(f"{type(base_model(model)).__name__}: its language model has no `layers`; use another family")
    return module


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of the language model."""
    return cast(nn.ModuleList, decoder(model).layers)
