"""Cells of a sweep on a Ray cluster: one task each, which starts the same run that this machine would start.

The folder of the sweep and the working directory must be on a file system that all nodes share.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.attend import Order, Outcome, attend
from secateur.folder import RECORDS
from secateur.grid import Cell
from secateur.launch import PATIENCE, End, command, counted, why
from secateur.types import SecateurError

ANSWER = 5.0  # seconds for the head node to answer; Ray itself would ask for ten minutes
ENVIRONMENT = {  # `uv run` would be repeated on every node; nothing is reported to anyone
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
HANDED_ON = ("MLFLOW_TRACKING_URI",)  # from the environment here to that of the runs


@dataclass(frozen=True)
class Needs:
    """What one cell takes: processors (and threads), and GPUs or a share of one."""

    cpus: int = 1
    gpus: float = 0.0


@dataclass(eq=False)
class Task:
    """A cell at work as a task of Ray."""

    cell: Cell
    ray: Any
    reference: Any
    log: Path

    def ended(self) -> End | None:
        """Return how it ended, None while it works or waits for a node."""
        done, _ = self.ray.wait([self.reference], timeout=0)
        if not done:
            return None
        errors = self.ray.exceptions
        try:
            return self._judged(self.ray.get(self.reference))
        except (errors.RayTaskError, errors.TaskCancelledError, errors.RuntimeEnvSetupError) as error:
            return End(f"its task failed: {_last_line(error)}")
        except errors.RayError as error:  # the worker or its node is gone
            return End(f"its worker was lost ({type(error).__name__})", lost=True)

    def _judged(self, outcome: Outcome) -> End:
        if outcome.code is None:
            return End(outcome.text, outcome.lost)
        return End(why(outcome.code, outcome.complete, self.log), lost=outcome.code < 0)

    def ask(self) -> None:
        """Ask it to save its state and end."""
        self.ray.cancel(self.reference)

    def stop(self) -> None:
        """Wait until it did; the end of the connection kills it when it does not."""
        self.ray.wait([self.reference], timeout=PATIENCE)


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


@dataclass(eq=False)
class Cluster:
    """A Ray cluster: as many cells at once as its nodes have room for, at most ``jobs`` (None: no other limit)."""

    ray: Any
    needs: Needs
    jobs: int | None

    @property
    def note(self) -> str:
        """What the comparison says about the latencies."""
        return "Latencies were taken on the nodes of a cluster, beside other runs; speed-ups suffer less."

    def slots(self) -> int:
        """Return how many cells have room now; one where there is none yet, which then waits for a node."""
        there = self.ray.cluster_resources()
        rooms = [int(there.get("CPU", 0.0) // self.needs.cpus)]
        if self.needs.gpus > 0:
            rooms.append(int(there.get("GPU", 0.0) // self.needs.gpus))
        return max(1, min([*rooms, *([self.jobs] if self.jobs else [])]))

    def start(self, cell: Cell, log: Path) -> Task:
        """Hand a cell to the cluster.  A lost one is tried again by the sweep, which says so, not by Ray."""
        handed = {name: os.environ[name] for name in HANDED_ON if name in os.environ}
        order = Order(
            words=command(cell)[1:],
            cwd=os.getcwd(),
            env={**counted(self.needs.cpus), **handed},
            records=str(cell.folder / RECORDS),
            log=str(log),
            lock=str(log.with_suffix(".lock")),
            patience=PATIENCE,
        )
        wanted = self.ray.remote(max_retries=0, num_cpus=self.needs.cpus, num_gpus=self.needs.gpus)(attend)
        return Task(cell, self.ray, wanted.remote(order), log)


@contextmanager
def connected(address: str, needs: Needs, jobs: int | None) -> Iterator[Cluster]:
    """Connect to the cluster at ``address``: HOST:PORT of its head, or auto on one of its machines.

    Raises ``SecateurError`` when Ray is missing or no cluster answers.
    """
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    try:
        import ray
    except ImportError as error:
        raise SecateurError(
            f"--ray needs Ray, which cannot be imported ({error}); install the extra `cluster`: "
            "pip install 'secateur[cluster]'."
        ) from error
    _check_answers(address)
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise SecateurError(f"no Ray cluster at {address!r} takes this sweep: {str(error).strip()}") from error
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray would end this process at once
        yield Cluster(ray, needs, jobs)
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raise ``SecateurError`` unless something listens at ``address``."""
    rule = "--ray takes HOST:PORT of the head node (port 6379 unless changed), or auto on a machine of the cluster"
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if "://" in address or not colon or not port.isdecimal():
        raise SecateurError(f"--ray {address!r}: {rule}.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER).close()
    except (OSError, OverflowError) as error:
        raise SecateurError(f"--ray {address!r}: nothing answers there ({error}); {rule}.") from error
