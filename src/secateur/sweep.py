"""A grid over one recipe: every cell an ordinary run in a process and a folder of its own, then the comparison.

Running the same sweep into the same folder again goes on where it stopped: finished cells are skipped,
interrupted ones are resumed by the run itself, failed ones are tried again.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from secateur.compare import PAGE, compare, write
from secateur.folder import RECIPE, choose, complete, write_recipe
from secateur.recipe import Recipe, load
from secateur.report.arms import Comparison
from secateur.session import Screen
from secateur.sharing import training_hash
from secateur.types import RecipeError, SecateurError

LOGS, LOCK, SHARED = "logs", ".lock", "dense"
LONGEST = 100  # characters of a folder's name
WAIT = 0.1  # seconds between looks at the processes
PATIENCE = 60.0  # seconds that a run gets to save its state before it is killed
OPEN, CLOSED = "[{(", "]})"


@dataclass(frozen=True)
class Cell:
    """One point of the grid: its name, the recipe with the values of this point, its folder."""

    name: str
    recipe: Recipe
    folder: Path


@dataclass(frozen=True)
class Result:
    """The cells that went to their end, those that failed with the reason, and the comparison (None: no cell)."""

    done: tuple[Cell, ...]
    failed: tuple[tuple[Cell, str], ...]
    comparison: Comparison | None


@dataclass(eq=False)
class Worker:
    """A cell at work: its process, the log that it writes, and when it began."""

    cell: Cell
    process: subprocess.Popen[bytes]
    log: Path
    begin: float = field(default_factory=time.monotonic)


def sweep(
    recipe: Path,
    grid: Sequence[str],
    folder: Path,
    *,
    overrides: Sequence[str] = (),
    jobs: int = 1,
    screen: Screen | None = None,
) -> Result:
    """Run ``recipe`` at every point of ``grid``, ``jobs`` at once, and compare what was finished.

    Every cell is checked before the first starts.  The processor's threads are divided among the jobs (a recipe
    with ``threads`` keeps its own number).  A cell that fails leaves the others alone.  Raises ``RecipeError``
    for a grid or recipe that is wrong, ``SecateurError`` when another sweep works in ``folder``.
    """
    screen = screen or Screen()
    found = cells(recipe, grid, folder, overrides)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder) as lock:
        for cell in found:
            _prepare(cell)
        failed = _carry_out(found, folder, jobs, screen, lock)
        done = tuple(cell for cell in found if complete(cell.folder))
        comparison = None
        if done:
            told = "Latencies were taken while {} runs were at work at once; speed-ups suffer less.".format
            comparison = compare([cell.folder for cell in done], notes=[told(jobs)] if jobs > 1 else [])
            write(comparison, folder / PAGE)
    return Result(done, failed, comparison)


def parse_grid(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return dotted key -> values of ``key=a,b,c`` texts; commas inside brackets and quotes do not separate.

    >>> parse_grid(["seed=0,1", "prune.freeze=[a, b],[]"])
    {'seed': ('0', '1'), 'prune.freeze': ('[a, b]', '[]')}
    """
    grid: dict[str, tuple[str, ...]] = {}
    for text in texts:
        key, equals, raw = (part.strip() for part in text.partition("="))
        values = tuple(part.strip() for part in _split(raw))
        if not key or not equals or not all(values):
            raise RecipeError(f"--grid {text!r} must be key=value,value,... , for example seed=0,1,2.")
        if key in grid or key == "out":
            why = "is given twice" if key in grid else "is made by the sweep, one folder for each cell"
            raise RecipeError(f"--grid {text!r}: {key} {why}.")
        if len(set(values)) < len(values):
            raise RecipeError(f"--grid {text!r}: a value is there twice.")
        grid[key] = values
    if not grid:
        raise RecipeError("a sweep needs at least one --grid key=value,value,... , for example --grid seed=0,1,2.")
    return grid


