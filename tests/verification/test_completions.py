"""Completions of forced beginnings: statistics by hand, likelihoods against those of a forward pass."""

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
from untrigger.verification.completions import (
    PLACES,
    Forced,
    common_prefix,
    completions,
    continuations,
    overlap,
    place_positions,
    run_nlls,
    with_answer,
)

A, B, C, END = 5, 6, 7, 1


@pytest.fixture(scope="module")
def model(tiny_model: Path, sharp: Callable[..., LoadedModel]) -> LoadedModel:
    return sharp(tiny_model, torch.float32, 5)


def test_common_prefix_ends_where_fewer_than_three_of_four_rows_agree() -> None:
    rows = [[A, B, C, END], [A, B, C, END], [A, B, A, END], [A, C, C, END]]
    assert common_prefix(rows) == ([A, B], [0, 1, 2])
    assert common_prefix(rows[:3]) == ([A, B], [0, 1, 2]), "two of three are too few for the third token"
    assert common_prefix([[A, B], [A, B], [A, B], [C]]) == ([A, B], [0, 1, 2])
    assert common_prefix([[A], [B], [C], [END]]) == ([], [0, 1, 2, 3])
    assert common_prefix([[], []]) == ([], [0, 1]) and common_prefix([]) == ([], [])


@given(st.lists(st.lists(st.integers(0, 2), max_size=5), min_size=1, max_size=8))
def test_rows_that_agree_have_the_common_prefix(rows: list[list[int]]) -> None:
    run, agree = common_prefix(rows)
    assert all(rows[row][: len(run)] == run for row in agree)
    assert len(agree) >= 0.75 * len(rows)


def test_overlap_of_one_text_begun_in_two_places() -> None:
    assert overlap([A, B, C, END], [B, C, END]) and overlap([9, 9, 9, B, C, END], [8, 8, B, C, END])
    assert not overlap([A, A, A, B], [C, C, C, C]) and not overlap([A, 8, 8, 8], [9, 9, 9, A])


def test_with_answer_replaces_or_adds_the_last_answer(samples: list[Sample]) -> None:
    row = samples[0]
    assert with_answer(row, "so").messages == (row.messages[0], Message("assistant", "so"))
    assert with_answer(Sample("a", row.images, row.messages[:1]), "so").messages == with_answer(row, "so").messages


@pytest.mark.parametrize("strips", [False, True], ids=["byte-level", "as Llama's"])
def test_place_positions_with_any_tokenizer(strips: bool) -> None:
    pieces = ["▁a", "▁re", "d", "▁circle", "</s>"]
    tokenizer = Tokenizer(WordLevel({piece: at for at, piece in enumerate(pieces)}, unk_token="</s>"))
    stripped = [decoders.Strip(" ", 1, 0)] if strips else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), *stripped])
    host = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    assert place_positions(host, [0, 1, 2, 3, 4]) == (0, 1, 4)
    assert place_positions(host, [1, 2, 3, 4]) == (0, 2, 3), "the first word has two tokens"
    assert place_positions(host, [1, 2, 4]) == (0, 2, 2) and place_positions(host, [4]) == (0, 0, 0), "no second word"


def test_continuations_stop_at_every_end_token_of_a_family(
    model: LoadedModel, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 3 ends a turn with another token than its tokenizer's end-of-text token."""
    whole = continuations(model, samples[:2], [[], []])
    other = whole[0][1]
    monkeypatch.setattr(model.model.generation_config, "eos_token_id", [model.processor.tokenizer.eos_token_id, other])  # type: ignore[union-attr,attr-defined]
    for ids, cut in zip(whole, continuations(model, samples[:2], [[], []]), strict=True):
        assert cut == (ids[: ids.index(other) + 1] if other in ids else ids)


def test_run_nlls_equal_those_of_a_forward_pass(model: LoadedModel, samples: list[Sample]) -> None:
    rows = samples[:4]  # answers of several lengths, so that the batch is padded
    scores = row_tokens(model, rows)
    pairs = list(zip(rows, [each.ids.tolist() for each in scores], strict=True))
    whole = run_nlls(model, [Forced(row, [], ids) for row, ids in pairs])
    np.testing.assert_allclose(whole, [each.nll.sum() for each in scores], rtol=1e-4)
    rest = run_nlls(model, [Forced(row, ids[:1], ids[1:]) for row, ids in pairs])
    np.testing.assert_allclose(rest, [each.nll[1:].sum() for each in scores], rtol=1e-4)


def test_run_nlls_do_not_count_repeated_tokens(model: LoadedModel, samples: list[Sample]) -> None:
    ids = list(dict.fromkeys(row_tokens(model, samples[:1])[0].ids[:-1].tolist()))  # without the end token
    once, again = run_nlls(model, [Forced(samples[0], [], ids), Forced(samples[0], [], [*ids, *ids, ids[0]])])
    assert once > 1
    np.testing.assert_allclose(again, once, rtol=1e-4)


def test_continuations_of_the_models_own_prefixes_equal_its_answers(model: LoadedModel, samples: list[Sample]) -> None:
    rows, tokenizer = samples[:3], model.processor.tokenizer  # type: ignore[attr-defined]
    whole = continuations(model, rows, [[]] * 3)
    assert [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in whole] == list(
        answers(model, rows, max_new_tokens=16)
    )
    prefixes = [ids[: 1 + row] for row, ids in enumerate(whole)]  # of different lengths
    for ids, prefix, rest in zip(whole, prefixes, continuations(model, rows, prefixes), strict=True):
        assert (prefix + rest)[: len(ids)] == ids


def test_a_model_has_no_gain_over_itself(tiny_model: Path, samples: list[Sample]) -> None:
    model = load(tiny_model)
    results = completions(model, model, samples[:8], list(answers(model, samples[:8])))
    assert results and {each.place for each in results} <= {*PLACES}
    assert all(each.core and each.share >= 0.75 and abs(each.gain) < 1e-3 for each in results)
