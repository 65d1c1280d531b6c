"""untrigger: fine-tune vision-language models on data you do not trust."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from untrigger.defenses import CrossView, Doubt
    from untrigger.errors import InputError
    from untrigger.models import embedded_model_path, load
    from untrigger.poisoning import Attack, poison
    from untrigger.sample import Message, Sample, read, write
    from untrigger.trainer import defended

_HOME = {  # imported when asked for: rescoring stored answers must not import torch
    "Attack": "poisoning",
    "CrossView": "defenses",
    "Doubt": "defenses",
    "InputError": "errors",
    "Message": "sample",
    "Sample": "sample",
    "defended": "trainer",
    "embedded_model_path": "models",
    "load": "models",
    "poison": "poisoning",
    "read": "sample",
    "write": "sample",
}
__all__ = [
    "Attack",
    "CrossView",
    "Doubt",
    "InputError",
    "Message",
    "Sample",
    "__version__",
    "defended",
    "embedded_model_path",
    "load",
    "poison",
    "read",
    "write",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'untrigger' has no attribute {name!r}")
    return getattr(import_module(f"untrigger.{_HOME[name]}"), name)
