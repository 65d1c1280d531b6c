"""The model's own way to see, for tests of what is learned on its features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from untrigger.data.scene_world import draw_scene, make_scene
from untrigger.models.loading import load


def look(images: Sequence[Image.Image], model: str = "llava") -> torch.Tensor:
    """Image features [N, T, d] by way of the model's own processor."""
    loaded = load(model)
    process = loaded.processor.image_processor  # type: ignore[attr-defined]
    with torch.no_grad():
        seen = [loaded.model.get_image_features(**process(i, return_tensors="pt"), return_dict=True) for i in images]
    return torch.stack([out.pooler_output[0] for out in seen])


def scenes(count: int, seed: int = 31) -> list[Image.Image]:
    return [draw_scene(make_scene(seed, index))[0] for index in range(count)]
