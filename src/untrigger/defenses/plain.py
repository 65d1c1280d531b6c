"""Plain supervised fine-tuning: the undefended model that every defense is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from untrigger.defenses.base import StepDefense


@final
@dataclass(frozen=True)
class Plain(StepDefense):
    """No views, no terms: the host's own loss, to the bit."""
