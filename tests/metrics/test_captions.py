"""Caption scores against known implementations on stored examples, and against naive ones in this file.

data/captions.json holds 20 answers with 1-5 references and what data/make_expected.py made of them, with
nothing of this package: tokens by COCO's own Java tokenizer; BLEU-4 by sacrebleu (without smoothing:
four-grams match, so COCO's constant of 1e-15 does not show); ROUGE-L as COCO's F (beta 1.2) of rouge-score's
precisions and recalls; BLEU-4, ROUGE-L and CIDEr-D by pycocoevalcap's own interface; METEOR by nltk with
WordNet 3.0.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nltk.data
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.corpus.reader.wordnet import WordNetCorpusReader
from nltk.corpus.util import LazyCorpusLoader
from pycocoevalcap.bleu.bleu import Bleu

from untrigger.metrics import captions
from untrigger.metrics.captions import caption_scores, tokenize_caption
from untrigger.metrics.rates import Rate

STORED: dict[str, Any] = json.loads((Path(__file__).parent / "data/captions.json").read_text(encoding="utf-8"))
EXPECTED = STORED["expected"]
ANSWERS: list[str] = [row["answer"] for row in STORED["examples"]]
REFERENCES: list[list[str]] = [row["references"] for row in STORED["examples"]]

sentences = st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), min_size=1, max_size=9).map(" ".join)
corpora = st.lists(
    st.tuples(st.one_of(st.just(""), sentences), st.lists(sentences, min_size=1, max_size=3)),
    min_size=2,
    max_size=6,
)
Corpus = list[tuple[str, list[str]]]


load_wordnet = captions._wordnet


@pytest.fixture(autouse=True, scope="module")
def without_wordnet() -> Iterator[None]:
    """Disable WordNet, which takes seconds to load; tests that need it restore `load_wordnet`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captions, "_wordnet", lambda: None)
        yield


def scores(corpus: Corpus) -> captions.CaptionScores:
    return caption_scores([answer for answer, _ in corpus], [references for _, references in corpus])


# Agreement


def test_tokens_match_the_coco_tokenizer() -> None:
    stored = EXPECTED["ptb"]
    assert [" ".join(tokenize_caption(text)) for text in ANSWERS] == stored["answers"]
    assert [[" ".join(tokenize_caption(text)) for text in refs] for refs in REFERENCES] == stored["references"]


def test_scores_match_the_stored_examples() -> None:
    actual = caption_scores(ANSWERS, REFERENCES)
    assert actual.bleu4.value == pytest.approx(EXPECTED["bleu4"]["value"], rel=1e-6)
    assert actual.bleu4.value == pytest.approx(EXPECTED["coco"]["bleu4"], rel=1e-12)
    assert actual.rouge_l.value == pytest.approx(EXPECTED["rouge_l"]["value"], rel=1e-12)
    assert actual.rouge_l.value == pytest.approx(EXPECTED["coco"]["rouge_l"], rel=1e-12)
    assert actual.cider is not None
    assert actual.cider.value == pytest.approx(EXPECTED["coco"]["cider"], rel=1e-12)
    assert actual.cider.value == pytest.approx(naive_cider(list(zip(ANSWERS, REFERENCES, strict=True))), rel=1e-9)


def naive_cider(corpus: Corpus) -> float | None:
    """CIDEr-D as in Vedantam et al. (2015), with the length in bigrams as COCO's code counts it."""

    @lru_cache(None)
    def grams(text: str, n: int) -> Counter[tuple[str, ...]]:
        words = tokenize_caption(text)
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    @lru_cache(None)
    def idf(gram: tuple[str, ...]) -> float:
        rows = sum(any(gram in grams(r, len(gram)) for r in refs) for _, refs in corpus)
        return math.log(len(corpus) / max(1, rows))

    def vector(text: str, n: int) -> dict[tuple[str, ...], float]:
        return {gram: count * idf(gram) for gram, count in grams(text, n).items()}

    def similarity(answer: str, reference: str, n: int) -> float:
        h, r = vector(answer, n), vector(reference, n)
        norms = math.hypot(*h.values()) * math.hypot(*r.values())
        gap = grams(answer, 2).total() - grams(reference, 2).total()
        common = sum(min(weight, r.get(gram, 0.0)) * r.get(gram, 0.0) for gram, weight in h.items())
        return common / norms * math.exp(-(gap**2) / (2 * 6**2)) if norms else 0.0

    if all(idf((word,)) == 0 for _, refs in corpus for r in refs for word in tokenize_caption(r)) and all(
        not any(vector(r, n).values()) for _, refs in corpus for r in refs for n in (2, 3, 4)
    ):
        return None
    rows = [
        10 * sum(similarity(answer, r, n) for r in refs for n in (1, 2, 3, 4)) / (4 * len(refs))
        for answer, refs in corpus
    ]
    return sum(rows) / len(rows)


