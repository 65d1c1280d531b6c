"""untrigger: fine-tune vision-language models on data you do not trust."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from untrigger.defenses import CrossView, Doubt
    from untrigger.errors import InputError
    from untrigger.evaluation import evaluate
    from untrigger.finetune import fine_tune
    from untrigger.models import embedded_model_path, load
    from untrigger.poisoning import Attack, poison
    from untrigger.sample import Message, Sample, read, write
    from untrigger.scanning.run import scan
    from untrigger.stages import Tuning
    from untrigger.trainer import defended
    from untrigger.verification import verify

_HOME = {  # imported when asked for: rescoring stored answers must not import torch
    "Attack": "poisoning",
    "CrossView": "defenses",
    "Doubt": "defenses",
    "InputError": "errors",
    "Message": "sample",
    "Sample": "sample",
    "Tuning": "stages",
    "defended": "trainer",
    "embedded_model_path": "models",
    "evaluate": "evaluation",
    "fine_tune": "finetune",
    "load": "models",
    "poison": "poisoning",
    "read": "sample",
    "scan": "scanning.run",
    "verify": "verification",
    "write": "sample",
}
__all__ = [
    "Attack",
    "CrossView",
    "Doubt",
    "InputError",
    "Message",
    "Sample",
    "Tuning",
    "__version__",
    "defended",
    "embedded_model_path",
    "evaluate",
    "fine_tune",
    "load",
    "poison",
    "read",
    "scan",
    "verify",
    "write",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'untrigger' has no attribute {name!r}")
    return getattr(import_module(f"untrigger.{_HOME[name]}"), name)
