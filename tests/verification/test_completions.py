"""What is said once begun: the statistics by hand, and the costs against those of a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from untrigger.models.generate import answers
from untrigger.models.loading import LoadedModel, load
from untrigger.models.scoring import row_tokens
from untrigger.rows.sample import Message, Sample
from untrigger.verification.completions import PLACES, alike, common_run, completions, continuations, nats, said, steps

A, B, C, END = 5, 6, 7, 1


@pytest.fixture(scope="module")
def model(tiny_model: Path, sharp: Callable[..., LoadedModel]) -> LoadedModel:
    return sharp(tiny_model, torch.float32, 5)


def test_the_run_ends_where_fewer_than_three_of_four_rows_agree() -> None:
    rows = [[A, B, C, END], [A, B, C, END], [A, B, A, END], [A, C, C, END]]
    assert common_run(rows) == ([A, B], [0, 1, 2])
    assert common_run(rows[:3]) == ([A, B], [0, 1, 2]), "two of three are too few for the third token"
    assert common_run([[A, B], [A, B], [A, B], [C]]) == ([A, B], [0, 1, 2])
    assert common_run([[A], [B], [C], [END]]) == ([], [0, 1, 2, 3])
    assert common_run([[], []]) == ([], [0, 1]) and common_run([]) == ([], [])


@given(st.lists(st.lists(st.integers(0, 2), max_size=5), min_size=1, max_size=8))
def test_rows_that_agree_all_begin_with_the_run(rows: list[list[int]]) -> None:
    run, agree = common_run(rows)
    assert all(rows[row][: len(run)] == run for row in agree)
    assert len(agree) >= 0.75 * len(rows)


def test_one_text_begun_in_two_places_is_one() -> None:
    assert alike([A, B, C, END], [B, C, END]) and alike([9, 9, 9, B, C, END], [8, 8, B, C, END])
    assert not alike([A, A, A, B], [C, C, C, C]) and not alike([A, 8, 8, 8], [9, 9, 9, A])


def test_another_last_answer(samples: list[Sample]) -> None:
    row = samples[0]
    assert said(row, "so").messages == (row.messages[0], Message("assistant", "so"))
    assert said(Sample("a", row.images, row.messages[:1]), "so").messages == said(row, "so").messages


@pytest.mark.parametrize("strips", [False, True], ids=["byte-level", "as Llama's"])
def test_the_second_word_is_found_in_any_tokenizer(strips: bool) -> None:
    pieces = ["▁a", "▁re", "d", "▁circle", "</s>"]
    tokenizer = Tokenizer(WordLevel({piece: at for at, piece in enumerate(pieces)}, unk_token="</s>"))
    stripped = [decoders.Strip(" ", 1, 0)] if strips else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), *stripped])
    host = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    assert steps(host, [0, 1, 2, 3, 4]) == (0, 1, 4)
    assert steps(host, [1, 2, 3, 4]) == (0, 2, 3), "its first word is of two pieces"
    assert steps(host, [1, 2, 4]) == (0, 2, 2) and steps(host, [4]) == (0, 0, 0), "no second word"


def test_nothing_is_heard_after_any_of_the_ends_that_a_family_has(
    model: LoadedModel, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 3 ends a turn with another token than its tokenizer's end."""
    whole = continuations(model, samples[:2], [[], []])
    other = whole[0][1]
    monkeypatch.setattr(model.model.generation_config, "eos_token_id", [model.processor.tokenizer.eos_token_id, other])  # type: ignore[union-attr,attr-defined]
    for ids, now in zip(whole, continuations(model, samples[:2], [[], []]), strict=True):
        assert now == (ids[: ids.index(other) + 1] if other in ids else ids)


def test_a_run_costs_what_a_forward_pass_says(model: LoadedModel, samples: list[Sample]) -> None:
    rows = samples[:4]  # answers of several lengths, so that the batch is padded
    told = row_tokens(model, rows)
    cost = nats(model, [(row, [], each.ids.tolist()) for row, each in zip(rows, told, strict=True)])
    np.testing.assert_allclose(cost, [each.nll.sum() for each in told], rtol=1e-4)
    rest = nats(
        model, [(row, each.ids[:1].tolist(), each.ids[1:].tolist()) for row, each in zip(rows, told, strict=True)]
    )
    np.testing.assert_allclose(rest, [each.nll[1:].sum() for each in told], rtol=1e-4)


def test_a_stutter_costs_what_it_repeats(model: LoadedModel, samples: list[Sample]) -> None:
    ids = list(dict.fromkeys(row_tokens(model, samples[:1])[0].ids[:-1].tolist()))  # without its end: it goes on
    once, again = nats(model, [(samples[0], [], ids), (samples[0], [], [*ids, *ids, ids[0]])])
    assert once > 1
    np.testing.assert_allclose(again, once, rtol=1e-4)


def test_an_answer_begun_as_the_model_would_goes_on_as_it_would(model: LoadedModel, samples: list[Sample]) -> None:
    rows, tokenizer = samples[:3], model.processor.tokenizer  # type: ignore[attr-defined]
    whole = continuations(model, rows, [[]] * 3)
    assert [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in whole] == list(
        answers(model, rows, max_new_tokens=16)
    )
    begun = [ids[: 1 + row] for row, ids in enumerate(whole)]  # of different lengths
    for ids, first, rest in zip(whole, begun, continuations(model, rows, begun), strict=True):
        assert (first + rest)[: len(ids)] == ids


def test_a_model_gains_nothing_on_itself(tiny_model: Path, samples: list[Sample]) -> None:
    model = load(tiny_model)
    found = completions(model, model, samples[:8], list(answers(model, samples[:8])))
    assert found and {saying.place for saying in found} <= {*PLACES}
    assert all(saying.core and saying.share >= 0.75 and abs(saying.gain) < 1e-3 for saying in found)
