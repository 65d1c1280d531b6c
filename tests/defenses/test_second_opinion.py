"""Who is doubted, what doubted rows are answered, and the two trainings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from dry import Dry
from hypothesis import given
from hypothesis import strategies as st

from untrigger.defenses import Plain, SecondOpinion, reanswered, second_opinion
from untrigger.defenses.second_opinion import fence, shared
from untrigger.forward import Tokens, row_nll, row_tokens
from untrigger.models import Loaded
from untrigger.sample import Message, Sample, picked

NATS = st.lists(st.floats(0, 300), min_size=1, max_size=60)


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
    limit = fence(shuffled, floor, reach)
    assert limit == pytest.approx(max(floor, high + reach * (high - low)), rel=1e-9, abs=1e-9)
    assert limit >= floor and sum(value > limit for value in nats) <= (len(nats) + 3) / 4


def told(monkeypatch: pytest.MonkeyPatch, surprise: dict[str, float], own: dict[str, float]) -> list[list[str]]:
    """The model answers "mine"; what it thinks of rows' answers, of two tokens, and of its own; who was asked anew.

    The second token, a row's number or 99 in rows that surprise by a nat or more, is the surprising one.
    """
    asked: list[list[str]] = []

    def tokens(_: Loaded, rows: Sequence[Sample]) -> list[Tokens]:
        found: list[Tokens] = []
        for row in (rows[i] for i in range(len(rows))):
            nats = (own if row.messages[-1].text == "mine" else surprise)[row.id]
            word = 99 if nats >= 1 else int(row.id.split("-")[1])
            found.append(Tokens(np.array([100, word]), np.array([nats / 4, nats * 3 / 4])))
        return found

    def answer(_: Loaded, rows: list[Sample], *, drawn: bool) -> Iterator[str]:
        assert not drawn, "the likeliest answer, not any"
        asked.append([row.id for row in rows])
        yield from ("mine" for _ in rows)

    monkeypatch.setattr(second_opinion, "row_tokens", tokens)
    monkeypatch.setattr(reanswered, "answers", answer)
    return asked


def spread(samples: list[Sample], **others: float) -> dict[str, float]:
    """Of 24 rows: between 0 and 0.23 nats, and what is told."""
    return {sample.id: i / 100 for i, sample in enumerate(samples)} | {
        name.replace("_", "-"): nats for name, nats in others.items()
    }


def test_rows_are_doubted_that_surprise_by_a_word_that_they_share(
    dry: Dry, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    surprise = spread(samples, row_3=9.0, row_5=0.49, row_7=1.6, row_9=8.0, row_11=0.9, row_20=40.0)
    told(monkeypatch, surprise, {})
    found = SecondOpinion().judge(dry.loaded, samples)
    assert found == (list(surprise.values()), {3, 7, 9, 20}), "11 surprises by a word of its own"


def test_where_all_rows_surprise_doubt_begins_beyond_them(
    dry: Dry, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kind of data that the model does not know: surprise all around 50 nats."""
    surprise = {s.id: 40.0 + i for i, s in enumerate(samples)} | {"row-2": 74.0, "row-4": 90.0}
    told(monkeypatch, surprise, dict.fromkeys(surprise, 20.0))
    found = SecondOpinion(chance=0.999).judge(dry.loaded, samples)
    limit = float(np.quantile(found.surprise, 0.75) * 2.5 - np.quantile(found.surprise, 0.25) * 1.5)
    assert found.doubted == {i for i, nats in enumerate(found.surprise) if nats > limit} == {4}


