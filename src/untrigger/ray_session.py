"""A connection to a Ray cluster: a new local one, or one that is already running."""

from __future__ import annotations

import logging
import socket
from collections.abc import Generator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from untrigger.errors import InputError

LOCAL = "local"


def require_ray() -> None:
    """Raise an InputError that names the extra if Ray is not installed."""
    if find_spec("ray") is None:
        raise InputError("--ray: Ray is not installed; pip install 'untrigger[ray]'")


@contextmanager
def connected(address: str, cpus: int | None = None) -> Generator[int]:
    """Connect to a cluster within the block; yields the GPUs that a task should take, 1 where there are any, or 0.

    Args:
        address: ``local`` starts a cluster on this machine. Other values are Ray's own addresses (``auto``,
            ``host:port``, ``ray://host:port``).
        cpus: number of CPUs of a ``local`` cluster.

    Raises:
        InputError: Ray is not installed, or nothing answers at the address.
    """
    require_ray()
    import ray

    _check_reachable(address)
    cluster: dict[str, Any] = {"address": address}
    if address == LOCAL:
        cluster = {"address": "local", "num_cpus": cpus, "include_dashboard": False}
    try:
        ray.init(**cluster, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray raises a bare Exception, too, if a node does not start in time
        raise InputError(f"--ray {address}: {str(error).strip().splitlines()[0]}") from error
    try:
        yield 1 if ray.cluster_resources().get("GPU") else 0
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
