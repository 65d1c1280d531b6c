"""Plain supervised fine-tuning: the undefended model that every defence is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from untrigger.defenses.base import Defense, Pair


@final
@dataclass(frozen=True)
class Plain(Defense):
    """No views, no terms: the host's own loss, to the bit."""

    @property
    def paired(self) -> None:
        return None

    def terms(self, pair: Pair) -> dict[str, Tensor]:
        raise NotImplementedError("plain fine-tuning has no second view")
