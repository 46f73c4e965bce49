"""Start a cell of a sweep: the ordinary run in a process of its own, on this machine, and why one failed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from secateur.folder import RECIPE, complete
from secateur.grid import Cell

SHARED = "dense"
PATIENCE = 60.0  # seconds that a run gets to save its state before it is killed


@dataclass(frozen=True)
class End:
    """How a run ended: ``why`` it failed (empty: it did not), and whether it was ``lost`` with the place it was at."""

    why: str = ""
    lost: bool = False


class Job(Protocol):
    """A run at work."""

    @property
    def cell(self) -> Cell:
        """What runs."""

    def ended(self) -> End | None:
        """Return how it ended, None while it works."""

    def ask(self) -> None:
        """Ask it to save its state and end."""

    def stop(self) -> None:
        """Wait until it did; kill it when it does not."""


class Place(Protocol):
    """Where runs work."""

    @property
    def note(self) -> str:
        """What the comparison says about the latencies; empty: nothing."""

    def slots(self) -> int:
        """Return how many runs may work at once, now."""

    def start(self, cell: Cell, log: Path) -> Job:
        """Start a cell that writes what it says to ``log``.  Raises ``OSError`` where that cannot be."""


@dataclass(eq=False)
class Worker:
    """A cell at work in a process of this machine, and the log that it writes."""

    cell: Cell
    process: subprocess.Popen[bytes]
    log: Path

    def ended(self) -> End | None:
        """Return how it ended, None while it works."""
        code = self.process.poll()
        return None if code is None else End(why(code, complete(self.cell.folder), self.log))

    def ask(self) -> None:
        """Ask it to save its state and end."""
        self.process.terminate()

    def stop(self) -> None:
        """Wait until it did; kill it when it does not."""
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass(eq=False)
class Here:
    """This machine: ``jobs`` runs at once, which share its threads and hold ``lock``, the sweep's."""

    jobs: int
    lock: IO[bytes]

    @property
    def note(self) -> str:
        """What the comparison says about the latencies."""
        told = f"Latencies were taken while {self.jobs} runs were at work at once; speed-ups suffer less."
        return told if self.jobs > 1 else ""

    def slots(self) -> int:
        """Return how many runs may work at once."""
        return self.jobs

    def start(self, cell: Cell, log: Path) -> Worker:
        """Start a run in a session of its own: Ctrl-C reaches the sweep alone, which then stops its runs once."""
        with open(log, "wb") as file:
            process = subprocess.Popen(
                command(cell),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **counted(threads(self.jobs))},
                start_new_session=True,
                pass_fds=[self.lock.fileno()],
            )
        return Worker(cell, process, log)


def threads(jobs: int) -> int:
    """Return how many threads each of ``jobs`` runs gets: the processors of this process, divided."""
    return max(1, len(os.sched_getaffinity(0)) // jobs)


def counted(threads: int) -> dict[str, str]:
    """Return the environment that gives a run so many threads."""
    return {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}


def command(cell: Cell) -> list[str]:
    """Return the command of a cell: the ordinary run of the recipe in its folder, continued where it stopped."""
    where = ["--out", str(cell.folder), "--shared", str(cell.folder.parent / SHARED), "--source", str(cell.source)]
    return [sys.executable, "-m", "secateur", "run", str(cell.folder / RECIPE), *where, "--resume"]


def why(code: int, complete: bool, log: Path) -> str:
    """Return why a run that ended with exit code ``code`` failed, by its log; empty when it did not."""
    if code == 0 and complete:
        return ""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}; see {log}"
    lines = log.read_text(errors="replace").strip().splitlines()
    told = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    text = "\n".join(lines[told[-1] :]).removeprefix("error: ") if told else (lines or ["it said nothing"])[-1]
    return f"{text} (exit code {code}; see {log})"


def stop(working: Sequence[Job]) -> None:
    """Ask the runs to save their state and end; kill those that do not."""
    for job in working:
        job.ask()
    for job in working:
        job.stop()
