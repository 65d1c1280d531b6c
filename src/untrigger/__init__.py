"""untrigger: fine-tune vision-language models on data you do not trust."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from untrigger.defenses import CrossView, SharedCause, SharedSurprise
    from untrigger.errors import InputError
    from untrigger.evaluation.evaluate import evaluate
    from untrigger.models.loading import embedded_model_path, load
    from untrigger.poisoning.poison import Attack, poison
    from untrigger.rows.sample import Message, Sample, read, write
    from untrigger.scanning.judge import judge_scores
    from untrigger.scanning.scan import scan
    from untrigger.training.finetune import fine_tune
    from untrigger.training.row_scorer import RowScorer
    from untrigger.training.trainer import defended
    from untrigger.training.tuning import Tuning
    from untrigger.verification.verify import verify

_MODULES = {  # imported on first access: rescoring stored answers must not import torch
    "Attack": "poisoning.poison",
    "CrossView": "defenses",
    "InputError": "errors",
    "Message": "rows.sample",
    "RowScorer": "training.row_scorer",
    "Sample": "rows.sample",
    "SharedCause": "defenses",
    "SharedSurprise": "defenses",
    "Tuning": "training.tuning",
    "defended": "training.trainer",
    "embedded_model_path": "models.loading",
    "evaluate": "evaluation.evaluate",
    "fine_tune": "training.finetune",
    "judge_scores": "scanning.judge",
    "load": "models.loading",
    "poison": "poisoning.poison",
    "read": "rows.sample",
    "scan": "scanning.scan",
    "verify": "verification.verify",
    "write": "rows.sample",
}
__all__ = [
    "Attack",
    "CrossView",
    "InputError",
    "Message",
    "RowScorer",
    "Sample",
    "SharedCause",
    "SharedSurprise",
    "Tuning",
    "__version__",
    "defended",
    "embedded_model_path",
    "evaluate",
    "fine_tune",
    "judge_scores",
    "load",
    "poison",
    "read",
    "scan",
    "verify",
    "write",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'untrigger' has no attribute {name!r}")
    return getattr(import_module(f"untrigger.{_MODULES[name]}"), name)
