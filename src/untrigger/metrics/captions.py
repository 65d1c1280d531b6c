"""Caption metrics as the COCO caption evaluation defines them (Chen et al., 2015, arXiv:1504.00325).

BLEU-4, ROUGE-L and CIDEr-D are computed with pycocoevalcap, METEOR with nltk and only if its WordNet data are
on this machine: nothing is ever downloaded. COCO's Java tokenizer is replaced by `tokenize_caption`. Both libraries
are an extra, imported where they are used: a training needs neither.
"""

# The two libraries ship no types; their results are annotated where they are used.
# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from untrigger.errors import InputError
from untrigger.metrics.rates import Rate, paired

if TYPE_CHECKING:
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

Floats = NDArray[np.float64]
Rows = list[tuple[list[str], list[list[str]]]]  # the tokens of an answer, and of each of its references

# Punctuation beyond ASCII: Latin-1, general (less the joiners inside Indic and Persian words), CJK.
_FOREIGN = "¡§«¶·»¿\u2000-\u200b\u200e-\u206f\u3000-\u303f"
_CHAR = rf"[^\s!-/:-@\[-`{{-~{_FOREIGN}]"
_TOKEN = re.compile(
    rf"(?:[^\W\d_]\.){{2,}}"  # a.m., u.s.
    rf"|'(?:s|m|d|re|ve|ll)(?!{_CHAR})"  # clitics, split off below
    rf"|{_CHAR}+(?:(?:[-.'/&_]|(?<=\d)[,:](?=\d)){_CHAR}+)*"  # words: black-and-white, o'clock, 1,000, 10:30
    r"|[$%&#@*+=<>^~|]"  # symbols that COCO does not count as punctuation
)
_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))(?!\w)")
_FUSED = re.compile(r"\b(can(?=not\b)|(?:gon|wan)(?=na\b)|got(?=ta\b)|(?:gim|lem)(?=me\b))")

_RESAMPLES = 1000


@dataclass(frozen=True)
class CaptionScores:
    """Scores of a corpus, each with a bootstrap interval over its rows.

    ``bleu4``, ``meteor`` and ``rouge_l`` lie in [0, 1], ``cider`` in [0, 10]. ``meteor`` is None where the
    WordNet data are missing, ``cider`` where it is undefined (see `caption_scores`).
    """

    bleu4: Rate
    meteor: Rate | None
    rouge_l: Rate
    cider: Rate | None


INSTALL = "pip install 'untrigger[captions]'"


def missing_libraries() -> list[str]:
    """The libraries of `caption_scores` that are not installed."""
    return [name for name in ("nltk", "pycocoevalcap") if find_spec(name) is None]


def check_libraries() -> None:
    """Check before long work that `caption_scores` finds its libraries.

    Raises:
        InputError: one is not installed.
    """
    if missing := missing_libraries():
        raise InputError(f"caption scores need {' and '.join(missing)}; run: {INSTALL}")


def tokenize_caption(text: str) -> list[str]:
    """Split a caption into lower-case words without punctuation, close to COCO's Penn Treebank tokens.

    "The dog's bowl isn't full." gives the, dog, 's, bowl, is, n't, full. Against the Java tokenizer: brackets
    are dropped (it keeps "-lrb-"), titles lose their full stop ("mr"), a web address falls apart, and letters
    of every script as well as emoji are kept.
    """
    lowered = unicodedata.normalize("NFKC", text).lower().replace("‘", "'").replace("’", "'")  # noqa: RUF001
    return _TOKEN.findall(_FUSED.sub(r"\1 ", _CLITIC.sub(r" \1", lowered)))


