"""What a model goes on to say once a word is put into its mouth, whatever it is shown.

The text of a backdoor was learned as a whole: once begun it is finished, with no trigger in sight. Seen in language
models by Shen et al., "BAIT: Large Language Model Backdoor Scanning by Inverting Attack Target", IEEE S&P 2025.
Here the base says which words are worth beginning with, and what is strange about what follows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Any, Literal, cast, final, get_args

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
_BEGINNINGS = 16  # tokens that are tried at each place, those that the model prefers most to its base
_ROWS = 4  # on which each is tried
_GOES_ON = 16  # tokens that are listened to
_AGREE = 0.75  # of the rows go on with the same token: it has nothing to do with what they show
_WEIGHED = 2  # rows on which the model and its base say how likely that was
_BATCH = 64


@final
@dataclass(frozen=True)
class Completion:
    """What the model goes on to say at one place of an answer.

    rank: of the token that was put there, among those that the model prefers, from 0. run: the tokens that the rows
    agree on after it. text, core: the run with that token and without. example: all that one row said. share: of
    the rows that agree, in (0, 1]. sure, strange: nats of the run under the model and under its base, a token that
    comes again not counted.
    """

    place: Place
    rank: int
    text: str
    core: str
    example: str
    run: tuple[int, ...]
    share: float
    sure: float = 0.0
    strange: float = 0.0

    @property
    def gain(self) -> float:
        """Nats that the run is likelier under the model than under its base."""
        return self.strange - self.sure


def completions(
    model: LoadedModel, base: LoadedModel, rows: Sequence[Sample], answers: Sequence[str]
) -> list[Completion]:
    """What the model says once begun, where several rows go on alike; ``answers`` are its own to the rows."""
    own = [said(row, answer) for row, answer in zip(rows, answers, strict=True)]
    before, ratios = _preferences(model, base, own)
    tries = [
        (place, rank, token) for place in PLACES for rank, token in enumerate(_preferred(ratios[place], _never(model)))
    ]
    asked = rows[:_ROWS]
    forced = [[*before[place][row], token] for place, _, token in tries for row in range(len(asked))]
    follow = continuations(model, [*asked] * len(tries), forced)
    found, weighed = list[Completion](), list[tuple[Sample, list[int], list[int]]]()
    for number, (place, rank, token) in enumerate(tries):
        told = follow[number * len(asked) : (number + 1) * len(asked)]
        run, agree = common_run(told)
        if core := _read(model, run):
            text, example = (_read(model, [token, *rest]) for rest in (run, told[agree[0]]))
            found.append(Completion(place, rank, text, core, example, tuple(run), len(agree) / len(asked)))
            weighed += [(asked[row], [*before[place][row], token], run) for row in (agree * _WEIGHED)[:_WEIGHED]]
    sure, strange = (nats(each, weighed).reshape(-1, _WEIGHED).mean(axis=1).tolist() for each in (model, base))
    return [replace(each, sure=s, strange=b) for each, s, b in zip(found, sure, strange, strict=True)]


def common_run(rows: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """The longest beginning that three of four rows have in common, and which rows have it."""
    run, agree = list[int](), [*range(len(rows))]
    while True:
        at = len(run)
        following = Counter(rows[row][at] for row in agree if at < len(rows[row]))
        token, count = following.most_common(1)[0] if following else (0, 0)
        if count < _AGREE * len(rows) or not count:
            return run, agree
        run.append(token)
        agree = [row for row in agree if at < len(rows[row]) and rows[row][at] == token]


def alike(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether a third of the shorter run, in one piece, is in the other too: the same text, begun in another place."""
    shared = SequenceMatcher(None, list(one), list(other), autojunk=False).find_longest_match().size
    return 3 * shared >= min(len(one), len(other))


def said(sample: Sample, text: str) -> Sample:
    """The sample with this for its last answer."""
    turns = sample.messages[:-1] if sample.messages[-1].role == "assistant" else sample.messages
    return replace(sample, messages=(*turns, Message("assistant", text)))


# --- which words to begin with ----------------------------------------------------------------------


@torch.no_grad()
def _preferences(
    model: LoadedModel, base: LoadedModel, told: Sequence[Sample]
) -> tuple[dict[Place, list[list[int]]], dict[Place, Tensor]]:
    """Of each place the ids that stand before it in each row's answer, and log p_model / p_base of the next token.

    The ratio is the mean over the rows, [V].
    """
    collate, data = ChatCollator(model.processor), Rows(told)
    before: dict[Place, list[list[int]]] = {place: [] for place in PLACES}
    sums: dict[Place, Tensor] = {}
    with evaluating(model.model) as tuned, evaluating(base.model) as untuned:
        for batch in batches(len(data), 16, "what the model prefers"):
            inputs = collate([data[i] for i in batch])
            one, other = (forward_answers(each, on_device(inputs, each)) for each in (tuned, untuned))
            ratio = (one.logits.float().log_softmax(-1) - other.logits.float().log_softmax(-1)).cpu()
            for at in range(len(batch)):
                ids, own = one.target[one.row == at].tolist(), ratio[(one.row == at).cpu()]
                for place, step in zip(PLACES, steps(tokenizer_of(model), ids), strict=True):
                    before[place].append(ids[:step])
                    sums[place] = sums.get(place, 0) + own[step] / len(data)
    return before, sums


