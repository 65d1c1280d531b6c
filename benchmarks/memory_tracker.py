"""Count the memory that PyTorch operations use."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class MemoryTracker(TorchDispatchMode):
    """Count the bytes of live tensors, their ``peak``, and the bytes ``moved`` by operations."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = self.moved = 0
        self.known: set[int] = set()

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() and id(storage) not in self.known:
            self.known.add(id(storage))
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._freed, id(storage), storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple | list) else (result,)
        tensors = [value for value in (*args, *results) if isinstance(value, Tensor)]
        if not func.is_view:
            self.moved += sum(tensor.nbytes for tensor in tensors)
        for tensor in tensors:
            self.note(tensor)
        return result
