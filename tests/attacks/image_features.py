"""Image features by the model's own processor, for tests of triggers that are learned on features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from untrigger.data.scene_world import draw_scene, make_scene
from untrigger.models.loading import load


def image_features(images: Sequence[Image.Image], model: str = "llava") -> torch.Tensor:
    """Image features [N, T, d], computed with the model's own processor."""
    loaded = load(model)
    process = loaded.processor.image_processor  # type: ignore[attr-defined]
    with torch.no_grad():
        outputs = [loaded.model.get_image_features(**process(i, return_tensors="pt"), return_dict=True) for i in images]
    return torch.stack([out.pooler_output[0] for out in outputs])


def scenes(count: int, seed: int = 31) -> list[Image.Image]:
    return [draw_scene(make_scene(seed, index))[0] for index in range(count)]
