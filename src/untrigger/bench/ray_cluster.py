"""Run cells on a Ray cluster: a new local one, or one that is already running."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from untrigger.bench import store
from untrigger.bench.local import LOG, Done, Runner, Work, attempt
from untrigger.bench.store import Cell
from untrigger.ray_session import LOCAL, connected, require_ray


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
    require_ray()
    return partial(_on_cluster, address, jobs)


def _on_cluster(address: str, jobs: int | None, cells: Sequence[Cell], root: Path, work: Work) -> Done:
    import ray
    from ray.exceptions import RayError

    with connected(address, jobs) as gpus:
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
