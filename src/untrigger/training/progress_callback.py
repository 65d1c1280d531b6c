"""A trainer callback that shows progress with an ETA."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from untrigger.progress import Meter


class TrainingProgress(TrainerCallback):
    """Show the optimizer steps of a host trainer on a meter."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._meter: Meter | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._meter = Meter(self.title, state.max_steps)
            self._meter.start_at(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._meter:
            self._meter.advance()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the meter if it runs; call it yourself after an interruption, which the host does not report."""
        if self._meter:
            self._meter.stop()
            self._meter = None
