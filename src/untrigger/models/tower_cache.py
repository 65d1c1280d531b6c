"""Reuse the outputs of a frozen vision tower: over the epochs and stages of a training an image passes through it once.

An output depends on the tower's weights and the pixels only, so training ends in the same bits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import update_wrapper
from hashlib import sha256
from typing import Any, NamedTuple, cast, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from transformers.utils.generic import ModelOutput

from untrigger.models.loading import base_model, is_vision

_LIMIT = 128 * 2**20  # bytes of outputs
_MOST_REFUSED = 4  # times as many images as were stored or served
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)  # in training they read the batch


class _Layout(NamedTuple):
    """How a tower's output consists of tensors: for each of its leaves which tensor that is, or None."""

    spec: TreeSpec
    leaves: list[int | None]


@final
@dataclass
class TowerOutputs:
    """Outputs of frozen towers by tower and image, up to 128 MiB; once full, it takes no more.

    To evict old images would not help: an epoch that does not fit would evict each image before its next turn. Where
    far more images are refused than served, it gives its memory back, and stays empty.
    """

    free: int = _LIMIT
    images: dict[bytes, list[Tensor]] = field(default_factory=dict[bytes, list[Tensor]])
    layouts: dict[bytes, _Layout] = field(default_factory=dict[bytes, _Layout])
    served: int = 0
    refused: int = 0

    def find(self, keys: Sequence[bytes]) -> dict[bytes, list[Tensor]]:
        """The tensors of those images that are stored."""
        stored = {key: self.images[key] for key in keys if key in self.images}
        self.served += len(stored)
        return stored

    def store(self, keys: Sequence[bytes], tensors: Sequence[Tensor]) -> None:
        """Store a copy of the images' tensors [N, ...], if there is room, and if they belong to no graph.

        With gradient checkpointing the host lets the inputs of a frozen tower require gradients too. A stored graph
        would be passed through backwards twice. The images are copied as one block: small ones would lie scattered
        among the activations, and keep the memory between them from being used again.
        """
        if any(tensor.requires_grad for tensor in tensors):
            return
        size = sum(tensor.nbytes for tensor in tensors)
        if size <= self.free:
            self.free -= size
            blocks = [tensor.clone() for tensor in tensors]
            self.images |= {key: [block[at] for block in blocks] for at, key in enumerate(keys)}
            return
        self.refused += len(keys)
        if self.refused > _MOST_REFUSED * (self.served + len(self.images)):
            self.images.clear()
            self.free = 0


_shared: TowerOutputs | None = None


def share_tower_outputs() -> None:
    """From now on, all models of this process share outputs; otherwise each training has its own."""
    global _shared
    _shared = TowerOutputs()


def tower_outputs() -> TowerOutputs:
    """The outputs that this process shares, or new ones."""
    return _shared or TowerOutputs()


@contextmanager
def reuse_tower_outputs(model: nn.Module, outputs: TowerOutputs) -> Generator[None]:
    """Within the block, take the vision tower's output for an image from ``outputs``, and store it there if it is new.

    It works on a CPU, where the first batch shows whether an image alone has the same bits as in a batch. It does
    nothing if a weight of the tower is trained, if the tower's output is random or depends on the batch, or if the
    tower takes or returns anything but one block for each image.
    """
    tower = _frozen_tower(model)
    if tower is None:
        yield
        return
    own = vars(tower).get("forward")  # another library may have replaced it on the instance
    tower.forward = _Reused(tower.forward, _weights_digest(tower), outputs)
    try:
        yield
    finally:
        del tower.forward
        if own is not None:
            tower.forward = own


