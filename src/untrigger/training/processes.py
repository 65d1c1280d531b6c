"""Rows that the processes of one run share: each works on some of them, and gets the results of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar, final

import torch.distributed as dist
from transformers import TrainingArguments

T = TypeVar("T")


@final
@dataclass(frozen=True)
class Share:
    """The part of a process in work on ``count`` rows.

    Processes take turns at blocks of ``block`` rows. If a block is a batch, a row lies in the same batch as in one
    process, and its result has the same bits.
    """

    count: int
    block: int
    processes: int
    index: int

    @property
    def rows(self) -> list[int]:
        """This process's rows by number, from 0.

        All processes have as many blocks, one perhaps twice: all must gather sharded weights in every batch.
        """
        blocks = -(-self.count // self.block)
        turns = -(-blocks // self.processes)
        own = ((turn * self.processes + self.index) % blocks * self.block for turn in range(turns))
        return [row for start in own for row in range(start, min(start + self.block, self.count))]

    def gathered(self, own: Sequence[T]) -> list[T]:
        """The results of all rows in order, from each process's ``own``; every process must call it."""
        if self.processes == 1:
            return list(own)
        shares: list[Sequence[T]] = [[] for _ in range(self.processes)]
        dist.all_gather_object(shares, own)
        whole: list[T] = []
        for start in range(0, self.count, self.block):
            turn, index = divmod(start // self.block, self.processes)
            whole += shares[index][turn * self.block : (turn + 1) * self.block]
        return whole[: self.count]


def share_of(args: TrainingArguments, count: int, block: int) -> Share:
    """This process's part in work on ``count`` rows, given the host's arguments."""
    return Share(count, block, args.world_size, args.process_index)
