"""Return freed memory to the system."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

MUCH = 768 * 2**20  # bytes of resident memory; to return some takes a twentieth of the time to score a batch


def give_memory_back(above: int = 0) -> None:
    """Return freed memory to the system: glibc keeps what lies between small things that live on, such as scores.

    Args:
        above: bytes of resident memory below which nothing is done.
    """
    with suppress(OSError, AttributeError):  # other systems have another library, and no such file
        if _resident() > above:
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
