"""The length of a training, and the time that it takes."""

from __future__ import annotations

import time

import torch
from transformers import TrainingArguments


def clock() -> float:
    """Seconds on a clock whose differences measure work.

    CPU time of this process, so that other processes do not count; wall time if there is an accelerator, which works
    beside the process.
    """
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def shorten(args: TrainingArguments, share: float, after: float = 0.0) -> None:
    """Limit a training to ``share`` of the run's steps, at least one, where earlier parts took the share ``after``.

    Start and end of a part are rounded, not its length: rounded lengths would not add up.
    """
    if args.max_steps > 0:
        args.max_steps = max(1, round((after + share) * args.max_steps) - round(after * args.max_steps))
    else:
        args.num_train_epochs *= share
