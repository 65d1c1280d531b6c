"""Run `untrigger` as two processes of one run: forks of this process, or by `torchrun`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState

from untrigger.cli.main import app

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def untrigger_here(*words: object) -> int:
    """``untrigger WORDS...`` in this process, which has loaded all libraries; the exit code."""
    return app([*map(str, words)], standalone_mode=False) or 0


def forked(log: Path, *words: object, **variables: str) -> int:
    """Run the command in a fork of this process; the process id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: other threads are not in the fork
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ.update(environment() | variables)
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        AcceleratorState._reset_state(reset_partial_state=True)  # what this process knows of its group
        code = untrigger_here(*words)
    except BaseException:
        log.write_text(traceback.format_exc())
    finally:
        os._exit(code)


def in_two_forks(folder: Path, *words: Any) -> list[int]:
    """Two processes with the environment that torchrun gives them; their exit codes. Their logs lie in ``folder``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    logs = [folder / f"log{rank}" for rank in range(2)]
    forks = [forked(log, *words, **group, RANK=str(i), LOCAL_RANK=str(i)) for i, log in enumerate(logs)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in forks]
    assert 1 not in codes, [log.read_text()[-3000:] for log in logs]
    return codes


def under_torchrun(folder: Path, *words: Any) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, *TORCHRUN, "-m", "untrigger", *map(str, words)]
    return subprocess.run(launch, env=environment(), capture_output=True, text=True, timeout=400)
