"""Run cells on a Ray cluster: a new local one, or one that is already running."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from untrigger.bench import store
from untrigger.bench.local import LOG, Done, Runner, Work, attempt
from untrigger.bench.store import Cell
from untrigger.errors import InputError

LOCAL = "local"


def on_ray(address: str = LOCAL, jobs: int | None = None) -> Runner:
    """Run cells as Ray tasks with one CPU each, and one GPU each where the cluster has some.

    Args:
        address: ``local`` starts a cluster on this machine for this run. Other values are Ray's own addresses
            (``auto``, ``ray://host:port``). All machines of the cluster must see the results folder under the same
            path and have this package installed.
        jobs: number of CPUs of a ``local`` cluster.

    Raises:
        InputError: Ray is not installed.
    """
    if find_spec("ray") is None:
        raise InputError("--ray: Ray is not installed; pip install 'untrigger[ray]'")
    return partial(_on_cluster, address, jobs)


def _on_cluster(address: str, jobs: int | None, cells: Sequence[Cell], root: Path, work: Work) -> Done:
    import ray
    from ray.exceptions import RayError

    _check_reachable(address)
    cluster: dict[str, Any] = {"address": address}
    if address == LOCAL:
        cluster = {"address": "local", "num_cpus": jobs, "include_dashboard": False}
    try:
        ray.init(**cluster, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise InputError(f"--ray {address}: {str(error).strip().splitlines()[0]}") from error
    try:
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(attempt)
        running = {task.remote(work, cell, root.resolve()): cell for cell in cells}
        while running:
            (finished, *_), _ = ray.wait(list(running))
            cell = running.pop(finished)
            try:
                reason = ray.get(finished)
            except RayError as error:  # the worker process died
                reason = store.record_failure(root, cell, f"{type(error).__name__}; see {LOG} in its folder")
            yield cell, reason
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise InputError if nothing answers at host:port. Ray itself would try for minutes, then end the process."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise InputError(f"--ray {address}: nothing answers there ({error}); name a running cluster") from error