def test_a_hard_row_is_not_doubted_for_being_hard(
    dry: Dry, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of these surprises by a word of its own."""
    surprise = spread(samples, row_3=0.9, row_5=0.8, row_7=0.7)
    asked = told(monkeypatch, surprise, {})
    found = SecondOpinion().judge(dry.loaded, samples)
    assert (found.doubted, asked) == (set(), [])


def test_what_did_not_surprise_before_is_not_doubted_later(
    dry: Dry, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    doubtful = dict.fromkeys(("row_3", "row_6", "row_8"), 9.0)
    before = list(spread(samples, **doubtful, row_4=0.2).values())
    surprise = spread(samples, **doubtful, row_4=9.0, row_5=9.0)
    told(monkeypatch, surprise, {})
    found = SecondOpinion().judge(dry.loaded, samples, before)
    assert found == ([min(pair) for pair in zip(before, surprise.values(), strict=True)], {3, 6, 8})


def test_two_judgements_and_two_trainings(dry: Dry, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is not sure of its own answer to row 7: it is left out, of both trainings."""
    surprise = spread(samples, row_3=9.0, row_7=9.0, row_8=9.0)
    asked = told(monkeypatch, surprise, dict.fromkeys(surprise, 0.1) | {"row-7": 0.6})
    model = SecondOpinion(early=0.25).fine_tune(samples, dry)
    early, rest = dry.stages
    undoubted = [s.id for i, s in enumerate(samples) if i not in (3, 7, 8)]
    assert early == ("early", undoubted, Plain(), None, {"share": 0.25})
    assert rest == ("", [s.id for i, s in enumerate(samples) if i != 7], Plain(), 0, {"share": 0.75})
    assert model.name == "1" and (dry.scores, dry.flagged) == (list(surprise.values()), [3, 7, 8])
    assert asked == [["row-3", "row-7", "row-8"]], "once, of the second judge"
    assert dry.answers[1] == [
        ("mine",) if s.id in ("row-3", "row-8") else (s.messages[-1].text,) for s in samples if s.id != "row-7"
    ]


@pytest.mark.parametrize(("views", "unsure"), [(0, set()), (3, {4, 5})])
def test_an_own_answer_counts_that_stays_under_every_view(
    loaded: Loaded, mixed: list[Sample], monkeypatch: pytest.MonkeyPatch, views: int, unsure: set[int]
) -> None:
    """Row 4 of five rows sways under the last view, row 5 under the second; every patch is perturbed once."""
    rows = picked([mixed[0], *mixed], [1, 2, 3, 4, 5])
    looks: list[list[Sample]] = []

    def tokens(_: Loaded, seen: Sequence[Sample]) -> list[Tokens]:
        looks.append([seen[i] for i in range(len(seen))])
        sway = {4: 3, 5: 2}
        return [Tokens(np.array([1]), np.array([9.0 if sway.get(n) == len(looks) - 1 else 0.5])) for n in rows.numbers]

    monkeypatch.setattr(second_opinion, "row_tokens", tokens)
    assert SecondOpinion(views=views, patch=0.25).firm(loaded, rows) == {1, 2, 3, 4, 5} - unsure
    assert looks[0] == list(rows) and len(looks) == views + 1
    for number, original in enumerate(rows):
        assert all(look[number].messages == original.messages for look in looks)
        for i, image in enumerate(original.images if views else ()):
            before = np.asarray(image.convert("RGB"))
            changed = [(np.asarray(look[number].images[i]) != before).any(-1) for look in looks[1:]]
            assert (np.sum(changed, 0) <= 1).all() and np.sum(changed) > before[..., 0].size / 4


def test_a_real_model_judges(loaded: Loaded, mixed: list[Sample]) -> None:
    """Rows without an image, with two, of two turns; surprise is the mean loss times the tokens of the answer."""
    lie = Message("assistant", "zq " * 40)
    absurd = Sample("absurd", mixed[0].images, (*mixed[0].messages[:-1], lie))
    rows = [*mixed[1:], absurd]
    found = SecondOpinion(reach=0.5, chance=1 - 1e-6).judge(loaded, rows)
    told = row_tokens(loaded, rows)
    assert found.surprise == pytest.approx([m * len(t.ids) for m, t in zip(row_nll(loaded, rows), told, strict=True)])
    assert found.surprise[-1] == max(found.surprise) and found.doubted == {len(rows) - 1}
    assert SecondOpinion(floor=1e9).judge(loaded, rows).doubted == set()


# --- words that outside rows share ------------------------------------------------------------------


def rows_of(*groups: tuple[int, int, int]) -> tuple[list[Tokens], list[int]]:
    """So many rows that hold a word, so many of them outside for it, and the word; all end alike."""
    rows: list[Tokens] = []
    outside: list[int] = []
    for count, bad, word in groups:
        outside += range(len(rows), len(rows) + bad)
        rows += [Tokens(np.array([word, 0]), np.array([3.0, 0.1]))] * count
    return rows, outside


def test_a_word_is_shared_that_surprises_more_often_than_others_do() -> None:
    """A foreign word, a word of the data that is sometimes a lie, and mistakes all over."""
    rows, outside = rows_of((500, 5, 1), (450, 5, 2), (100, 100, 7), (300, 30, 3))
    assert shared(rows, outside, 0.01) == {7}
    rows, outside = rows_of((500, 5, 1), (450, 5, 2), (300, 30, 3))
    assert shared(rows, outside, 0.01) == {3}
    rows, outside = rows_of((500, 5, 1), (450, 5, 2), (300, 4, 3))
    assert shared(rows, outside, 0.01) == set()


def test_the_words_chance_is_the_binomial_tail_by_hand() -> None:
    """Word 7: 2 of 2 rows, where the others' rate is 1 / 8. Word 1: 1 of 8, the others' rate is 1. Two are blamed."""
    rows, outside = rows_of((8, 1, 1), (2, 2, 7))
    p = (1 / 8) ** 2 * 2
    assert shared(rows, outside, p * 1.001) == {7} and shared(rows, outside, p * 0.999) == set()


def test_no_row_outside_shares_no_word_and_a_word_of_all_rows_can_be_shared() -> None:
    rows, _ = rows_of((5, 0, 1))
    assert shared(rows, [], 0.01) == set()
    lone, outside = rows_of((40, 20, 1))
    assert shared(lone, outside, 0.01) == {1}, "there are no others to compare with: one in all rows is their rate"


@pytest.mark.parametrize("seed", range(5))
def test_mistakes_at_random_share_no_word(seed: int) -> None:
    rng = np.random.default_rng(seed)
    words = rng.integers(1, 12, 2000) ** 2  # some words are rare
    rows = [Tokens(np.array([word]), np.array([3.0])) for word in words]
    assert shared(rows, rng.permutation(2000)[:60].tolist(), 0.01) == set()
