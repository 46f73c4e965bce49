"""Runs beside each other, from their record files to one table and one page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from secateur.folder import RECORDS
from secateur.report.arms import Comparison, Outcome, compared, outcomes
from secateur.report.compared import render
from secateur.track.local import read
from secateur.train.resume import atomic_write

PAGE = "compare.html"


def compare(paths: Iterable[Path], *, part: str = "test", notes: Sequence[str] = ()) -> Comparison:
    """Return the comparison of the runs in ``paths``: folders of runs, folders of such folders, or record files.

    Accuracies are those on the ``part`` ("test" or "validation") of the data.  Runs that are not finished are
    left out and named.  Raises ``CheckpointError`` for a path without records, ``SecateurError`` when no
    finished run is left.
    """
    finished: list[Outcome] = []
    unfinished: list[str] = []
    for path in dict.fromkeys(file for given in paths for file in records(Path(given))):
        folder = str(path.parent if path.name == RECORDS else path)
        found = outcomes(read(path), folder)
        finished += found
        unfinished += [] if found else [folder]
    return compared(finished, part=part, unfinished=unfinished, notes=notes)


def records(path: Path) -> list[Path]:
    """Return the record files that ``path`` stands for; a folder without any stands for its missing one."""
    if path.is_file():
        return [path.resolve()]
    inside = [] if (path / RECORDS).exists() else sorted(path.glob(f"*/{RECORDS}"))
    return [found.resolve() for found in inside] or [(path / RECORDS).resolve()]


def write(comparison: Comparison, path: Path) -> None:
    """Write the page of ``comparison`` to ``path``, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, render(comparison).encode())
