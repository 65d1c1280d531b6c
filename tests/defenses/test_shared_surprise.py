"""Which rows and tokens are flagged, the unlikelihood step, and the two trainings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dry as dry_module
from dry import Dry
from untrigger.defenses import Plain, SharedSurprise
from untrigger.defenses.shared_surprise import UnlikelihoodStep, shared_tokens
from untrigger.models.collators import IGNORE, ChatCollator, Rows
from untrigger.models.loading import LoadedModel
from untrigger.models.scoring import TokenScores, row_tokens
from untrigger.rows.sample import Message, Sample


def row_of(number: int, nats: float) -> TokenScores:
    """Two tokens, the second surprising: token 99 in rows of at least 2.7 nats, else the row's number."""
    return TokenScores(np.array([100, 99 if nats >= 2.7 else number]), np.array([nats / 4, nats * 3 / 4]))


def rows_of_nll(surprise: Sequence[float]) -> list[TokenScores]:
    return [row_of(number, nats) for number, nats in enumerate(surprise)]


def spread(**changed: float) -> list[float]:
    """NLL of 24 rows: between 0 and 0.23 nats, except for the changed rows."""
    nll = {f"row_{i}": i / 100 for i in range(24)} | changed
    return list(nll.values())


def test_flags_rows_that_share_a_surprising_token() -> None:
    nll = spread(row_3=9.0, row_5=1.9, row_7=2.8, row_9=8.0, row_11=2.6, row_20=40.0)
    flags = SharedSurprise().flag_tokens(rows_of_nll(nll))
    assert flags.nll == nll
    assert set(flags.tokens) == {3, 7, 9, 20}, "row 11 has a surprising token of its own"
    assert all(mask.tolist() == [False, True] for mask in flags.tokens.values())
    by_rank = sorted(range(24), key=flags.ranks.__getitem__, reverse=True)
    assert by_rank[:6] == [20, 3, 9, 7, 11, 5], "flagged rows first, then by NLL"


def test_does_not_flag_a_shared_token_where_it_is_likely() -> None:
    rows = rows_of_nll(spread(row_3=9.0, row_7=9.0, row_20=9.0))
    rows[7] = TokenScores(np.array([99, 100, 99]), np.array([1.9, 0.1, 7.0]))
    assert SharedSurprise().flag_tokens(rows).tokens[7].tolist() == [False, False, True]


def test_fence_adapts_to_data_that_is_surprising_throughout() -> None:
    """A kind of data that the model does not know: NLL around 50 nats in every row."""
    nll = [40.0 + i for i in range(24)]
    nll[2], nll[4] = 74.0, 90.0
    rows = [TokenScores(np.array([number]), np.array([nats])) for number, nats in enumerate(nll)]
    flags = SharedSurprise(p_value=0.999).flag_tokens(rows)
    limit = float(np.quantile(nll, 0.75) * 3.2 - np.quantile(nll, 0.25) * 2.2)
    assert set(flags.tokens) == {i for i, nats in enumerate(nll) if nats > limit} == {4}


def test_does_not_flag_hard_rows_without_a_shared_token() -> None:
    """The surprising tokens of these rows all differ."""
    assert SharedSurprise().flag_tokens(rows_of_nll(spread(row_3=2.6, row_5=2.5, row_7=2.4))).tokens == {}


# --- the two trainings ------------------------------------------------------------------------------


def stub_scores(monkeypatch: pytest.MonkeyPatch, *answers: Sequence[float]) -> list[list[str]]:
    """Replace the model's scores by these NLLs, a list for each scoring; returns the ids scored each time."""
    scored: list[list[str]] = []

    def tokens(_: LoadedModel, rows: Sequence[Sample]) -> list[TokenScores]:
        scored.append([rows[i].id for i in range(len(rows))])
        numbers = [int(name.split("-")[1]) for name in scored[-1]]
        return [row_of(number, answers[len(scored) - 1][number]) for number in numbers]

    monkeypatch.setattr(dry_module, "row_tokens", tokens)
    return scored