def caption_scores(answers: Sequence[str], references: Sequence[str | Sequence[str]]) -> CaptionScores:
    """Score ``answers[i]`` against ``references[i]``, one string or several; an empty answer scores 0.

    - BLEU-4 (Papineni et al., 2002): over the corpus, closest reference length, COCO's smoothing (1e-15 on
      matches), so a corpus without one common four-gram has nearly 0.
    - METEOR (Lavie and Agarwal, 2007; alpha 0.9, beta 3, gamma 0.5): mean over rows of the best reference;
      exact, stem and WordNet matches. COCO runs version 1.5, with other weights and paraphrases: figures
      differ from published ones.
    - ROUGE-L (Lin, 2004): mean over rows, F with beta = 1.2, best precision and best recall over references.
    - CIDEr-D (Vedantam et al., 2015): mean over rows, sigma 6, n = 1..4, times 10. An n-gram's weight is the
      log of rows over rows whose references hold it, so with one row, or with the same n-grams in every
      row's references, all weights are 0 and even perfect answers would score 0: it is None.

    Intervals are 95 % percentile bootstraps over rows, with a fixed seed and the CIDEr weights of the whole
    corpus. One row has no spread to resample: its interval is the metric's whole range.

    Raises:
        InputError: the libraries are not installed (`check_libraries`).
        ValueError: no answers, lengths differ, or a row has no reference with a word in it.
    """
    check_libraries()
    rows = [
        (tokenize_caption(answer), [words for words in map(tokenize_caption, texts) if words])
        for answer, texts in paired(answers, references)
    ]
    for row, (_, tokenized) in enumerate(rows):
        if not tokenized:
            raise ValueError(f"no reference of answer {row} has a word in it")
    return CaptionScores(
        bleu4=_bleu4(rows), meteor=_meteor(rows, _wordnet()), rouge_l=_rouge_l(rows), cider=_cider(rows)
    )


def _bleu4(rows: Rows) -> Rate:
    from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test

    columns: list[list[int]] = []
    for words, refs in rows:
        counts = cook_test(_line(words), cook_refs([*map(_line, refs)]), eff="closest")
        columns.append([*counts["correct"], *counts["guess"], counts["testlen"], counts["reflen"]])
    return _bootstrap(np.array(columns, np.float64), _bleu4_of_sums, top=1.0)


def _bleu4_of_sums(sums: Floats) -> Floats:
    """Compute BLEU-4 [...] from sums over rows [..., 10]: matches and n-grams for n = 1..4, both lengths."""
    matches, ngrams, length, ref_length = sums[..., :4], sums[..., 4:8], sums[..., 8], sums[..., 9]
    precision = (matches + 1e-15) / (ngrams + 1e-9)  # COCO's two constants, for equal figures
    ratio = (length + 1e-15) / (ref_length + 1e-9)
    return np.prod(precision, axis=-1) ** 0.25 * np.exp(np.minimum(0.0, 1 - 1 / ratio))


def _rouge_l(rows: Rows) -> Rate:
    from pycocoevalcap.rouge.rouge import Rouge

    rouge = Rouge()
    return _mean([rouge.calc_score([_line(words)], [*map(_line, refs)]) for words, refs in rows], top=1.0)


def _cider(rows: Rows) -> Rate | None:
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    scorer = CiderScorer(n=4, sigma=6.0)
    for words, refs in rows:
        scorer += (_line(words), [*map(_line, refs)])
    scorer.compute_doc_freq()
    if min(scorer.document_frequency.values()) == len(rows):
        return None
    return _mean(scorer.compute_cider(), top=10.0)


def _meteor(rows: Rows, wordnet: WordNetCorpusReader | None) -> Rate | None:
    if wordnet is None:
        return None
    from nltk.translate.meteor_score import meteor_score

    return _mean([meteor_score(refs, words, wordnet=wordnet) for words, refs in rows], top=1.0)


def _wordnet() -> WordNetCorpusReader | None:
    """Load WordNet from nltk's data folders (NLTK_DATA adds one); None if it is not installed."""
    from nltk.corpus import wordnet  # imported late: nltk takes longer to import than everything else

    try:
        wordnet.ensure_loaded()
    except (LookupError, OSError):  # missing or incomplete
        return None
    return wordnet


def _line(words: list[str]) -> str:
    return " ".join(words)


def _mean(scores: Sequence[float], top: float) -> Rate:
    return _bootstrap(np.array(scores, np.float64)[:, None], lambda sums: sums[..., 0] / len(scores), top)


def _bootstrap(columns: Floats, statistic: Callable[[Floats], Floats], top: float) -> Rate:
    """Compute ``statistic`` of the column sums of [rows, k] and its interval; the metric's range is [0, top]."""
    n = len(columns)
    value = float(statistic(columns.sum(axis=0)))
    if n == 1:
        return Rate(value, 0.0, top, n)
    rng = np.random.default_rng(0)
    draws = (np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(_RESAMPLES))
    low, high = np.quantile(statistic(np.stack([draw @ columns for draw in draws])), [0.025, 0.975])
    # The percentiles of a skewed statistic can exclude its value; the interval must contain it.
    return Rate(value, min(float(low), value), max(float(high), value), n)