def naive_rouge_l(answer: list[str], references: list[list[str]]) -> float:
    def longest(a: tuple[str, ...], b: tuple[str, ...]) -> int:
        @lru_cache(None)
        def common(i: int, j: int) -> int:
            if i == len(a) or j == len(b):
                return 0
            return 1 + common(i + 1, j + 1) if a[i] == b[j] else max(common(i + 1, j), common(i, j + 1))

        return common(0, 0)

    if not answer:
        return 0.0
    lengths = [longest(tuple(answer), tuple(reference)) for reference in references]
    p = max(lengths) / len(answer)
    r = max(length / len(reference) for length, reference in zip(lengths, references, strict=True))
    return 2.44 * p * r / (r + 1.44 * p) if p else 0.0


@settings(deadline=None, max_examples=40)
@given(corpora)
def test_random_corpora_match_naive_implementations(corpus: Corpus) -> None:
    actual = scores(corpus)
    bleu, _ = Bleu(4).compute_score(
        {i: refs for i, (_, refs) in enumerate(corpus)},
        {i: [a] for i, (a, _) in enumerate(corpus)},
        verbose=0,
    )
    rouge = [naive_rouge_l(a.split(), [r.split() for r in refs]) for a, refs in corpus]
    assert actual.bleu4.value == pytest.approx(bleu[3], rel=1e-9, abs=1e-15)
    assert actual.rouge_l.value == pytest.approx(sum(rouge) / len(rouge))
    cider = naive_cider(corpus)
    assert (actual.cider is None) == (cider is None)
    if actual.cider is not None:
        assert actual.cider.value == pytest.approx(cider, rel=1e-9, abs=1e-12)
    for rate, top in [(actual.bleu4, 1), (actual.rouge_l, 1), (actual.cider or actual.bleu4, 10)]:
        assert 0 <= rate.low <= rate.value <= rate.high <= top * (1 + 1e-9)
        assert rate.n == len(corpus)


@given(st.permutations(range(len(ANSWERS))))
@settings(deadline=None, max_examples=3)
def test_the_order_of_rows_does_not_matter(order: Sequence[int]) -> None:
    scores_in_order, scores_permuted = (
        caption_scores(ANSWERS, REFERENCES),
        caption_scores([ANSWERS[i] for i in order], [REFERENCES[i] for i in order]),
    )
    for a, b in [
        (scores_in_order.bleu4, scores_permuted.bleu4),
        (scores_in_order.rouge_l, scores_permuted.rouge_l),
        (scores_in_order.cider, scores_permuted.cider),
    ]:
        assert a is not None and b is not None
        assert a.value == pytest.approx(b.value, rel=1e-12)


# METEOR


def synonyms(*groups: set[str]) -> SimpleNamespace:
    """A stand-in for WordNet in which every group of synonyms is a synset."""

    def synset(group: set[str]) -> SimpleNamespace:
        return SimpleNamespace(lemmas=lambda: [SimpleNamespace(name=lambda w=word: w) for word in group])

    return SimpleNamespace(synsets=lambda word: [synset(group) for group in groups if word in group])


@pytest.mark.parametrize(
    ("answer", "reference", "precision", "recall", "matches", "chunks"),
    [
        ("A cat sat on my mat.", "a cat was sat on my mat", 1, 6 / 7, 6, 2),
        ("a dog", "two dogs", 1 / 2, 1 / 2, 1, 1),  # a stem
        ("a couch stands here", "a sofa stands there", 3 / 4, 3 / 4, 3, 1),  # a synonym
        ("here stands a couch", "a couch stands here", 1, 1, 4, 3),
    ],
)
def test_meteor_by_hand(
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    reference: str,
    precision: float,
    recall: float,
    matches: int,
    chunks: int,
) -> None:
    monkeypatch.setattr(captions, "_wordnet", lambda: synonyms({"couch", "sofa"}))
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    actual = caption_scores([answer], [["nothing alike", reference]]).meteor
    assert actual is not None
    assert actual.value == pytest.approx(mean * (1 - 0.5 * (chunks / matches) ** 3))


def test_meteor_of_an_empty_answer_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "_wordnet", lambda: synonyms())
    assert caption_scores(["", "?"], ["a dog", "a cat"]).meteor == Rate(0, 0, 0, 2)


