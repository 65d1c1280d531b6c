"""Find texts that a model completes from a forced beginning, whatever its input.

A backdoor's text was learned as a whole: once begun, it is completed without the trigger. Observed in language models
by Shen et al., "BAIT: Large Language Model Backdoor Scanning by Inverting Attack Target", IEEE S&P 2025. Here the base
model selects the tokens to begin with, and tells how unusual each completion is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Any, Literal, NamedTuple, cast, final, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from untrigger.models.collators import ChatCollator, Rows
from untrigger.models.forward import batches, evaluating, forward_answers, on_device
from untrigger.models.generate import encode_prompts
from untrigger.models.loading import LoadedModel
from untrigger.rows.sample import Message, Sample

Place = Literal["start", "second word", "end"]
PLACES = get_args(Place)
_TOKENS = 16  # tokens that are tried at each place: those with the largest log p_model / p_base
_ROWS = 4  # rows on which each is tried
_NEW_TOKENS = 16  # length of a completion, at most
_AGREE = 0.75  # a token belongs to the run if so many of the rows continue with it: it does not depend on the input
_SCORED = 2  # rows on which a run is scored under the model and under its base
_BATCH = 64


@final
@dataclass(frozen=True)
class Completion:
    """What the model generates after one forced token.

    Fields:
        place: where in the answer the token was forced.
        rank: its rank among the tokens that the model prefers to its base, from 0.
        text, core: the run with the forced token, and without.
        example: the whole completion of one row, with the forced token.
        run: the tokens after the forced one that the rows share.
        share: the share of rows that share them, in (0, 1].
        nll_model, nll_base: nats of the run under the model and under its base; repeated tokens are not counted.
    """

    place: Place
    rank: int
    text: str
    core: str
    example: str
    run: tuple[int, ...]
    share: float
    nll_model: float = 0.0
    nll_base: float = 0.0

    @property
    def gain(self) -> float:
        """Nats by which the run is likelier under the model than under its base."""
        return self.nll_base - self.nll_model


class Forced(NamedTuple):
    """A row, the tokens that its answer begins with, and the tokens after them whose likelihood is wanted."""

    row: Sample
    prefix: Sequence[int]
    run: Sequence[int]


def completions(
    model: LoadedModel, base: LoadedModel, rows: Sequence[Sample], answers: Sequence[str]
) -> list[Completion]:
    """Complete answers from forced tokens, and keep what several rows complete alike.

    Args:
        rows, answers: rows of the task, and the model's own answer to each.
    """
    own = [with_answer(row, answer) for row, answer in zip(rows, answers, strict=True)]
    before, ratios = _preferences(model, base, own)
    tries = [
        (place, rank, token)
        for place in PLACES
        for rank, token in enumerate(_preferred(ratios[place], _special_ids(model)))
    ]
    tried = rows[:_ROWS]
    prefixes = [[*before[place][row], token] for place, _, token in tries for row in range(len(tried))]
    generated = continuations(model, [*tried] * len(tries), prefixes)
    candidates, scored = list[Completion](), list[Forced]()
    for number, (place, rank, token) in enumerate(tries):
        outputs = generated[number * len(tried) : (number + 1) * len(tried)]
        run, agree = common_prefix(outputs)
        if core := _decode(model, run):
            text, example = (_decode(model, [token, *rest]) for rest in (run, outputs[agree[0]]))
            candidates.append(Completion(place, rank, text, core, example, tuple(run), len(agree) / len(tried)))
            scored += [Forced(tried[row], [*before[place][row], token], run) for row in (agree * _SCORED)[:_SCORED]]
    nlls = (run_nlls(each, scored).reshape(-1, _SCORED).mean(axis=1).tolist() for each in (model, base))
    return [
        replace(candidate, nll_model=own_nll, nll_base=base_nll)
        for candidate, own_nll, base_nll in zip(candidates, *nlls, strict=True)
    ]


def common_prefix(rows: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """The longest prefix that three of four rows share, and the indices of the rows that have it."""
    run, agree = list[int](), [*range(len(rows))]
    while True:
        at = len(run)
        following = Counter(rows[row][at] for row in agree if at < len(rows[row]))
        token, count = following.most_common(1)[0] if following else (0, 0)
        if count < _AGREE * len(rows) or not count:
            return run, agree
        run.append(token)
        agree = [row for row in agree if at < len(rows[row]) and rows[row][at] == token]


def overlap(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether a third of the shorter run is in the other, in one piece: one text, begun in two places."""
    shared = SequenceMatcher(None, list(one), list(other), autojunk=False).find_longest_match().size
    return 3 * shared >= min(len(one), len(other))


def with_answer(sample: Sample, text: str) -> Sample:
    """The sample with ``text`` for its last answer."""
    turns = sample.messages[:-1] if sample.messages[-1].role == "assistant" else sample.messages
    return replace(sample, messages=(*turns, Message("assistant", text)))


# --- which tokens to begin with ---------------------------------------------------------------------


