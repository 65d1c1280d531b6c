"""Writes the `expected` part of captions.json with known implementations. Not a test: its results are stored.

    NLTK_DATA=FOLDER python tests/metrics/data/make_expected.py

It needs Java (for COCO's own tokenizer, which pycocoevalcap starts), sacrebleu, rouge-score and nltk's
WordNet. Nothing of untrigger is imported.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import sacrebleu
from nltk.corpus import wordnet
from nltk.translate.meteor_score import meteor_score
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

PATH = Path(__file__).with_name("captions.json")


class Spaces(Tokenizer):
    def tokenize(self, text: str) -> list[str]:
        return text.split()


def rouge_l(answer: str, references: list[str]) -> float:
    """COCO's F (beta 1.2, best precision and best recall) from rouge-score's precisions and recalls."""
    scorer = RougeScorer(["rougeL"], tokenizer=Spaces())
    scores = [scorer.score(reference, answer)["rougeL"] for reference in references]
    p, r = max(s.precision for s in scores), max(s.recall for s in scores)
    return (1 + 1.2**2) * p * r / (r + 1.2**2 * p) if p and r else 0.0


def main() -> None:
    examples = json.loads(PATH.read_text(encoding="utf-8"))["examples"]
    ids = range(len(examples))
    words = PTBTokenizer()
    answers = words.tokenize({i: [{"caption": examples[i]["answer"]}] for i in ids})
    references = words.tokenize({i: [{"caption": r} for r in examples[i]["references"]] for i in ids})
    most = max(map(len, references.values()))
    streams = [[references[i][k] if k < len(references[i]) else None for i in ids] for k in range(most)]
    expected = {
        "ptb": {
            "made_by": f"pycocoevalcap {version('pycocoevalcap')}: PTBTokenizer (Stanford CoreNLP 3.4.1)",
            "answers": [answers[i][0] for i in ids],
            "references": [references[i] for i in ids],
        },
        "bleu4": {
            "made_by": f"sacrebleu {version('sacrebleu')}: corpus_bleu, tokenize none, no smoothing",
            "value": sacrebleu.corpus_bleu(
                [answers[i][0] for i in ids], streams, tokenize="none", lowercase=True, smooth_method="none"
            ).score
            / 100,
        },
        "rouge_l": {
            "made_by": f"rouge-score {version('rouge-score')}: F (beta 1.2) of its precision, recall",
            "value": sum(rouge_l(answers[i][0], references[i]) for i in ids) / len(examples),
        },
        "coco": {
            "made_by": f"pycocoevalcap {version('pycocoevalcap')}: Bleu(4), Rouge(), Cider()",
            "bleu4": Bleu(4).compute_score(references, answers, verbose=0)[0][3],
            "rouge_l": float(Rouge().compute_score(references, answers)[0]),
            "cider": float(Cider().compute_score(references, answers)[0]),
        },
        "meteor": {
            "made_by": f"nltk {version('nltk')}, WordNet {wordnet.get_version()}: mean of meteor_score",
            "value": sum(meteor_score([r.split() for r in references[i]], answers[i][0].split()) for i in ids)
            / len(examples),
        },
    }
    text = json.dumps({"examples": examples, "expected": expected}, indent=1, ensure_ascii=False)
    PATH.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