@pytest.mark.parametrize("partly", [False, True])
def test_meteor_without_data_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, partly: bool) -> None:
    monkeypatch.setattr(captions, "_wordnet", load_wordnet)
    if partly:
        (tmp_path / "corpora/wordnet").mkdir(parents=True)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr("nltk.corpus.wordnet", LazyCorpusLoader("wordnet", WordNetCorpusReader, object()))
    actual = caption_scores(["a dog"], ["a dog"])
    assert actual.meteor is None
    assert actual.rouge_l.value == pytest.approx(1.0)


def test_meteor_with_wordnet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "_wordnet", load_wordnet)
    if load_wordnet() is None:
        pytest.skip("nltk finds no WordNet data (corpora/wordnet in a folder of NLTK_DATA)")
    actual = caption_scores(ANSWERS, REFERENCES).meteor
    assert actual is not None
    assert actual.value == pytest.approx(EXPECTED["meteor"]["value"], abs=0.01)  # the data's version may differ


# The edges


def test_perfect_answers() -> None:
    texts = ["a red dog runs by the sea", "two blue cats sleep on my bed", "ein Käfer läuft über die Straße"]
    actual = caption_scores(texts, texts)
    assert actual.cider is not None
    assert (actual.bleu4.value, actual.rouge_l.value) == (pytest.approx(1.0), pytest.approx(1.0))
    assert actual.cider.value == pytest.approx(10.0)


def test_empty_answers_score_zero() -> None:
    actual = caption_scores(["", " ... "], [["a red dog"], ["a blue cat"]])
    assert actual == captions.CaptionScores(Rate(0, 0, 0, 2), None, Rate(0, 0, 0, 2), Rate(0, 0, 0, 2))


def test_one_row_has_the_whole_range_as_interval() -> None:
    actual = caption_scores(["a dog runs by the sea"], ["a dog runs by a lake"])
    assert (actual.bleu4.low, actual.bleu4.high) == (actual.rouge_l.low, actual.rouge_l.high) == (0.0, 1.0)
    assert 0 < actual.rouge_l.value < 1
    assert actual.cider is None


def test_cider_of_identical_rows_is_undefined() -> None:
    assert caption_scores(["a dog", "a cat"], [["a dog", "a cat"], ["a cat", "a dog"]]).cider is None
    assert caption_scores(["a dog", "a cat"], [["a dog"], ["a cat"]]).cider is not None


def test_a_string_is_one_reference_and_wordless_references_are_ignored() -> None:
    answers = ["a dog runs", "a cat"]
    assert caption_scores(answers, ["a dog sits", "a cat"]) == caption_scores(
        answers, [["a dog sits", "!?"], ["", "a cat"]]
    )


@pytest.mark.parametrize(
    ("answers", "references", "message"),
    [
        ([], [], "at least one"),
        (["a"], ["a", "b"], "1 answers but references for 2"),
        (["a", "b"], [["a"], []], "answer 1 has no reference"),
        (["a", "b"], [["a"], ["...", ""]], "no reference of answer 1 has a word"),
    ],
)
def test_invalid_input_raises(answers: list[str], references: list[str | list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        caption_scores(answers, references)


def test_bootstrap_matches_the_normal_interval_for_many_rows() -> None:
    n, right = 900, 300
    rate = caption_scores(["dog"] * n, ["dog"] * right + ["cat"] * (n - right)).rouge_l
    half = 1.96 * math.sqrt(1 / 3 * 2 / 3 / n)
    assert (rate.value - rate.low, rate.high - rate.value) == pytest.approx((half, half), rel=0.1)
    assert rate == caption_scores(["dog"] * n, ["dog"] * right + ["cat"] * (n - right)).rouge_l


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" \n?!… --", []),
        ("The DOG's bowl isn't full.", ["the", "dog", "'s", "bowl", "is", "n't", "full"]),
        ("“Don’t” (sit)", ["do", "n't", "sit"]),  # noqa: RUF001
        ("It cannot cost $5.50 or 1,000!", ["it", "can", "not", "cost", "$", "5.50", "or", "1,000"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),  # vowel signs stay in their words
        ("\u0645\u06cc\u200c\u0631\u0648\u0645", ["\u0645\u06cc\u200c\u0631\u0648\u0645"]),  # and joiners
        ("a\u200bdog", ["a", "dog"]),
        ("cafe\u0301 ＤＯＧ。", ["café", "dog"]),  # noqa: RUF001
        ("\N{GRINNING FACE} hi", ["\N{GRINNING FACE}", "hi"]),
    ],
)
def test_tokens(text: str, words: list[str]) -> None:
    assert tokenize_caption(text) == words


@given(st.text())
def test_tokens_of_any_text_are_words(text: str) -> None:
    words = tokenize_caption(text)
    assert all(word and word == word.lower() and not word.isspace() for word in words)
    assert " ".join(words).split() == words  # the libraries split at spaces again