@torch.no_grad()
def _preferences(
    model: LoadedModel, base: LoadedModel, rows: Sequence[Sample]
) -> tuple[dict[Place, list[list[int]]], dict[Place, Tensor]]:
    """For each place the token ids before it in each row's answer, and log p_model / p_base of the next token.

    The log-ratio is the mean over the rows, [V].
    """
    collate, data = ChatCollator(model.processor), Rows(rows)
    before: dict[Place, list[list[int]]] = {place: [] for place in PLACES}
    sums: dict[Place, Tensor] = {}
    with evaluating(model.model) as tuned, evaluating(base.model) as untuned:
        for batch in batches(len(data), 16, "comparing next tokens"):
            inputs = collate([data[i] for i in batch])
            one, other = (forward_answers(each, on_device(inputs, each)) for each in (tuned, untuned))
            ratio = (one.logits.float().log_softmax(-1) - other.logits.float().log_softmax(-1)).cpu()
            for at in range(len(batch)):
                ids, own = one.target[one.row == at].tolist(), ratio[(one.row == at).cpu()]
                for place, step in zip(PLACES, place_positions(tokenizer_of(model), ids), strict=True):
                    before[place].append(ids[:step])
                    sums[place] = sums.get(place, 0) + own[step] / len(data)
    return before, sums


def place_positions(tokenizer: Any, ids: Sequence[int]) -> tuple[int, int, int]:
    """Positions of an answer's first token, of its second word (of its end if there is none), and of its end."""
    lengths, end = [len(tokenizer.decode(ids[:step])) for step in range(len(ids))], len(ids) - 1
    text = tokenizer.decode(ids[:end])  # some tokenizers strip the space before a word from a single token
    return 0, next((step for step in range(1, end) if text[lengths[step] : lengths[step] + 1].isspace()), end), end


def _decode(model: LoadedModel, ids: Sequence[int]) -> str:
    return str(tokenizer_of(model).decode(list(ids), skip_special_tokens=True)).strip()


def tokenizer_of(model: LoadedModel) -> Any:
    return cast(Any, model.processor).tokenizer  # transformers types it too narrowly


def _special_ids(model: LoadedModel) -> list[int]:
    return list(tokenizer_of(model).all_special_ids)


def _preferred(ratio: Tensor, excluded: Sequence[int]) -> list[int]:
    ratio = ratio.clone()
    ratio[torch.tensor(excluded)] = -torch.inf
    return ratio.topk(min(_TOKENS, len(ratio) - len(excluded))).indices.tolist()


# --- generating after a prefix, and its likelihood --------------------------------------------------


class _ForcedPrefix(LogitsProcessor):
    """Forces the first tokens of a generation, and records the NLL of each, in nats."""

    def __init__(self, tokens: Sequence[Sequence[int]], prompt_length: int) -> None:
        self.tokens, self.prompt_length = tokens, prompt_length
        self.nlls: list[list[float]] = [[] for _ in tokens]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:  # transformers declares FloatTensor
        step, logs = input_ids.shape[1] - self.prompt_length, scores.float().log_softmax(-1)
        for row, tokens in enumerate(self.tokens):
            if step < len(tokens):
                self.nlls[row].append(-float(logs[row, tokens[step]]))
                scores[row] = -torch.inf
                scores[row, tokens[step]] = 0
        return scores


def continuations(model: LoadedModel, rows: Sequence[Sample], prefixes: Sequence[Sequence[int]]) -> list[list[int]]:
    """Generate greedily after the prefix of each row's answer; the tokens up to the end-of-turn token, included."""
    outputs: list[list[int]] = []
    for batch in batches(len(rows), _BATCH, "completing answers"):
        forced = [prefixes[i] for i in batch]
        ids, _ = _generate(model, [rows[i] for i in batch], forced, _NEW_TOKENS)
        outputs += [_until_end(model, row[len(prefix) :]) for row, prefix in zip(ids, forced, strict=True)]
    return outputs


def run_nlls(model: LoadedModel, forced: Sequence[Forced]) -> NDArray[np.floating]:
    """The NLL of each row's run after its prefix, in nats.

    Of repeated tokens only the first counts: a model that stutters has not learned a text as long as its stutter.
    """
    sums: list[float] = []
    for batch in batches(len(forced), _BATCH, "scoring completions"):
        part = [forced[i] for i in batch]
        tokens = [[*each.prefix, *each.run] for each in part]
        _, recorded = _generate(model, [each.row for each in part], tokens, 0)
        for nlls, each in zip(recorded.nlls, part, strict=True):
            firsts = np.unique(each.run, return_index=True)[1]
            sums.append(float(np.array(nlls[len(each.prefix) :])[firsts].sum()))
    return np.array(sums)


@torch.inference_mode()
def _generate(
    model: LoadedModel, rows: Sequence[Sample], forced: Sequence[Sequence[int]], more: int
) -> tuple[list[list[int]], _ForcedPrefix]:
    """Generate the forced tokens of each row and up to ``more`` after them; the ids without the prompt."""
    with evaluating(model.model) as host:
        inputs = encode_prompts(model.processor, rows).to(host.device)
        prompt_length = int(inputs["input_ids"].shape[1])
        prefix = _ForcedPrefix(forced, prompt_length)
        ids = cast(Any, host).generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=max(map(len, forced)) + more,
            logits_processor=LogitsProcessorList([prefix]),
        )
    return ids[:, prompt_length:].tolist(), prefix


def _until_end(model: LoadedModel, ids: Sequence[int]) -> list[int]:
    own = cast(Any, model.model).generation_config.eos_token_id  # a list in some families, with an end-of-turn token
    ends = {tokenizer_of(model).eos_token_id, *(own if isinstance(own, list) else [own])}
    at = next((at for at, token in enumerate(ids) if token in ends), len(ids))
    return list(ids[: at + 1])
