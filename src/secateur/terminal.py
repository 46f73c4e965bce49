"""What a run looks like in a terminal, and as plain lines in a pipe."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from secateur.report.view import view
from secateur.session import Screen
from secateur.types import Record

QUIET = 20.0  # seconds between lines of progress in a pipe


@contextlib.contextmanager
def screen() -> Iterator[Screen]:
    """Yield a screen: a progress bar below the lines in a terminal, a line now and then in a pipe."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        yield Screen(_line, _periodic())
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def progress(label: str, done: int, total: int) -> None:
            bar.update(task, description=label, completed=done, total=total)

        yield Screen(lambda text: bar.console.print(text, markup=False), progress)


def _line(text: str) -> None:
    print(text, flush=True)


def _periodic() -> Any:
    last = time.monotonic()

    def progress(label: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > QUIET:
            last = time.monotonic()
            _line(f"{label}: step {done:,} of {total:,}")

    return progress


def summary(records: Sequence[Record]) -> str:
    """Return the tables of a finished run: parameters per layer, and everything before and after."""
    shown = view(records)
    cut = Table("layer", "class", "parameters", "after", "removed", title="What was cut", title_justify="left")
    for row in shown["layers"]:
        cut.add_row(row["name"], row["kind"], f"{row['params']:,}", f"{row['after']:,}", f"{1 - row['share']:.1%}")
    bought = Table("quantity", "dense", shown["after"], "change", title="What it bought", title_justify="left")
    for row in shown["rows"]:
        bought.add_row(row["name"], row["dense"], row["pruned"], row["change"])
    for table in (cut, bought):
        for column in table.columns[2 if table is cut else 1 :]:
            column.justify = "right"
    console = Console(width=max(100, Console().width), file=sys.stdout)
    with console.capture() as text:
        console.print(cut, bought, *shown["warnings"], sep="\n", markup=False)
    return text.get().rstrip()
