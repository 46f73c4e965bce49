"""A grid over one recipe: every cell an ordinary run in a process and a folder of its own, then the comparison.

Running the same sweep into the same folder again goes on where it stopped: finished cells are skipped,
interrupted ones are resumed by the run itself, failed ones are tried again.
"""

from __future__ import annotations

import fcntl
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from secateur.compare import PAGE, compare, write
from secateur.folder import RECIPE, RECORDS, complete, write_recipe
from secateur.grid import Cell, cells
from secateur.launch import End, Here, Job, Place, stop
from secateur.report.arms import Comparison
from secateur.session import Screen
from secateur.sharing import training_hash
from secateur.types import RecipeError, SecateurError

LOGS, LOCK = "logs", ".lock"
WAIT = 0.1  # seconds between looks at the runs
TRIES = 3  # times in a row that a run may be lost without a new record before it counts as failed


@dataclass(frozen=True)
class OnRay:
    """Run the cells on the Ray cluster at ``address``, each with so many processors and GPUs."""

    address: str
    cpus: int = 1
    gpus: float = 0.0


@dataclass(frozen=True)
class Result:
    """The cells that went to their end, those that failed with the reason, and the comparison (None: no cell)."""

    done: tuple[Cell, ...]
    failed: tuple[tuple[Cell, str], ...]
    comparison: Comparison | None


def sweep(
    recipe: Path,
    grid: Sequence[str],
    folder: Path,
    *,
    overrides: Sequence[str] = (),
    arms: Sequence[str] = (),
    jobs: int | None = None,
    screen: Screen | None = None,
    ray: OnRay | None = None,
) -> Result:
    """Run ``recipe`` at every point of ``grid`` with each of ``arms``, ``jobs`` at once, and compare what was finished.

    Every cell is checked before the first starts.  Here, the processor's threads are divided among the jobs (one
    unless given; a recipe with ``threads`` keeps its own number); on a cluster, ``jobs`` None means as many as it
    has room for.  A cell that fails leaves the others alone.  Raises ``RecipeError`` for a grid or recipe that is
    wrong, ``SecateurError`` when another sweep works in ``folder`` or the cluster does not answer.
    """
    screen = screen or Screen()
    folder = folder.resolve() if ray else folder
    found = cells(recipe, grid, folder, overrides, arms)
    _check_devices(found, ray)
    with ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context(_alone(folder))
        place: Place = Here(jobs or 1, lock)
        if ray:
            from secateur.cluster import Needs, connected

            place = stack.enter_context(connected(ray.address, Needs(ray.cpus, ray.gpus), jobs))
        for cell in found:
            _prepare(cell)
        failed = _carry_out(found, folder, place, screen)
        done = tuple(cell for cell in found if cell not in [one for one, _ in failed])
        comparison = None
        if done:
            comparison = compare([cell.folder for cell in done], notes=[place.note] if place.note else [])
            write(comparison, folder / PAGE)
    return Result(done, failed, comparison)


def _check_devices(found: Sequence[Cell], ray: OnRay | None) -> None:
    wanting = [cell.name for cell in found if cell.recipe.device.startswith("cuda")]
    if ray and wanting and not ray.gpus:
        raise RecipeError(f"the cell {wanting[0]} asks for a GPU, and Ray hands out none unless told: give --gpus 1.")


@contextmanager
def _alone(folder: Path) -> Iterator[IO[bytes]]:
    """Hold the lock of a sweep.  Its runs inherit it, so that it also holds while a run outlives a killed sweep."""
    with open(folder / LOCK, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SecateurError(
                f"another sweep, or a run that a killed sweep left behind, still works in {folder}; "
                "wait for its end, or stop it, or choose another --out."
            ) from error
        yield file


def _prepare(cell: Cell) -> None:
    """Write the recipe of a cell, so that what runs later is what was checked now."""
    if not (cell.folder / RECIPE).exists():
        cell.folder.mkdir(parents=True, exist_ok=True)
        write_recipe(cell.recipe, cell.folder)


def _carry_out(found: Sequence[Cell], folder: Path, place: Place, screen: Screen) -> tuple[tuple[Cell, str], ...]:
    """Run what is not complete; return what failed, and why."""
    waiting = deque(_firsts_first([cell for cell in found if not complete(cell.folder)]))
    finished, total = len(found) - len(waiting), len(found)
    if finished:
        screen.line(f"{finished} of {total} cells are complete and skipped")
    (folder / LOGS).mkdir(exist_ok=True)
    begun: dict[str, float] = {}
    losses = Losses()
    working: list[Job] = []
    failed: list[tuple[Cell, str]] = []
    try:
        while waiting or working:
            while waiting and len(working) < place.slots():
                cell = waiting.popleft()
                begun.setdefault(cell.name, time.monotonic())
                try:
                    working.append(place.start(cell, folder / LOGS / f"{cell.name}.txt"))
                except OSError as error:  # no process left, or no memory for one: the others go on
                    failed.append((cell, f"could not be started: {error}"))
            for job, end in [(job, end) for job in working if (end := job.ended()) is not None]:
                working.remove(job)
                name = job.cell.name
                if losses.again(job.cell, end):
                    waiting.append(job.cell)
                    screen.line(f"{name}: {end.why}; it goes on from its saved state elsewhere")
                    continue
                finished += 1
                failed += [(job.cell, end.why)] if end.why else []
                seconds = time.monotonic() - begun[name]
                screen.line(f"{finished} of {total}: {name}, {seconds:.0f} s, {_told(end)}")
            screen.progress(f"running {', '.join(one.cell.name for one in working)}", finished, total)
            time.sleep(WAIT)
    finally:
        stop(working)
    return tuple(failed)


def _told(end: End) -> str:
    return f"failed: {end.why}" if end.why else "done"


class Losses:
    """Counts how often each cell was lost in a row without a record more than before."""

    def __init__(self) -> None:
        self.counts: dict[str, tuple[int, int]] = {}  # name -> (losses, bytes of records at the last one)

    def again(self, cell: Cell, end: End) -> bool:
        """Return whether a run that ended so is to be tried again."""
        if not end.lost:
            return False
        records = cell.folder / RECORDS
        size = records.stat().st_size if records.exists() else 0
        count, before = self.counts.get(cell.name, (0, -1))
        count = 1 if size > before else count + 1
        self.counts[cell.name] = (count, size)
        return count < TRIES


def _firsts_first(found: Sequence[Cell]) -> list[Cell]:
    """Return the cells, one of each dense training first: those that share it would only wait for it."""
    first = {training_hash(cell.recipe): cell for cell in reversed(found)}
    leading = [cell for cell in found if first[training_hash(cell.recipe)] is cell]
    return leading + [cell for cell in found if cell not in leading]
