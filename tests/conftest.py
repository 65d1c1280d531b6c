"""Shared fixtures: a tiny random LLaVA and a tiny data set, so that every path is tested in seconds."""

from __future__ import annotations

import gc
import json
import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

if TYPE_CHECKING:  # pytest-xdist's controller imports this file too, and needs neither torch nor transformers
    import torch

    from untrigger.models.loading import LoadedModel
    from untrigger.rows.sample import Sample

settings.register_profile("ci", deadline=None)  # machines are shared: a slow example is not a failure
settings.load_profile("ci")


def pytest_configure() -> None:
    # A shell makes background jobs ignore SIGINT, and the commands under test would inherit that. Some are sent one.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files with the longest tests first: started last, one would run for minutes next to an idle core."""
    long = ("invariant/test_bench.py", "scanning/test_command.py")
    items.sort(key=lambda item: not item.path.as_posix().endswith(long))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)


@pytest.fixture(scope="module", autouse=True)
def _short_collections() -> None:
    """Leave what is there out of garbage collection: the host collects after each training, and walks all imports."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer LLaVA with 32-pixel images and the embedded tokenizer."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from untrigger.models.loading import embedded_model_path, load_processor

    torch.manual_seed(0)
    embedded = load_processor(str(embedded_model_path("llava")))
    tokenizer = embedded.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=embedded.chat_template,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tuned_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with one changed weight, as if it had been fine-tuned."""
    import torch

    from untrigger.models.loading import load

    loaded, folder = load(tiny_model), tmp_path_factory.mktemp("tuned")
    with torch.no_grad():
        loaded.model.get_output_embeddings().weight[0, 0] += 0.01
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sharp() -> Callable[..., LoadedModel]:
    """Loads a model with larger weights: a random one hardly depends on its images and prompts."""
    import torch

    from untrigger.models.loading import load

    def load_sharp(folder: Path, dtype: torch.dtype = torch.float64, by: float = 4) -> LoadedModel:
        loaded = load(folder, dtype=dtype)
        with torch.no_grad():
            for parameter in loaded.model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(by)
        return loaded

    return load_sharp


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA JSON with 24 rows of 40-pixel noise images and short answers."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(24):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / "images" / f"{i}.png")
        answer = ["yes", "no", "a red circle", "two blue stars"][i % 4]
        turns = [{"from": "human", "value": "<image>\nwhat is this?"}, {"from": "gpt", "value": answer}]
        rows.append({"id": f"row-{i}", "image": f"images/{i}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="session")
def samples(tiny_data: Path) -> list[Sample]:
    from untrigger.rows.sample import read

    return list(read(tiny_data))
