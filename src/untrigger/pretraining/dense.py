"""Dense labels: which object covers each patch of a scene, and a head that predicts it; used in pretraining only."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from untrigger.data.scene_world import COLORS, SHAPES, SIZES, Scene
from untrigger.pretraining.build import GRID, PATCH

_CLASSES = (1 + len(SHAPES), 1 + len(COLORS), 1 + len(SIZES), 5)  # 0 is background; the last is the order


def dense_labels(scene: Scene, owner: np.ndarray) -> np.ndarray:
    """Shape, color, size and order of the object covering each patch: int64 [G*G, 4], 0 for background."""
    cells = owner.reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3).reshape(GRID * GRID, -1)
    cover = np.stack([(cells == i).sum(axis=1) for i in range(1, len(scene.things) + 1)], axis=1)
    best = np.where(cover.max(axis=1) >= 6, cover.argmax(axis=1) + 1, 0)
    table = np.zeros((len(scene.things) + 1, 4), dtype=np.int64)
    for i, t in enumerate(scene.things, start=1):
        table[i] = (SHAPES.index(t.shape) + 1, list(COLORS).index(t.color) + 1, SIZES.index(t.size) + 1, i)
    return table[best]


class DenseHead(nn.Module):
    """Linear head: predicts from an image token's features what covers each of its patches."""

    def __init__(self, width: int, cells: Tensor) -> None:
        super().__init__()
        self.cells = cells
        self.heads = nn.ModuleList(nn.Linear(width, n * cells.shape[1]) for n in _CLASSES)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """features [B, T, d], labels [B, G*G, 4] -> mean cross-entropy; background weighs 0.3."""
        labels = labels[:, self.cells]  # [B, T, c, 4]
        weight = torch.where(labels[..., 0] > 0, 1.0, 0.3).flatten()
        losses = [
            F.cross_entropy(head(features).view(-1, n), labels[..., i].flatten(), reduction="none")
            for i, (head, n) in enumerate(zip(self.heads, _CLASSES, strict=True))
        ]
        return (torch.stack(losses).sum(0) * weight).sum() / weight.sum()
