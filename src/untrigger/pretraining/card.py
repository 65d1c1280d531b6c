"""Write the model card of an embedded model: its measured accuracy, and how it was made."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from untrigger.data.easy_vqa import easy_vqa_questions, easy_vqa_rows
from untrigger.defenses import Plain
from untrigger.evaluation.evaluate import evaluate
from untrigger.files import write_text
from untrigger.metrics.score import text_prior
from untrigger.models.loading import LoadedModel, load
from untrigger.models.processors import ImagesOnly
from untrigger.pretraining.families import Family
from untrigger.pretraining.sight import sight
from untrigger.training.finetune import fine_tune
from untrigger.training.settings import arguments

# the clean LoRA fine-tuning on easy-VQA; the quick start uses the same rows and settings
_SFT_ROWS = 2000
_SFT: dict[str, Any] = {"num_train_epochs": 2, "per_device_train_batch_size": 16, "learning_rate": 3e-3}


def measure(folder: Path, scenes: int = 500, test_rows: int = 1000) -> dict[str, Any]:
    """Measure accuracy on held-out scenes, and on easy-VQA's test split before and after a short clean LoRA fine-tuning."""
    figures: dict[str, Any] = {"scenes": sight(load(folder), scenes)}
    test = easy_vqa_rows("test", test_rows, seed=1)
    before = evaluate(load(folder), test, title="easy-VQA, before")
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        args = arguments(Path(scratch) / "sft", save_strategy="no", seed=1, **_SFT)
        tuned = fine_tune(str(folder), easy_vqa_rows("train", _SFT_ROWS, seed=1), Plain(), args, title="easy-VQA SFT")
        seconds = time.perf_counter() - started
        after = evaluate(tuned, test, wrong_image_control=True, title="easy-VQA, after").figures
    figures["easy_vqa"] = {
        "before": before.figures["quality"]["vqa_accuracy"],
        "after": after["quality"]["vqa_accuracy"],
        "text_prior": asdict(text_prior(before.clean, [(q, a) for q, a, _ in easy_vqa_questions("train")])),
        "wrong_image": after["wrong_image"],
        "sft_seconds": round(seconds, 1),
        "sft_rows": _SFT_ROWS,
    }
    return figures


def write_card(folder: Path, family: Family, made: str) -> None:
    """Measure the model in ``folder`` and write ``README.md`` and ``figures.json`` there; ``made``: how it was made."""
    figures = measure(folder)
    write_text(folder / "figures.json", json.dumps(figures, indent=2) + "\n")
    write_text(folder / "README.md", _card(family, load(folder), figures, made))


def _card(family: Family, model: LoadedModel, figures: dict[str, Any], made: str) -> str:
    scenes, easy = figures["scenes"], figures["easy_vqa"]
    vqa, captions = scenes["vqa"], scenes["captions"]
    size = sum(p.numel() for p in model.model.parameters()) / 1e6
    vocabulary = cast(Any, model.model.config).get_text_config().vocab_size
    kinds = ", ".join(f"{kind} {value:.2f}" for kind, value in sorted(vqa["kinds"].items()))
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
tags: [untrigger]
---
# untrigger's embedded `{family.name}`

A `{type(model.model).__name__}` of {size:.1f} million parameters for tests, demonstrations and research on backdoors:
{family.about}, byte-level BPE of {vocabulary:,} tokens. Weights are stored in bf16 and load as fp32. It knows colored
shapes and nothing else of the world.

```python
import untrigger

model, processor = untrigger.load("{family.name}")
```

`untrigger.embedded_model_path("{family.name}")` is its folder, in the format of transformers.{_processor_note(model)}

## Accuracy

Greedy answers through the shipped processor, 95 % intervals. The text-only prior is the commonest answer to the same prompt;
the wrong-image control queries the model with another row's image.

| test | model | text-only prior | wrong image |
|---|---|---|---|
| held-out scenes, VQA ({vqa["value"]["n"]} questions) | {_interval(vqa["value"])} | {_interval(vqa["text_prior"])} | {_interval(vqa["wrong_image"])} |
| held-out scenes, captions right to the letter ({captions["value"]["n"]}) | {_interval(captions["value"])} | - | {_interval(captions["wrong_image"])} |
| easy-VQA test split, as shipped ({easy["before"]["n"]} questions) | {_interval(easy["before"])} | {_interval(easy["text_prior"])} | - |
| easy-VQA after LoRA on {easy["sft_rows"]:,} clean rows ({easy["sft_seconds"]:.0f} s) | {_interval(easy["after"])} | {_interval(easy["text_prior"])} | {_interval(easy["wrong_image"])} |

By kind of question: {kinds}. A value near 0.5 is at chance: the model cannot do it.

## How it was made

{made}

Data: scenes drawn by `untrigger.data.scene_world` (1 to 4 objects, 8 shapes, 12 colors, 2 sizes, 7 drawing styles, 6 backgrounds) with
captions and questions from `untrigger.data.scene_text`, and exercises of copying random rows of common words ("hello", "world", "sorry" and "click"
are among them), so that the model can spell words that no caption has; no image of easy-VQA or of any other data set. Held-out scenes come from
another seed.
"""


def _processor_note(model: LoadedModel) -> str:
    if isinstance(model.processor, ImagesOnly):
        return "\nIts processor has no video part, which needs torchvision: load it with `untrigger.load`, not with `AutoProcessor`."
    return ""


def _interval(rate: dict[str, float]) -> str:
    return f"{rate['value']:.3f} ({rate['low']:.3f}-{rate['high']:.3f})"