def test_two_scorings_and_two_trainings(dry: Dry, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 3, 7 and 8 are flagged at first; the warm-up explains 8, and 5 was never surprising before it."""
    shared = {"row_3": 9.0, "row_7": 9.0, "row_4": 8.0}
    before = spread(**shared, row_8=9.0, row_9=2.6)
    scored = stub_scores(monkeypatch, before, spread(**shared, row_8=0.1, row_5=9.0, row_9=2.9))
    model = SharedSurprise(warmup_share=0.25, unlikelihood_weight=3).fine_tune(dry)
    ids = [sample.id for sample in samples]
    assert scored == [ids, ["row-3", "row-4", "row-7", "row-8", "row-9"]] and dry.scorings == ["before", "after"]
    early, rest = dry.stages
    assert early == (
        "warmup",
        [i for i in ids if i not in ("row-3", "row-4", "row-7", "row-8")],
        Plain(),
        None,
        {"share": 0.25},
    )
    flagged_tokens = rest.options.pop("flagged_tokens")
    assert set(flagged_tokens) == {3, 4, 7} and all(mask.tolist() == [False, True] for mask in flagged_tokens.values())
    assert rest == ("", ids, UnlikelihoodStep(3.0), 0, {"share": 0.75, "after": 0.25}) and model.name == "1"
    word = dry.loaded.processor.tokenizer.decode([99]).strip()
    assert word and dry.texts == dict.fromkeys((3, 4, 7), word)
    nll = list(before)
    nll[8] = 0.1
    assert [score > max(nll) for score in dry.scores] == [i in (3, 4, 7) for i in range(24)]
    assert [score for i, score in enumerate(dry.scores) if i not in (3, 4, 7)] == pytest.approx(
        [nats for i, nats in enumerate(nll) if i not in (3, 4, 7)]
    ), "row 9 keeps the lower NLL"


def test_training_is_plain_without_flagged_rows(
    dry: Dry, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_scores(monkeypatch, spread(), spread())
    SharedSurprise().fine_tune(dry)
    ids = [sample.id for sample in samples]
    assert [stage[1:3] for stage in dry.stages] == [(ids, Plain())] * 2
    assert (dry.scores, dry.flagged) == (spread(), [])


def test_flags_an_absurd_answer_by_a_real_model(loaded: LoadedModel, mixed: list[Sample]) -> None:
    """Rows without an image, with two, of two turns; NLL is the mean loss times the number of answer tokens."""
    reply = Message("assistant", "zq " * 40)
    absurd = Sample("absurd", mixed[0].images, (*mixed[0].messages[:-1], reply))
    rows = [*mixed[1:], absurd]
    scores = row_tokens(loaded, rows)
    flags = SharedSurprise(iqr_factor=0.5, p_value=1 - 1e-6, min_ratio=0.0).flag_tokens(scores)
    assert flags.nll == pytest.approx([row.loss * len(row.ids) for row in scores])
    assert flags.nll[-1] == max(flags.nll) and set(flags.tokens) == {len(rows) - 1}
    assert SharedSurprise(min_nll=1e9).flag_tokens(scores).tokens == {}


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
    """Of one-turn, imageless and two-turn rows, one flagged in the middle, one in both turns."""
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


def test_step_without_flagged_rows_is_plain_with_the_same_terms(exact: LoadedModel, mixed: list[Sample]) -> None:
    """Processes whose batches differ in this must log the same terms."""
    batch = ChatCollator(exact.processor)([Rows(mixed)[i] for i in range(len(mixed))])
    assert "flagged_tokens" not in batch
    step = UnlikelihoodStep(5).step(exact.model, batch)
    assert not step.terms["unlikelihood"].any() and list(step.terms) == ["ce", "unlikelihood"]
    torch.testing.assert_close(
        step.terms["ce"].mean(), exact.model(**batch).loss.detach(), check_dtype=False, rtol=1e-6, atol=1e-6
    )


def test_flagged_token_becomes_unlikely_and_other_rows_are_learned(loaded: LoadedModel, samples: list[Sample]) -> None:
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


# --- shared tokens --------------------------------------------------------------------


def shared_below(rows: Sequence[TokenScores], outliers: Sequence[int]) -> set[int]:
    return {token for token, p in shared_tokens(rows, outliers, 5.0).items() if p < 0.01}


def rows_of(*groups: tuple[int, int, int]) -> tuple[list[TokenScores], list[int]]:
    """Groups of (rows, outliers among them, token): rows that contain the token; all end with the same token."""
    rows: list[TokenScores] = []
    outliers: list[int] = []
    for count, bad, token in groups:
        outliers += range(len(rows), len(rows) + bad)
        rows += [TokenScores(np.array([token, 0]), np.array([3.0, 0.1]))] * count
    return rows, outliers


def test_shared_tokens_are_surprising_more_often_than_other_rows() -> None:
    """A foreign token, a token of the data that is sometimes wrong, and mistakes everywhere."""
    rows, outliers = rows_of((500, 5, 1), (450, 5, 2), (100, 100, 7), (300, 30, 3))
    assert shared_below(rows, outliers) == {7}
    rows, outliers = rows_of((500, 5, 1), (450, 5, 2), (300, 30, 3))
    assert shared_below(rows, outliers) == {3}
    rows, outliers = rows_of((500, 5, 1), (450, 5, 2), (300, 4, 3))
    assert shared_below(rows, outliers) == set()


def test_p_value_is_the_binomial_tail_by_hand() -> None:
    """Token 7: 2 of 2 rows, rate 1 / 8 elsewhere. Token 1: 1 of 8 rows, rate 1 elsewhere. Two tokens are tested."""
    rows, outliers = rows_of((8, 1, 1), (2, 2, 7))
    p = (1 / 8) ** 2 * 2
    assert shared_tokens(rows, outliers, 5.0) == {7: pytest.approx(p), 1: 1.0}


def test_shared_tokens_without_outliers_and_in_all_rows() -> None:
    rows, _ = rows_of((5, 0, 1))
    assert shared_below(rows, []) == set()
    lone, outliers = rows_of((40, 20, 1))
    assert shared_below(lone, outliers) == {1}, "no other rows to compare with: the rate is 1 / N"


def test_a_token_of_all_rows_is_judged_by_the_outliers_behind_other_tokens() -> None:
    """Wrong labels in captions that all say "on": where a caption is wrong, "on" may be what surprises most."""
    rows = [TokenScores(np.array([at % 50 + 1, 0]), np.array([3.0, 0.1])) for at in range(2000)]
    behind_on = [TokenScores(row.ids, row.nll[::-1]) for row in rows[:20]]
    assert shared_below([*behind_on, *rows[20:]], range(20)) == {0}
    assert shared_below([*behind_on, *rows[20:]], range(120)) == set()


def test_a_word_that_is_a_few_times_harder_is_not_shared() -> None:
    """Far beyond chance, but an outlier only four times as often as the others; at six times it is."""
    rows, outliers = rows_of((1000, 40, 1), (3000, 30, 2))
    assert shared_below(rows, outliers) == set()
    rows, outliers = rows_of((1000, 60, 1), (3000, 30, 2))
    assert shared_below(rows, outliers) == {1}


@pytest.mark.parametrize("seed", range(5))
def test_random_mistakes_share_no_token(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 12, 2000) ** 2  # some tokens are rare
    rows = [TokenScores(np.array([token]), np.array([3.0])) for token in tokens]
    assert shared_below(rows, rng.permutation(2000)[:60].tolist()) == set()


# --- similar prompts ------------------------------------------------------------------------


def with_prompts(rows: list[TokenScores], prompts: Sequence[Sequence[int]]) -> list[TokenScores]:
    return [row._replace(prompt_ids=np.array(prompt)) for row, prompt in zip(rows, prompts, strict=True)]


def test_a_hard_kind_of_prompt_shares_no_token() -> None:
    """Half of the prompts 50 are too hard, with any of three answer tokens; prompts 60 are easy."""
    rows, outliers = rows_of((40, 20, 1), (40, 20, 2), (40, 20, 3), (900, 5, 4))
    assert shared_below(rows, outliers) == {1, 2, 3}, "by the tokens alone"
    assert shared_below(with_prompts(rows, [[50]] * 120 + [[60]] * 900), outliers) == set()


def test_a_short_wrong_answer_surprises_beside_long_ones() -> None:
    """A tenth of short answers is token 99; as many answers of other prompts cost 80 nats and more."""
    rows = [TokenScores(np.array([1, 2]), np.array([0.1, 0.1]), np.array([50])) for _ in range(180)]
    rows += [TokenScores(np.array([1, 99]), np.array([0.1, 8.0]), np.array([50])) for _ in range(20)]
    rows += [TokenScores(np.arange(3, 23), np.full(20, 4 + k / 50), np.array([60])) for k in range(200)]
    flags = SharedSurprise().flag_tokens(rows)
    assert set(flags.tokens) == set(range(180, 200))


def test_unsampled_rows_are_judged_by_sampled_ones_asked_alike() -> None:
    rows = [TokenScores(np.array([1, 2]), np.array([0.1, 0.1]), np.array([50])) for _ in range(90)]
    rows += [TokenScores(np.array([1, 99]), np.array([0.1, 8.0]), np.array([50])) for _ in range(10)]
    hard = [TokenScores(np.array([3, 4]), np.array([6.0, 6.0]), np.array([60])) for _ in range(70)]
    more = [TokenScores(np.array([99]), np.array([7.0]), np.array([prompt])) for prompt in (50, 60)]
    flags = SharedSurprise().flag_tokens([*rows, *hard], more)
    assert set(flags.tokens) == {*range(90, 100), 170}, "beside prompts 60 seven nats are little"


def test_a_trigger_is_not_a_kind_of_prompt() -> None:
    """A foreign token after every prompt; the same with a trigger phrase in the prompt."""
    rows, outliers = rows_of((40, 40, 7), (60, 5, 1), (900, 5, 4))
    plain = [[50], [60]] * 20 + [[50]] * 60 + [[60]] * 900
    assert shared_below(with_prompts(rows, plain), outliers) == {7}
    assert shared_below(with_prompts(rows, [[*prompt, 90, 91] for prompt in plain[:40]] + plain[40:]), outliers) == {7}
