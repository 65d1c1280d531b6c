"""Pretraining of an embedded model on generated scenes: seeded, resumable, a few hours on two cores.

Two phases. First the vision part alone learns to predict which object covers each patch, with a head that is dropped
afterwards. These dense labels train a small ViT in minutes; answers alone take hours. Then the whole model is trained
on answers, with the dense loss at a low weight. All turns about a scene share one image prefix in one row. A block mask
and restarted positions hide the turns from each other, so a row equals as many separate conversations at a fraction
of the cost.

The LLaVA-style model learns its language from scratch. The other families start from its language model, as
InstructBLIP and LLaVA both start from Vicuna, and train on answers for fewer steps.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from untrigger.data import scene_text
from untrigger.data.scene_world import draw_scene, make_scene
from untrigger.errors import InputError
from untrigger.metrics.captions import check_libraries
from untrigger.models.loading import embedded_model_path, load
from untrigger.pretraining.dense import dense_labels
from untrigger.pretraining.families import FAMILIES, Family
from untrigger.progress import metered

_IGNORE = -100
CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Recipe:
    """All settings that the weights depend on.

    Attributes:
        seed: seed of the scenes and of everything else random.
        start: embedded model whose tokenizer and language model are copied; empty for none.
        vision_steps: steps of the first phase.
        steps: steps of the second phase.
        talk_rate: peak learning rate of the second phase.
        bf16: matrix products in bf16; weights stay in float32.
        save_every: steps between checkpoints.
    """

    seed: int = 11
    start: str = ""
    vision_steps: int = 1800
    steps: int = 3150
    batch: int = 48
    questions: int = 8
    learning_rate: float = 1e-3
    talk_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 200
    dense_weight: float = 0.3
    threads: int = 2
    bf16: bool = False
    save_every: int = 200


RECIPES = {
    "llava": Recipe(),
    "blip2": Recipe(start="llava", vision_steps=1800, steps=1200, talk_rate=6e-4, threads=1),
    "qwen2_5_vl": Recipe(start="llava", vision_steps=1800, steps=1200, talk_rate=6e-4, threads=1),
}


class Batch(dict[str, Tensor]):
    """A batch: pixel_values [B, 3, S, S], dense [B, G*G, 4], position_ids [B, axes, L].

    input_ids, labels, segments (0 is the prefix) and weights are [B, L].
    """


class SceneRows(Dataset[dict[str, np.ndarray]]):
    """Row i is scene ``first + i`` with new questions, packed behind one image prefix."""

    def __init__(
        self,
        family: Family,
        tokenizer: PreTrainedTokenizerFast,
        recipe: Recipe,
        first: int,
        count: int,
        text: bool,
    ):
        self.family, self.tokenizer, self.recipe = family, tokenizer, recipe
        self.first, self.count, self.text = first, count, text
        self.prefix, self.places = family.prefix(tokenizer)

    def _ids(self, text: str) -> list[int]:
        # the backend tokenizer: a call of its wrapper costs more than drawing the scene
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        index = self.first + i
        scene = make_scene(self.recipe.seed, index)
        image, owner = draw_scene(scene)
        row = {
            "pixel_values": (np.asarray(image, dtype=np.float32) / 127.5 - 1).transpose(2, 0, 1),
            "dense": dense_labels(scene, owner),
        }
        if self.text:
            rng = np.random.default_rng((self.recipe.seed, index, 2))
            row |= self.pack(scene_text.turns(scene, rng, self.recipe.questions))
        return row

    def pack(self, turns: list[scene_text.Turn]) -> dict[str, np.ndarray]:
        """All turns behind one prefix; `Batch` lists the fields, without the batch dimension."""
        ids, labels = list(self.prefix), [_IGNORE] * len(self.prefix)
        positions, segments = [list(axis) for axis in self.places], [0] * len(self.prefix)
        weights = [0.0] * len(self.prefix)
        begin = positions[0][-1] + 1
        for number, turn in enumerate(turns, start=1):
            prompt = self._ids(self.family.format_prompt(turn.prompt))
            answer = [*self._ids(self.family.format_answer(turn.answer)), cast(int, self.tokenizer.eos_token_id)]
            ids += prompt + answer
            labels += [_IGNORE] * len(prompt) + answer
            # by the root of the answer's length: else captions would outweigh one-word answers, or the reverse
            weights += [0.0] * len(prompt) + [len(answer) ** -0.5] * len(answer)
            for axis in positions:
                axis += range(begin, begin + len(prompt) + len(answer))
            segments += [number] * (len(prompt) + len(answer))
        packed = {"input_ids": ids, "labels": labels, "position_ids": positions, "segments": segments}
        row = {k: np.array(v, dtype=np.int64) for k, v in packed.items()}
        return row | {"weights": np.array(weights, dtype=np.float32)}


def collate(rows: list[dict[str, np.ndarray]]) -> Batch:
    fill = {"input_ids": 0, "labels": _IGNORE, "position_ids": 0, "segments": -1, "weights": 0}
    batch = Batch()
    for key in rows[0]:
        arrays = [r[key] for r in rows]
        if key in fill:
            longest = -(-max(a.shape[-1] for a in arrays) // 16) * 16
            arrays = [
                np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, longest - a.shape[-1])], constant_values=fill[key])
                for a in arrays
            ]
        batch[key] = torch.from_numpy(np.stack(arrays))
    return batch


def block_mask(segments: Tensor) -> Tensor:
    """Attention mask, bool [B, 1, L, L]: causal, and only the prefix (segment 0) and the token's own segment."""
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    own = segments[:, :, None] == segments[:, None, :]
    return ((own | (segments == 0)[:, None, :]) & causal)[:, None]


