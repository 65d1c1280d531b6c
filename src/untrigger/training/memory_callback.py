"""A trainer callback that returns freed memory to the system."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from untrigger.memory import MUCH, give_memory_back

_STEPS = 8  # after which memory is returned: more often takes time, less often memory


class MemoryGivenBack(TrainerCallback):
    """Return freed memory after every eighth step of a process that holds much."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % _STEPS == 0:
            give_memory_back(above=MUCH)