@final
class _Reused:
    """A tower's ``forward`` with stored outputs."""

    def __init__(self, compute: Callable[..., Any], weights: bytes, outputs: TowerOutputs) -> None:
        update_wrapper(self, compute)
        self._compute, self._weights, self._outputs = compute, weights, outputs
        self._is_exact: bool | None = None  # None: not known yet

    def __call__(self, pixel_values: Any = None, *args: Any, **kwargs: Any) -> Any:
        if self._is_exact is False or args or not _is_images(pixel_values, kwargs):
            return self._compute(pixel_values, *args, **kwargs)
        if self._is_exact is None:
            output = self._compute(pixel_values, **kwargs)
            if len(pixel_values) > 1:
                alone = (self._compute(image, **kwargs) for image in pixel_values[:2].split(1))
                self._is_exact = _is_joined(output, list(alone))
            return output
        return self._reuse(pixel_values, kwargs)

    def _reuse(self, pixels: Tensor, kwargs: dict[str, Any]) -> Any:
        autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
        situation = repr((sorted(kwargs.items()), pixels.dtype, pixels.shape[1:], autocast))
        call = sha256(self._weights + situation.encode()).digest()
        layouts = self._outputs.layouts
        keys = [
            call + sha256(image.contiguous().view(torch.uint8).numpy().tobytes()).digest() for image in pixels.detach()
        ]
        rows = self._outputs.find(keys)
        new = {key: at for at, key in enumerate(keys) if key not in rows}
        if new:
            output = self._compute(pixels[list(new.values())], **kwargs)
            tensors, layouts[call] = _taken_apart(output)
            rows |= {key: [tensor[at] for tensor in tensors] for at, key in enumerate(new)}
            self._outputs.store(list(new), tensors)
        joined = [torch.stack(parts) for parts in zip(*(rows[key] for key in keys), strict=True)]
        layout = layouts[call]
        return tree_unflatten([None if at is None else joined[at] for at in layout.leaves], layout.spec)


def _frozen_tower(model: nn.Module) -> nn.Module | None:
    """The model's vision tower, if no weight in it is trained and its output is the same every time."""
    tower = next((module for name, module in base_model(model).named_modules() if is_vision(name)), None)
    if tower is None or next(iter(inspect.signature(tower.forward).parameters)) != "pixel_values":
        return None
    config = getattr(tower, "config", None)
    settings = config.to_dict() if config is not None else {}
    random = any("drop" in name and value for name, value in settings.items())
    random |= any(isinstance(part, _NORMS) or getattr(part, "p", 0) for part in tower.modules())
    return None if random or any(weight.requires_grad for weight in tower.parameters()) else tower


def _weights_digest(tower: nn.Module) -> bytes:
    digest = sha256(repr((type(tower), getattr(tower, "config", None))).encode())
    for name, weight in tower.state_dict().items():
        digest.update(repr((name, weight.dtype, weight.shape)).encode())
        digest.update(weight.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.digest()


def _is_images(pixels: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call's arguments are pixels [N, C, H, W] on the CPU, N above 0, and plain values."""
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or pixels.device.type != "cpu" or not len(pixels):
        return False
    plain = all(isinstance(value, bool | int | float | str | None) for value in kwargs.values())
    return plain and not pixels.requires_grad


def _taken_apart(output: Any) -> tuple[list[Tensor], _Layout]:
    """The distinct tensors of a tower's output, and how it consists of them."""
    leaves, spec = tree_flatten(output)
    distinct = {id(leaf): leaf for leaf in leaves if leaf is not None}
    places = list(distinct)
    tensors = cast(list[Tensor], list(distinct.values()))
    return tensors, _Layout(spec, [None if leaf is None else places.index(id(leaf)) for leaf in leaves])


def _is_joined(whole: Any, alone: list[Any]) -> bool:
    """Whether the output for a batch begins with the outputs for its first images, to the bit."""
    if not isinstance(whole, ModelOutput):
        return False
    tensors, parts = _taken_apart(whole)[0], [_taken_apart(output)[0] for output in alone]
    if not all(isinstance(tensor, Tensor) and tensor.ndim and not tensor.requires_grad for tensor in tensors):
        return False
    return all(torch.equal(tensor[: len(alone)], torch.cat(own)) for tensor, *own in zip(tensors, *parts, strict=True))
