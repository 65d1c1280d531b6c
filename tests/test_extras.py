"""What the package does without the libraries of its extra ``captions``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from shell import refused, untrigger

LIBRARIES = ("nltk", "pycocoevalcap")
INSTALL = "run: pip install 'untrigger[captions]'"


def test_all_but_the_figures_work_without_the_caption_libraries() -> None:
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({LIBRARIES}))  # import of either fails\n"
        "import untrigger\n"
        "from transformers import Trainer\n"
        "assert issubclass(untrigger.defended(Trainer), Trainer)\n"
        "for name in untrigger.__all__: getattr(untrigger, name)\n"
        "import untrigger.cli.quickstart, untrigger.bench.sweep, untrigger.bench.report.render\n"
        "print('works')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "works\n"), done.stderr


@pytest.mark.parametrize("missing", [LIBRARIES, ("pycocoevalcap",)])
@pytest.mark.parametrize("verb", ["bench", "quickstart", "model"])
def test_commands_with_figures_name_the_extra_before_the_slow_work(
    verb: str,
    missing: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    plan, out = tmp_path / "plan.yaml", tmp_path / "out"
    axes = {"models": ["llava"], "data": ["scenes-vqa"], "attacks": ["badnets"], "defenses": ["plain"], "rates": [0.2]}
    plan.write_text(yaml.safe_dump(axes))
    words = {
        "bench": (plan, "--out", out),
        "quickstart": ("--out", out),
        "model": ("llava", "--out", out),
    }
    refused(untrigger(verb, *words[verb]), f"caption scores need {' and '.join(missing)}; {INSTALL}")
    assert not out.exists()


def test_evaluate_leaves_out_caption_scores_without_their_libraries(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    monkeypatch.setenv("COLUMNS", "120")
    done = untrigger("evaluate", tiny_model, tiny_data, "--limit", 2, "--out", tmp_path / "out")
    assert (done.code, done.out.count(f"needs {INSTALL.removeprefix('run: ')}")) == (0, 4), done.out
    scores = json.loads((tmp_path / "out" / "metrics.json").read_text())["quality"]
    assert {name for name, score in scores.items() if score is None} == {"bleu4", "meteor", "rouge_l", "cider"}
