"""Plain supervised fine-tuning: the undefended baseline of every defense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from untrigger.defenses.base import StepDefense


@final
@dataclass(frozen=True)
class Plain(StepDefense):
    """Train with the host's own loss, to the bit: no views and no further terms."""
