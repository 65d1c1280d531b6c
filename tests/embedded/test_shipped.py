"""The models that ship: they see as well as their cards say, answer in batches, and LoRA reaches all that it should."""

from __future__ import annotations

import json
from typing import cast

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import untrigger
from untrigger.data import scene_text as talk
from untrigger.data.scenes import scene_samples
from untrigger.models.generate import answers
from untrigger.models.loading import LoadedModel, add_lora, embedded_model_path, embedded_models
from untrigger.pretraining.families import FAMILIES
from untrigger.pretraining.sight import HELD_OUT, sight
from untrigger.rows.sample import Sample

TOWERS = {"llava": "model.vision_tower.", "blip2": "vision_model.", "qwen2_5_vl": "model.visual.blocks."}
PROJECTORS = {  # what is between the tower and the language model, by one of its layers
    "llava": "model.multi_modal_projector.linear_2",
    "blip2": "language_projection",
    "qwen2_5_vl": "model.visual.merger.mlp.2",
}


@pytest.fixture(scope="module", params=embedded_models())
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def loaded(name: str) -> LoadedModel:
    return untrigger.load(name, dtype=torch.float32)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """A scene each, asked in words of different lengths."""
    rows = scene_samples(HELD_OUT, range(3), talk.captions)
    return sorted({len(row.messages[0].text): row for row in rows}.values(), key=lambda row: row.id)[:3]


def test_every_family_ships() -> None:
    assert set(embedded_models()) == set(FAMILIES) == set(TOWERS)


def test_the_card_shows_what_was_measured_and_it_is_enough(name: str) -> None:
    folder = embedded_model_path(name)
    figures, card = json.loads((folder / "figures.json").read_text()), (folder / "README.md").read_text()
    least_rates = {
        "| held-out scenes, VQA": (figures["scenes"]["vqa"]["value"], 0.90),
        "| held-out scenes, captions": (figures["scenes"]["captions"]["value"], 0.80),
        "| easy-VQA after LoRA": (figures["easy_vqa"]["after"], 0.90),
    }
    for row, (rate, least) in least_rates.items():
        assert rate["value"] >= least
        (line,) = (line for line in card.splitlines() if line.startswith(row))
        assert line.split(" | ")[1].startswith(f"{rate['value']:.3f} ({rate['low']:.3f}-{rate['high']:.3f})")


def test_it_loads_and_batched_answers_equal_single_ones(loaded: LoadedModel, name: str, samples: list[Sample]) -> None:
    assert loaded.name == name and next(loaded.model.parameters()).dtype == torch.float32
    assert len({len(sample.messages[0].text) for sample in samples}) == len(samples) == 3
    alone = [next(answers(loaded, [sample])) for sample in samples]
    assert len(set(alone)) == 3, "they can be told apart"
    assert list(answers(loaded, samples)) == alone
    assert list(answers(loaded, samples[::-1], batch_size=2)) == alone[::-1]


def test_lora_reaches_every_layer_but_the_towers_and_the_head(name: str) -> None:
    model = cast(PreTrainedModel, untrigger.load(name).model)
    head = model.get_output_embeddings()
    linears = {n: module for n, module in model.named_modules() if isinstance(module, nn.Linear)}
    expected = {n for n, module in linears.items() if module is not head and not n.startswith(TOWERS[name])}
    assert PROJECTORS[name] in expected and any(n.startswith(TOWERS[name]) for n in linears)
    learning = [n for n, parameter in add_lora(model).named_parameters() if parameter.requires_grad]
    assert {n.removeprefix("base_model.model.").partition(".lora_")[0] for n in learning} == expected


@pytest.mark.slow
def test_it_sees(loaded: LoadedModel) -> None:
    """Fewer scenes than on the card, so the bounds are a little lower."""
    figures = sight(loaded, 100)
    vqa, captions = figures["vqa"], figures["captions"]
    assert vqa["value"]["value"] >= 0.85 and captions["value"]["value"] >= 0.70
    assert vqa["wrong_image"]["value"] < 0.60 and captions["wrong_image"]["value"] < 0.10