def losses(family: Family, model: PreTrainedModel, head: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the answers, and of the dense labels, of a batch with text; the vision tower runs once."""
    features, images = family.encode_images(model, batch["pixel_values"])
    embeds = model.get_input_embeddings()(batch["input_ids"])
    where = batch["input_ids"] == cast(Any, model.config).image_token_id
    embeds = embeds.masked_scatter(where[..., None], images.to(embeds.dtype))
    hidden = family.decode(model, embeds, block_mask(batch["segments"]), batch["position_ids"])
    target = batch["labels"][:, 1:]
    keep = target != _IGNORE
    logits = cast(nn.Module, model.get_output_embeddings())(hidden[:, :-1][keep])
    weight = batch["weights"][:, 1:][keep]
    answer_loss = (F.cross_entropy(logits, target[keep], reduction="none") * weight).sum() / weight.sum()
    return answer_loss, head(features, batch["dense"])


def copy_language_model(family: Family, model: PreTrainedModel, start: str) -> None:
    """Copy the language model of the embedded model ``start`` into ``model``."""
    source = FAMILIES[start].text_model(cast(PreTrainedModel, load(start, dtype=torch.float32).model)).state_dict()
    text = family.text_model(model)
    with torch.no_grad():
        for name, weight in text.named_parameters():
            if name in source:
                weight[: len(source[name])] = source[name]  # rows of added tokens stay as they are
            else:
                weight.zero_()  # Qwen's attention has biases, Llama's has none


def _schedule(step: int, total: int, recipe: Recipe) -> float:
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - recipe.warmup) / max(1, total - recipe.warmup))) * 0.98 + 0.02


def _rate(step: int, recipe: Recipe) -> float:
    if step < recipe.vision_steps:  # ends at a tenth; the second phase warms up again
        return recipe.learning_rate * max(_schedule(step, recipe.vision_steps, recipe), 0.1)
    return recipe.talk_rate * _schedule(step - recipe.vision_steps, recipe.steps, recipe)


def pretrain(out: Path, family: Family, recipe: Recipe) -> PreTrainedModel:
    """Train a model of ``family`` into ``out``; started again after a kill, it resumes from the last checkpoint.

    Raises:
        InputError: ``out`` holds a run with another recipe, or the libraries of the model card's caption scores are
            not installed.
    """
    check_libraries()
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(out, family, recipe)
    model = family.model(tokenizer)
    head = family.head(model, tokenizer)
    if recipe.start:
        copy_language_model(family, model, recipe.start)
    whole = nn.ModuleDict({"model": model, "head": head})
    learning = [p for p in whole.parameters() if p.requires_grad]
    decay = [p for p in learning if p.ndim > 1]
    plain = [p for p in learning if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))
    step = _restore(out, whole, optimizer, recipe)
    total = recipe.vision_steps + recipe.steps
    with metered("pretraining", total) as meter:
        meter.start_at(step)
        while step < total:
            text = step >= recipe.vision_steps
            end = total if text else recipe.vision_steps
            rows = SceneRows(family, tokenizer, recipe, step * recipe.batch, (end - step) * recipe.batch, text)
            loader = DataLoader(rows, recipe.batch, collate_fn=collate, num_workers=1, prefetch_factor=8)
            for batch in cast(Any, loader):
                for group in optimizer.param_groups:
                    group["lr"] = _rate(step, recipe)
                with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
                    if text:
                        answer_loss, dense = losses(family, model, head, batch)
                        loss = answer_loss + recipe.dense_weight * dense
                    else:
                        features, _ = family.encode_images(model, batch["pixel_values"])
                        answer_loss, dense = None, head(features, batch["dense"])
                        loss = dense
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(learning, 1.0)
                optimizer.step()
                step += 1
                meter.advance()
                if step % (50 if answer_loss is None else 10) == 0:
                    line = {"step": step, "talk": answer_loss and answer_loss.item(), "dense": dense.item()}
                    with (out / "pretrain.jsonl").open("a") as log:
                        print(json.dumps(line), file=log)
                if step % recipe.save_every == 0 or step == total:
                    _save(out, whole, optimizer, recipe, step)
    publish(family.finalize(model), out)
    return model


def _tokenizer(out: Path, family: Family, recipe: Recipe) -> PreTrainedTokenizerFast:
    """The run's tokenizer: made once and then read back, so that a resumed run has the same."""
    if not (out / "processor_config.json").is_file():  # the processor's last written file
        if recipe.start:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(embedded_model_path(recipe.start))
            tokenizer.add_tokens(list(family.extra_tokens), special_tokens=True)
        else:
            tokenizer = family.tokenizer(recipe.seed)
        family.processor(tokenizer).save_pretrained(out)
    return PreTrainedTokenizerFast.from_pretrained(out)


def publish(model: PreTrainedModel, out: Path) -> None:
    """Write the weights in bf16, half the size, and float32 in the config: the model loads as float32."""
    by_address: dict[int, Tensor] = {}  # tied weights stay tied, and are written once
    weights = {k: by_address.setdefault(v.data_ptr(), v.to(torch.bfloat16)) for k, v in model.state_dict().items()}
    model.save_pretrained(out, state_dict=weights)
    config = json.loads((out / "config.json").read_text())
    for part in (config, *(v for k, v in config.items() if k.endswith("_config"))):
        part["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _save(out: Path, whole: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, step: int) -> None:
    tensors = {f"w.{k}": v.detach() for k, v in whole.named_parameters() if v.requires_grad}  # tied ones once
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"o.{i}.{k}": v for k, v in state.items()}
    meta = {"step": str(step), "recipe": json.dumps(asdict(recipe))}
    save_file({k: v.contiguous() for k, v in tensors.items()}, out / "checkpoint.tmp", metadata=meta)
    os.replace(out / "checkpoint.tmp", out / CHECKPOINT)


def _restore(out: Path, whole: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe) -> int:
    file = out / CHECKPOINT
    if not file.exists():
        return 0
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    if json.loads(metadata["recipe"]) != asdict(recipe):
        raise InputError(f"{out}: holds a run with another recipe; name another folder, or delete it")
    tensors = load_file(file)
    with torch.no_grad():
        for name, weight in whole.named_parameters():
            if weight.requires_grad:
                weight.copy_(tensors[f"w.{name}"])
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("o."):
            _, i, name = key.split(".", 2)
            state.setdefault(int(i), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(metadata["step"])
