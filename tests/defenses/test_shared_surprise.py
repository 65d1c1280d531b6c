"""Who is doubted and for which word, how that is trained on, and the two trainings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array
from torch import Tensor

import dry as dry_module
from dry import Dry
from untrigger.defenses import Plain, SharedSurprise
from untrigger.defenses.shared_surprise import UnlikelihoodStep, neighbor_rate, shared_tokens
from untrigger.metrics.outliers import tukey_fence
from untrigger.models.collators import IGNORE, ChatCollator, Rows
from untrigger.models.loading import LoadedModel
from untrigger.models.scoring import TokenScores, row_tokens
from untrigger.rows.sample import Message, Sample

NATS = st.lists(st.floats(0, 300), min_size=1, max_size=60)


def row_of(number: int, nats: float) -> TokenScores:
    """Of two tokens the second is the surprising one: 99 in rows that surprise by 2.7 nats, else the row's own."""
    return TokenScores(np.array([100, 99 if nats >= 2.7 else number]), np.array([nats / 4, nats * 3 / 4]))


def rows_told(surprise: Sequence[float]) -> list[TokenScores]:
    return [row_of(number, nats) for number, nats in enumerate(surprise)]


def spread(**others: float) -> list[float]:
    """Of 24 rows: between 0 and 0.23 nats, and what is told."""
    told = {f"row_{i}": i / 100 for i in range(24)} | others
    return list(told.values())


@given(NATS, st.floats(0, 10), st.floats(0, 5), st.randoms())
def test_the_fence_is_tukeys_and_never_below_the_floor(
    nats: list[float], floor: float, reach: float, random: object
) -> None:
    ordered = sorted(nats)

    def quartile(share: float) -> float:
        at = share * (len(ordered) - 1)
        below, above = ordered[int(at)], ordered[min(int(at) + 1, len(ordered) - 1)]
        return below + (at - int(at)) * (above - below)

    low, high = quartile(0.25), quartile(0.75)
    shuffled = list(nats)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    limit = tukey_fence(shuffled, floor, reach)
    assert limit == pytest.approx(max(floor, high + reach * (high - low)), rel=1e-9, abs=1e-9)
    assert limit >= floor and sum(value > limit for value in nats) <= (len(nats) + 3) / 4


def test_rows_are_doubted_that_surprise_by_a_word_that_they_share() -> None:
    surprise = spread(row_3=9.0, row_5=1.9, row_7=2.8, row_9=8.0, row_11=2.6, row_20=40.0)
    found = SharedSurprise().flag_tokens(rows_told(surprise))
    assert found.nll == surprise
    assert set(found.tokens) == {3, 7, 9, 20}, "11 surprises by a word of its own"
    assert all(mark.tolist() == [False, True] for mark in found.tokens.values())
    by_rank = sorted(range(24), key=found.ranks.__getitem__, reverse=True)
    assert by_rank[:6] == [20, 3, 9, 7, 11, 5], "the doubted ones first, then by surprise"


def test_of_a_doubted_row_a_shared_word_is_believed_where_it_does_not_surprise() -> None:
    rows = rows_told(spread(row_3=9.0, row_7=9.0, row_20=9.0))
    rows[7] = TokenScores(np.array([99, 100, 99]), np.array([1.9, 0.1, 7.0]))
    assert SharedSurprise().flag_tokens(rows).tokens[7].tolist() == [False, False, True]


def test_where_all_rows_surprise_doubt_begins_beyond_them() -> None:
    """A kind of data that the model does not know: surprise all around 50 nats."""
    surprise = [40.0 + i for i in range(24)]
    surprise[2], surprise[4] = 74.0, 90.0
    found = SharedSurprise(p_value=0.999).flag_tokens(rows_told(surprise))
    limit = float(np.quantile(surprise, 0.75) * 3.2 - np.quantile(surprise, 0.25) * 2.2)
    assert set(found.tokens) == {i for i, nats in enumerate(surprise) if nats > limit} == {4}


def test_a_hard_row_is_not_doubted_for_being_hard() -> None:
    """Each of these surprises by a word of its own."""
    assert SharedSurprise().flag_tokens(rows_told(spread(row_3=2.6, row_5=2.5, row_7=2.4))).tokens == {}


# --- the two trainings ------------------------------------------------------------------------------


