"""What the package does without the libraries of its extra ``captions``."""

from __future__ import annotations

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
@pytest.mark.parametrize("verb", ["evaluate", "bench", "quickstart", "model"])
def test_commands_with_figures_name_the_extra_before_the_slow_work(
    verb: str,
    missing: tuple[str, ...],
    tiny_model: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("untrigger.evaluation.evaluate.load", lambda *_: pytest.fail("loaded the model first"))
    plan, out = tmp_path / "plan.yaml", tmp_path / "out"
    axes = {"models": ["llava"], "data": ["scenes-vqa"], "attacks": ["badnets"], "defenses": ["plain"], "rates": [0.2]}
    plan.write_text(yaml.safe_dump(axes))
    words = {
        "evaluate": (tiny_model, tiny_data),
        "bench": (plan, "--out", out),
        "quickstart": ("--out", out),
        "model": ("llava", "--out", out),
    }
    refused(untrigger(verb, *words[verb]), f"caption scores need {' and '.join(missing)}; {INSTALL}")
    assert not out.exists()
