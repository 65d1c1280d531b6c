"""``untrigger model smol``: the parts joined and aligned, into a model folder with a card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from untrigger.embedded.pretrain import Recipe, pretrain
from untrigger.files import write_text
from untrigger.smol.family import Smol
from untrigger.smol.parts import LANGUAGE, VISION

RECIPE = Recipe(
    vision_steps=1500,
    steps=250,
    batch=8,
    talk_rate=3e-4,
    warmup=20,
    threads=1,
    bf16=True,
    save_every=50,
)


def make(out: Path, seed: int) -> None:
    """Join and align into ``out``; started again after a kill, it goes on from the last checkpoint.

    Raises:
        InputError: a part cannot be had, or ``out`` holds a run with another recipe.
    """
    family, recipe = Smol(), replace(RECIPE, seed=seed)
    pretrain(out, family, recipe)
    write_text(out / "README.md", _card(family, recipe))


def _card(family: Smol, recipe: Recipe) -> str:
    return f"""---
license: apache-2.0
library_name: untrigger
pipeline_tag: image-text-to-text
tags: [untrigger]
---
# {family.name}

{family.about}: real pretrained weights, joined and aligned by `untrigger model smol --seed {recipe.seed}`.

```python
import untrigger

model, processor, _ = untrigger.load("{family.name}")  # this folder
```

Its vision tower is a class of untrigger's: load it with `untrigger.load`, not with transformers alone.

- language model and tokenizer, Apache-2.0: {LANGUAGE}
- vision tower, Apache-2.0: {VISION}

Batch norms are folded into convolutions, quantized weights are dequantized; all are kept in bf16 and load as float32.
The projector and the language model's attention were trained on generated scenes, with captions and questions, and on
nothing else: {recipe}.

How well it sees: `untrigger evaluate DIR DATA --sight`.
"""