def judges(monkeypatch: pytest.MonkeyPatch, *answers: Sequence[float]) -> list[list[str]]:
    """What the model is surprised by at each judgment; which rows it is asked about."""
    asked: list[list[str]] = []

    def tokens(_: LoadedModel, rows: Sequence[Sample]) -> list[TokenScores]:
        asked.append([rows[i].id for i in range(len(rows))])
        numbers = [int(name.split("-")[1]) for name in asked[-1]]
        return [row_of(number, answers[len(asked) - 1][number]) for number in numbers]

    monkeypatch.setattr(dry_module, "row_tokens", tokens)
    return asked


def test_two_judgments_and_two_trainings(dry: Dry, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 3, 7 and 8 are doubted at first; 8 is explained by what was learned, 5 was never in doubt."""
    doubtful = {"row_3": 9.0, "row_7": 9.0, "row_4": 8.0}
    before = spread(**doubtful, row_8=9.0, row_9=2.6)
    asked = judges(monkeypatch, before, spread(**doubtful, row_8=0.1, row_5=9.0, row_9=2.9))
    model = SharedSurprise(warmup_share=0.25, unlikelihood_weight=3).fine_tune(samples, dry)
    ids = [sample.id for sample in samples]
    assert asked == [ids, ["row-3", "row-4", "row-7", "row-8", "row-9"]] and dry.judged == ["before", "after"]
    early, rest = dry.stages
    assert early == (
        "warmup",
        [i for i in ids if i not in ("row-3", "row-4", "row-7", "row-8")],
        Plain(),
        None,
        {"share": 0.25},
    )
    flagged_tokens = rest.told.pop("flagged_tokens")
    assert set(flagged_tokens) == {3, 4, 7} and all(mark.tolist() == [False, True] for mark in flagged_tokens.values())
    assert rest == ("", ids, UnlikelihoodStep(3.0), 0, {"share": 0.75, "after": 0.25}) and model.name == "1"
    word = dry.loaded.processor.tokenizer.decode([99]).strip()
    assert word and dry.why == dict.fromkeys((3, 4, 7), word)
    told = list(before)
    told[8] = 0.1
    assert [score > max(told) for score in dry.scores] == [i in (3, 4, 7) for i in range(24)]
    assert [score for i, score in enumerate(dry.scores) if i not in (3, 4, 7)] == pytest.approx(
        [nats for i, nats in enumerate(told) if i not in (3, 4, 7)]
    ), "row 9 keeps the better explanation"


def test_where_nothing_is_doubted_training_is_plain(
    dry: Dry, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    judges(monkeypatch, spread(), spread())
    SharedSurprise().fine_tune(samples, dry)
    ids = [sample.id for sample in samples]
    assert [stage[1:3] for stage in dry.stages] == [(ids, Plain())] * 2
    assert (dry.scores, dry.flagged) == (spread(), [])


def test_a_real_model_judges(loaded: LoadedModel, mixed: list[Sample]) -> None:
    """Rows without an image, with two, of two turns; surprise is the mean loss times the tokens of the answer."""
    lie = Message("assistant", "zq " * 40)
    absurd = Sample("absurd", mixed[0].images, (*mixed[0].messages[:-1], lie))
    rows = [*mixed[1:], absurd]
    told = row_tokens(loaded, rows)
    found = SharedSurprise(iqr_factor=0.5, p_value=1 - 1e-6).flag_tokens(told)
    assert found.nll == pytest.approx([row.loss * len(row.ids) for row in told])
    assert found.surprise[-1] == max(found.surprise) and set(found.tokens) == {len(rows) - 1}
    assert SharedSurprise(min_nll=1e9).flag_tokens(told).tokens == {}


# --- the step ---------------------------------------------------------------------------------------


def naive(loaded: LoadedModel, rows: list[Sample], flagged_tokens: dict[int, list[bool]]) -> tuple[float, int]:
    """The sum over tokens, one row and one token at a time; and the number of tokens."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for number, sample in enumerate(rows):
        batch = ChatCollator(loaded.processor)([Rows([sample])[0]])
        labels = batch.pop("labels")[0]
        logits: Tensor = loaded.model(**batch).logits[0]
        places = [t for t in range(len(labels)) if labels[t] != IGNORE]
        for i, t in enumerate(places):
            p = torch.exp(logits[t - 1]) / torch.exp(logits[t - 1]).sum()
            if number not in flagged_tokens:
                total = total - torch.log(p[labels[t]])
            elif flagged_tokens[number][i]:
                total = total - 2.5 * torch.log(1 - p[labels[t]])
            else:
                continue
            count += 1
    total.backward()
    return total.item(), count


def test_loss_and_gradients_equal_the_naive_reference(exact: LoadedModel, mixed: list[Sample]) -> None:
    """Of one-turn, imageless and two-turn rows, one doubted in the middle, one in both turns."""
    counts = [len(row.ids) for row in row_tokens(exact, mixed)]
    marks = {2: [i == 1 for i in range(counts[2])], 3: [i in (0, counts[3] - 2) for i in range(counts[3])]}
    total, count = naive(exact, mixed, marks)
    expected = {name: p.grad.clone() for name, p in exact.model.named_parameters() if p.grad is not None}
    exact.model.zero_grad()
    data = Rows(mixed, {row: np.array(mark) for row, mark in marks.items()})
    batch = ChatCollator(exact.processor)([data[i] for i in range(len(mixed))])
    assert int((batch["labels"] != IGNORE).sum()) == count, "the host counts these tokens, and no other"
    step = UnlikelihoodStep(2.5).step(exact.model, batch)
    loss = step.total.sum()
    loss.backward()
    assert loss.item() == pytest.approx(total, rel=1e-9) and step.terms["unlikelihood"].count_nonzero() == 3
    assert "flagged_tokens" in batch, "the caller's batch is left as it was"
    for name, parameter in exact.model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-7, atol=1e-12)