def _split(text: str) -> list[str]:
    """Return the parts of ``text`` between the commas that are in no brackets and no quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in OPEN) - (letter in CLOSED)
        if letter == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def cells(recipe: Path, grid: Sequence[str], folder: Path, overrides: Sequence[str] = ()) -> tuple[Cell, ...]:
    """Return every cell, checked: a recipe that loads, a folder that no other recipe has.

    Raises ``RecipeError`` that names the cell.
    """
    table = parse_grid(grid)
    found: list[Cell] = []
    hashes: dict[str, str] = {}
    for values in itertools.product(*table.values()):
        words = [f"{key}={value}" for key, value in zip(table, values, strict=True)]
        name = folder_name(words)
        chosen = load(recipe, [*overrides, *words])
        if chosen.hash in hashes:
            raise RecipeError(f"the cells {hashes[chosen.hash]} and {name} are the same recipe; leave one out.")
        hashes[chosen.hash] = name
        cell = Cell(name, chosen.model_copy(update={"out": str(folder / name)}), folder / name)
        choose(cell.recipe, resume=(cell.folder / RECIPE).exists())
        found.append(cell)
    return tuple(found)


def folder_name(words: Sequence[str]) -> str:
    """Return a name for a cell that can be a folder: the last two parts of each key and the value.

    >>> folder_name(["prune.criterion.name=taylor", "seed=0"])
    'criterion.name=taylor,seed=0'
    """
    short = ",".join(".".join(word.partition("=")[0].split(".")[-2:]) + "=" + word.partition("=")[2] for word in words)
    safe = re.sub(r"[^A-Za-z0-9._=,+-]+", "_", short)
    if safe == short and len(safe) <= LONGEST:
        return safe
    digest = hashlib.sha256(",".join(words).encode()).hexdigest()[:8]  # keeps apart what looks alike now
    return f"{safe[:LONGEST]}-{digest}"


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


def _carry_out(
    found: Sequence[Cell], folder: Path, jobs: int, screen: Screen, lock: IO[bytes]
) -> tuple[tuple[Cell, str], ...]:
    """Run what is not complete, ``jobs`` at once; return what failed, and why."""
    waiting = _firsts_first([cell for cell in found if not complete(cell.folder)])
    finished, total = len(found) - len(waiting), len(found)
    if finished:
        screen.line(f"{finished} of {total} cells are complete and skipped")
    (folder / LOGS).mkdir(exist_ok=True)
    working: list[Worker] = []
    failed: list[tuple[Cell, str]] = []
    try:
        while waiting or working:
            while waiting and len(working) < jobs:
                cell = waiting.pop(0)
                try:
                    working.append(_start(cell, folder / LOGS / f"{cell.name}.txt", threads(jobs), lock))
                except OSError as error:  # no process left, or no memory for one: the others go on
                    failed.append((cell, f"could not be started: {error}"))
            for worker in [one for one in working if one.process.poll() is not None]:
                working.remove(worker)
                finished += 1
                why = _why(worker)
                failed += [(worker.cell, why)] if why else []
                seconds = time.monotonic() - worker.begin
                end = f"failed: {why}" if why else "done"
                screen.line(f"{finished} of {total}: {worker.cell.name}, {seconds:.0f} s, {end}")
            screen.progress(f"running {', '.join(one.cell.name for one in working)}", finished, total)
            time.sleep(WAIT)
    finally:
        _stop(working)
    return tuple(failed)


def _firsts_first(found: Sequence[Cell]) -> list[Cell]:
    """Return the cells, one of each dense training first: those that share it would only wait for it."""
    first = {training_hash(cell.recipe): cell for cell in reversed(found)}
    leading = [cell for cell in found if first[training_hash(cell.recipe)] is cell]
    return leading + [cell for cell in found if cell not in leading]


def threads(jobs: int) -> int:
    """Return how many threads each of ``jobs`` runs gets: the processors of this process, divided."""
    return max(1, len(os.sched_getaffinity(0)) // jobs)


def command(cell: Cell) -> list[str]:
    """Return the command of a cell: the ordinary run of the recipe in its folder, continued where it stopped."""
    where = ["--out", str(cell.folder), "--shared", str(cell.folder.parent / SHARED)]
    return [sys.executable, "-m", "secateur", "run", str(cell.folder / RECIPE), *where, "--resume"]


def _start(cell: Cell, log: Path, threads: int, lock: IO[bytes]) -> Worker:
    """Start a run in a session of its own: Ctrl-C reaches the sweep alone, which then stops its runs once."""
    count = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command(cell),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **count},
            start_new_session=True,
            pass_fds=[lock.fileno()],
        )
    return Worker(cell, process, log)


def _why(worker: Worker) -> str:
    """Return why a run that ended failed, from its code and its log; empty when it did not."""
    code = worker.process.returncode
    if code == 0 and complete(worker.cell.folder):
        return ""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}; see {worker.log}"
    lines = worker.log.read_text(errors="replace").strip().splitlines()
    told = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    text = "\n".join(lines[told[-1] :]).removeprefix("error: ") if told else (lines or ["it said nothing"])[-1]
    return f"{text} (exit code {code}; see {worker.log})"


def _stop(working: Sequence[Worker]) -> None:
    """Ask the runs to save their state and end; kill those that do not."""
    for worker in working:
        worker.process.terminate()
    for worker in working:
        try:
            worker.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()
