"""A comparison for the reader: one table for the terminal, one self-contained page."""

from __future__ import annotations

import math
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from secateur.report import template
from secateur.report.arms import DENSE, GATED, PRUNED, RANDOM, SCRATCH, WHOLE, Arm, Comparison, Value
from secateur.report.metrics import TASKS
from secateur.report.over_epochs import over_epochs
from secateur.report.scatter import Point, scatter
from secateur.report.view import NAMES, number

CSS = {DENSE: "dense", WHOLE: "whole", PRUNED: "pruned", GATED: "gated", RANDOM: "random", SCRATCH: "scratch"}
FRONT = "*"
JUDGED = tuple(metric.measured for metric in TASKS.values())


def bare(value: Value | None, unit: str) -> str:
    """Return a mean and the spread over seeds, without the unit where ``heading`` says it.

    >>> bare(Value(0.9184, 0.0021, 3), "fraction"), bare(Value(0.0312, 0.001, 2), "ms")
    ('91.84 ± 0.21 %', '0.0312 ± 0.0010')
    """
    if value is None:
        return ""
    digits, suffix, scale = 0, "", 1.0
    if unit == "fraction":
        digits, suffix, scale = 2, " %", 100.0
    elif unit == "nats":
        digits = 2
    elif unit not in ("params", "macs", "bytes") and value.mean:
        digits = max(0, 2 - math.floor(math.log10(abs(value.mean))))
    more = "" if value.spread is None else f" ± {value.spread * scale:,.{digits}f}"
    return f"{value.mean * scale:,.{digits}f}{more}{suffix}"


def heading(quantity: str, unit: str) -> str:
    """Return the words for a quantity, with its unit where the numbers do not carry it."""
    words = NAMES.get(quantity, quantity)
    return f"{words} [{unit}]" if unit in ("ms", "bytes", "nats") else words


def points(value: Value | None, unit: str = "fraction") -> str:
    """Return a difference of accuracies in points, of ELBOs in nats.

    >>> points(Value(0.0123, 0.004, 3)), points(None)
    ('+1.23 ± 0.40', '')
    """
    if value is None:
        return ""
    scale = 100 if unit == "fraction" else 1
    more = "" if value.spread is None else f" ± {value.spread * scale:.2f}"
    return f"{value.mean * scale:+.2f}{more}"


def table(comparison: Comparison) -> str:
    """Return the table and the notes as text; ``*`` marks the Pareto front of a column."""
    shown = Table(title="Runs beside each other: mean ± standard deviation over seeds", title_justify="left")
    for head in ("", "run", "is"):
        shown.add_column(head, overflow="fold")
    gains, unit = controls(comparison), comparison.units[comparison.accuracy]
    heads = ["n", heading(comparison.accuracy, unit), *(f"over {kind}" for kind in gains)]
    heads += [heading(cost, comparison.units[cost]) for cost in comparison.costs]
    for head in heads:
        shown.add_column(head, justify="right")
    for place, arm in enumerate(comparison.arms):
        costs = [_marked(comparison, place, arm, cost) for cost in comparison.costs]
        quality = bare(arm.values.get(comparison.accuracy), unit)
        cells = [str(_n(arm, comparison)), quality, *(points(arm.gains.get(kind), unit) for kind in gains), *costs]
        shown.add_row(str(place + 1), arm.label, arm.role, *cells)
    gain = "points" if unit == "fraction" else unit
    foot = f"{FRONT} Pareto front: no other row is at least as good for at most this cost. Gains in {gain}."
    console = Console(width=max(150, Console().width), file=sys.stdout)
    with console.capture() as text:
        console.print(shown, foot, *comparison.notes, sep="\n", markup=False, highlight=False)
    return "\n".join(line.rstrip() for line in text.get().rstrip().splitlines())


def controls(comparison: Comparison) -> list[str]:
    """Return the roles that some arm is measured against."""
    return [kind for kind in (RANDOM, SCRATCH) if any(kind in arm.gains for arm in comparison.arms)]


def _marked(comparison: Comparison, place: int, arm: Arm, cost: str) -> str:
    mark = f" {FRONT}" if place in comparison.fronts[cost] else ""
    return bare(arm.values.get(cost), comparison.units[cost]) + mark


def _n(arm: Arm, comparison: Comparison) -> int:
    value = arm.values.get(comparison.accuracy)
    return value.n if value else 0


def render(comparison: Comparison) -> str:
    """Return the page: figures of accuracy against every cost, the table, the runs behind it."""
    accuracy, units = comparison.accuracy, comparison.units
    words = NAMES.get(accuracy, accuracy)
    known = [name for arm in comparison.arms for name in arm.values]
    columns = [
        name for name in dict.fromkeys(known) if name.endswith(JUDGED) or name.split()[0] in ("speed-up", "file")
    ]
    columns = [accuracy, *(name for name in columns if name != accuracy)]
    columns[1 + sum(name.endswith(JUDGED) for name in columns[1:]) : 0] = comparison.costs
    rows = [
        {
            "number": place + 1,
            "label": arm.label,
            "role": arm.role,
            "css": CSS[arm.role],
            "n": _n(arm, comparison),
            "cells": [
                (bare(arm.values.get(name), units.get(name, "")), place in comparison.fronts.get(name, ()))
                for name in columns
            ],
            "gains": [points(arm.gains.get(kind), units[accuracy]) for kind in controls(comparison)],
            "runs": arm.runs,
        }
        for place, arm in enumerate(comparison.arms)
    ]
    figures = [
        (f"{words} against {heading(cost, units[cost])}", _figure(comparison, cost)) for cost in comparison.costs
    ]
    return template("compare.html").render(
        rows=rows,
        columns=[heading(name, units.get(name, "")) for name in columns],
        figures=[row for row in figures if row[1]],
        controls=controls(comparison),
        notes=comparison.notes,
        accuracy=words,
        gain="points" if units[accuracy] == "fraction" else units[accuracy],
        runs=_runs(comparison),
        over=over_epochs(comparison),
    )


def _runs(comparison: Comparison) -> list[dict[str, Any]]:
    """Return one row for each run."""
    return [
        {
            "folder": one.folder,
            "seed": one.recipe.get("seed"),
            "hash": one.hash,
            "where": one.where,
            "accuracy": number(one.final[comparison.accuracy], comparison.units[comparison.accuracy])
            if comparison.accuracy in one.final
            else "",
        }
        for one in comparison.outcomes
    ]


def _figure(comparison: Comparison, cost: str) -> str:
    """Return accuracy against ``cost``, error bars of one standard deviation over seeds."""
    accuracy, unit = comparison.accuracy, comparison.units[cost]
    measured = comparison.units[accuracy]
    words = NAMES.get(accuracy, accuracy)
    found: dict[int, Point] = {}
    for place, arm in enumerate(comparison.arms):
        x, y = arm.values.get(cost), arm.values.get(accuracy)
        if x is not None and y is not None:
            text = f"{place + 1}. {arm.label} ({arm.role}): {bare(y, measured)}, {bare(x, unit)}, n = {y.n}"
            error = (x.spread or 0.0, y.spread or 0.0)
            found[place] = Point(x.mean, y.mean, *error, place + 1, CSS[arm.role], text)
    present = {arm.role for arm in comparison.arms}
    names = {css: role for role, css in CSS.items() if role in present} | {"front": "Pareto front"}
    front = [(found[place].x, found[place].y) for place in comparison.fronts[cost]]
    axis = heading(cost, unit)
    return scatter(f"{words} against {axis}", axis, list(found.values()), front, names, measured == "fraction")