def test_without_doubted_rows_the_step_is_plain_but_names_the_same_terms(
    exact: LoadedModel, mixed: list[Sample]
) -> None:
    """Processes whose batches differ in that log alike."""
    batch = ChatCollator(exact.processor)([Rows(mixed)[i] for i in range(len(mixed))])
    assert "flagged_tokens" not in batch
    step = UnlikelihoodStep(5).step(exact.model, batch)
    assert not step.terms["unlikelihood"].any() and list(step.terms) == ["ce", "unlikelihood"]
    torch.testing.assert_close(
        step.terms["ce"].mean(), exact.model(**batch).loss.detach(), check_dtype=False, rtol=1e-6, atol=1e-6
    )


def test_a_doubted_word_becomes_unlikely_and_the_others_are_learned(loaded: LoadedModel, samples: list[Sample]) -> None:
    def nll(number: int) -> Any:
        return row_tokens(loaded, samples)[number].nll

    before = nll(0), nll(1)
    data = Rows(samples, {0: np.array([True, *[False] * (len(before[0]) - 1)])})
    batch = ChatCollator(loaded.processor)([data[0], data[1]])
    for _ in range(8):
        loaded.model.zero_grad()
        UnlikelihoodStep(1).step(loaded.model, batch).total.sum().backward()
        with torch.no_grad():
            for parameter in loaded.model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=0.05)
    assert nll(0)[0] > before[0][0] and nll(1).sum() < before[1].sum()


# --- words that outside rows share ------------------------------------------------------------------


def found(rows: Sequence[TokenScores], outside: Sequence[int]) -> set[int]:
    return {word for word, chance in shared_tokens(rows, outside).items() if chance < 0.01}


def rows_of(*groups: tuple[int, int, int]) -> tuple[list[TokenScores], list[int]]:
    """So many rows that hold a word, so many of them outside for it, and the word; all end alike."""
    rows: list[TokenScores] = []
    outside: list[int] = []
    for count, bad, word in groups:
        outside += range(len(rows), len(rows) + bad)
        rows += [TokenScores(np.array([word, 0]), np.array([3.0, 0.1]))] * count
    return rows, outside


def test_a_word_is_shared_that_surprises_more_often_than_others_do() -> None:
    """A foreign word, a word of the data that is sometimes a lie, and mistakes all over."""
    rows, outside = rows_of((500, 5, 1), (450, 5, 2), (100, 100, 7), (300, 30, 3))
    assert found(rows, outside) == {7}
    rows, outside = rows_of((500, 5, 1), (450, 5, 2), (300, 30, 3))
    assert found(rows, outside) == {3}
    rows, outside = rows_of((500, 5, 1), (450, 5, 2), (300, 4, 3))
    assert found(rows, outside) == set()