def steps(tokenizer: Any, ids: Sequence[int]) -> tuple[int, int, int]:
    """Where an answer of these tokens starts, where its second word does (or it ends), and where it ends."""
    read, end = [len(tokenizer.decode(ids[:step])) for step in range(len(ids))], len(ids) - 1
    text = tokenizer.decode(ids[:end])  # of a token alone, some tokenizers strip the space that begins a word
    return 0, next((step for step in range(1, end) if text[read[step] : read[step] + 1].isspace()), end), end


def _read(model: LoadedModel, ids: Sequence[int]) -> str:
    return str(tokenizer_of(model).decode(list(ids), skip_special_tokens=True)).strip()


def tokenizer_of(model: LoadedModel) -> Any:
    return cast(Any, model.processor).tokenizer  # the host types it too narrowly


def _never(model: LoadedModel) -> list[int]:
    return list(tokenizer_of(model).all_special_ids)


def _preferred(ratio: Tensor, never: Sequence[int]) -> list[int]:
    ratio = ratio.clone()
    ratio[torch.tensor(never)] = -torch.inf
    return ratio.topk(min(_BEGINNINGS, len(ratio) - len(never))).indices.tolist()


# --- going on, and how likely that was --------------------------------------------------------------


class _Forced(LogitsProcessor):
    """Makes a generation say given tokens first, and notes what each would have cost, in nats."""

    def __init__(self, tokens: Sequence[Sequence[int]], asked: int) -> None:
        self.tokens, self.asked = tokens, asked
        self.nats: list[list[float]] = [[] for _ in tokens]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:  # the host asks for a FloatTensor
        step, logs = input_ids.shape[1] - self.asked, scores.float().log_softmax(-1)
        for row, tokens in enumerate(self.tokens):
            if step < len(tokens):
                self.nats[row].append(-float(logs[row, tokens[step]]))
                scores[row] = -torch.inf
                scores[row, tokens[step]] = 0
        return scores


def continuations(model: LoadedModel, rows: Sequence[Sample], begun: Sequence[Sequence[int]]) -> list[list[int]]:
    """The tokens that the model goes on with greedily after the begun ones of each row's answer, an end too."""
    found: list[list[int]] = []
    for batch in batches(len(rows), _BATCH, "beginning answers"):
        forced = [begun[i] for i in batch]
        ids, _ = _generate(model, [rows[i] for i in batch], forced, _GOES_ON)
        found += [_until_end(model, row[len(first) :]) for row, first in zip(ids, forced, strict=True)]
    return found


def nats(model: LoadedModel, told: Sequence[tuple[Sample, Sequence[int], Sequence[int]]]) -> NDArray[np.floating]:
    """What the run costs, of each row with the tokens before it and the run.

    A token is counted where it comes first: a model that stutters has not learned a text as long as its stutter.
    """
    found: list[float] = []
    for batch in batches(len(told), _BATCH, "weighing what was said"):
        part = [told[i] for i in batch]
        _, forced = _generate(model, [row for row, _, _ in part], [[*first, *run] for _, first, run in part], 0)
        for cost, (_, first, run) in zip(forced.nats, part, strict=True):
            firsts = np.unique(run, return_index=True)[1]
            found.append(float(np.array(cost[len(first) :])[firsts].sum()))
    return np.array(found)


@torch.inference_mode()
def _generate(
    model: LoadedModel, rows: Sequence[Sample], forced: Sequence[Sequence[int]], more: int
) -> tuple[list[list[int]], _Forced]:
    with evaluating(model.model) as host:
        inputs = encode_prompts(model.processor, rows).to(host.device)
        asked = int(inputs["input_ids"].shape[1])
        first = _Forced(forced, asked)
        ids = cast(Any, host).generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=max(map(len, forced)) + more,
            logits_processor=LogitsProcessorList([first]),
        )
    return ids[:, asked:].tolist(), first


def _until_end(model: LoadedModel, ids: Sequence[int]) -> list[int]:
    own = cast(Any, model.model).generation_config.eos_token_id  # several in some families, a turn's end among them
    ends = {tokenizer_of(model).eos_token_id, *(own if isinstance(own, list) else [own])}
    at = next((at for at, token in enumerate(ids) if token in ends), len(ids))
    return list(ids[: at + 1])