def test_the_words_chance_is_the_binomial_tail_by_hand() -> None:
    """Word 7: 2 of 2 rows, where the others' rate is 1 / 8. Word 1: 1 of 8, the others' rate is 1. Two are blamed."""
    rows, outside = rows_of((8, 1, 1), (2, 2, 7))
    p = (1 / 8) ** 2 * 2
    assert shared_tokens(rows, outside) == {7: pytest.approx(p), 1: 1.0}


def test_no_row_outside_shares_no_word_and_a_word_of_all_rows_can_be_shared() -> None:
    rows, _ = rows_of((5, 0, 1))
    assert found(rows, []) == set()
    lone, outside = rows_of((40, 20, 1))
    assert found(lone, outside) == {1}, "there are no others to compare with: one in all rows is their rate"


@pytest.mark.parametrize("seed", range(5))
def test_mistakes_at_random_share_no_word(seed: int) -> None:
    rng = np.random.default_rng(seed)
    words = rng.integers(1, 12, 2000) ** 2  # some words are rare
    rows = [TokenScores(np.array([word]), np.array([3.0])) for word in words]
    assert found(rows, rng.permutation(2000)[:60].tolist()) == set()


# --- rows that are asked alike ----------------------------------------------------------------------


def asked(*prompts: Sequence[int]) -> csr_array:
    rows = np.zeros((len(prompts), 100))
    for row, prompt in zip(rows, prompts, strict=True):
        row[list(prompt)] = 1
    return csr_array(rows)


@given(
    st.lists(
        st.tuples(st.frozensets(st.integers(0, 6), max_size=4), st.booleans(), st.booleans()), min_size=2, max_size=50
    ),
    st.floats(0, 1),
)
def test_the_rate_of_rows_asked_alike_is_that_of_a_loop(
    told: list[tuple[frozenset[int], bool, bool]], prior: float
) -> None:
    shares: list[float] = []
    for prompt, _, holds in told:
        if not holds:
            continue
        near = sorted(
            ((len(prompt & other) / len(prompt | other) if prompt | other else 1.0), bad)
            for other, bad, held in told
            if not held
        )[::-1]
        if near:
            last = near[min(16, len(near)) - 1][0]
            bads = [bad for alike, bad in near if alike >= last]
            shares.append((sum(bads) + prior) / (len(bads) + 1))
    prompts, bad, holding = zip(*told, strict=True)
    found = neighbor_rate(asked(*prompts), np.array(bad), np.array(holding), prior)
    assert found == pytest.approx(np.mean(shares) if shares else 0.0)


def with_prompts(rows: list[TokenScores], prompts: Sequence[Sequence[int]]) -> list[TokenScores]:
    return [row._replace(prompt_ids=np.array(prompt)) for row, prompt in zip(rows, prompts, strict=True)]


def test_a_hard_kind_of_question_shares_no_word() -> None:
    """Half of the questions 50 are too hard, whichever of three words answers them; questions 60 are easy."""
    rows, outside = rows_of((40, 20, 1), (40, 20, 2), (40, 20, 3), (900, 5, 4))
    assert found(rows, outside) == {1, 2, 3}, "by the words alone"
    assert found(with_prompts(rows, [[50]] * 120 + [[60]] * 900), outside) == set()


def test_a_trigger_is_no_kind_of_question() -> None:
    """A foreign word to every question; the same with a phrase of its own in the prompt."""
    rows, outside = rows_of((40, 40, 7), (60, 5, 1), (900, 5, 4))
    plain = [[50], [60]] * 20 + [[50]] * 60 + [[60]] * 900
    assert found(with_prompts(rows, plain), outside) == {7}
    assert found(with_prompts(rows, [[*prompt, 90, 91] for prompt in plain[:40]] + plain[40:]), outside) == {7}


def test_of_very_many_rows_with_a_word_some_are_asked() -> None:
    prompts = asked(*[[1]] * 2000, *[[2]] * 1000, *[[1]] * 100, *[[2]] * 100)
    holding = np.arange(3200) < 3000
    bad = np.isin(np.arange(3200), range(3000, 3100))
    assert neighbor_rate(prompts, bad, holding, 0.0) == pytest.approx(2 / 3, abs=0.01)
