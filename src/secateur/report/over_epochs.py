"""Arms over the epochs: accuracy, time, widths; means over seeds from the courses of the runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from secateur.report.arms import DENSE, GATED, PRUNED, RANDOM, SCRATCH, WHOLE, Arm, Comparison, Outcome, over_seeds
from secateur.report.course import Course
from secateur.report.figures import Mark
from secateur.report.metrics import named
from secateur.report.strands import Dot, Scale, Strand, dashes, figure, steps

COLOURS = {  # classes of style.css; the first of a role has its colour in the other figures
    WHOLE: ("grey", "slate"),
    PRUNED: ("blue", "green", "teal", "gold", "pink"),
    GATED: ("magenta", "olive"),
    RANDOM: ("orange", "brown"),
    SCRATCH: ("purple", "violet"),
}
SHOWN = 8  # groups whose widths are drawn; the others are folded away
SHARE = Scale(lambda value: f"{value * 100:.4g} %", 0.0, 1.0)
SECONDS = Scale(lambda value: f"{value:.3g} s", 0.0, zero=True)
UNITS = Scale(lambda value: f"{value:.4g}", 0.0, zero=True)
SCALES = {"fraction": SHARE, "nats": Scale(lambda value: f"{value:.5g}")}

Figures = list[tuple[str, str]]  # title, SVG


@dataclass(frozen=True)
class OverEpochs:
    """What the page shows: a legend of (number, colour class, words), figures, and widths of each group."""

    legend: tuple[tuple[int, str, str], ...]
    figures: Figures
    widths: Figures
    more: Figures
    shared: bool  # some arms have the same widths throughout
    events: bool  # of all arms that cut, at the same places


@dataclass(frozen=True)
class _Runs:
    """One arm with what its runs did: (seed, course) of each, its number in the table and its colour."""

    arm: Arm
    number: int
    courses: tuple[tuple[object, Course], ...]
    css: str = ""

    @property
    def text(self) -> str:
        return f"{self.number}. {self.arm.label}"

    @property
    def events(self) -> tuple[float, ...]:
        return tuple(sorted({event for _, course in self.courses for event in course.events}))


def over_epochs(comparison: Comparison) -> OverEpochs | None:
    """Return the figures of ``comparison``, None where no run was trained for an epoch."""
    known: dict[str, Outcome] = {one.folder: one for one in comparison.outcomes}
    arms = [
        _Runs(
            arm, place, tuple((one.seed, one.course) for one in map(known.__getitem__, arm.runs) if one.course.epochs)
        )
        for place, arm in enumerate(comparison.arms, 1)
        if arm.role != DENSE
    ]
    arms = _coloured([arm for arm in arms if arm.courses])
    if not arms:
        return None
    epochs = max(course.epochs for arm in arms for _, course in arm.courses)
    cutting = {arm.events for arm in arms if arm.events}
    common = next(iter(cutting)) if len(cutting) == 1 else ()
    marks = [Mark(at, f"event {place}" if place == 1 else str(place)) for place, at in enumerate(common, 1)]

    def drawn(title: str, lines: Iterable[Strand], scale: Scale) -> tuple[str, str]:
        strands = [replace(line, events=()) if marks else line for line in lines]
        return title, figure(f"{title} over epochs", strands, marks, epochs, scale)

    metric = named(comparison.accuracy)
    test, scale, word = f"test {metric.measured}", SCALES[metric.unit], metric.over[0]
    figures = [
        drawn(f"Training {word}", _strands(arms, lambda course: course.train), scale),
        drawn(f"Validation {word}, and test at the end", _strands(arms, lambda c: c.validation, test), scale),
        drawn("Time per epoch", _strands(arms, lambda course: course.seconds), SECONDS),
    ]
    widths = {name: _widths(arms, name) for name in _cut(arms)}
    same = any(any(dashes([tuple(one.line) for one in lines])) for lines in widths.values())
    rows = [drawn(f"{name}: {lines[0].line[0][1]:g} units at first", lines, UNITS) for name, lines in widths.items()]
    legend = tuple((arm.number, arm.css, arm.arm.label) for arm in arms)
    return OverEpochs(legend, [row for row in figures if row[1]], rows[:SHOWN], rows[SHOWN:], same, bool(marks))


def _coloured(arms: Sequence[_Runs]) -> list[_Runs]:
    """Return the arms with colours: each role has its own, and dotted lines when they are used up."""
    found: list[_Runs] = []
    for arm in arms:
        names = COLOURS[arm.arm.role]
        lap, place = divmod(sum(one.arm.role == arm.arm.role for one in found), len(names))
        found.append(replace(arm, css=names[place] + (" dotted" if lap else "")))
    return found


def _strands(
    arms: Sequence[_Runs], of: Callable[[Course], Sequence[tuple[float, float]]], end: str | None = None
) -> list[Strand]:
    """Return one strand for each arm; ``end``: the measurement that stands beside its end."""
    found = []
    for arm in arms:
        value = arm.arm.values.get(end) if end else None
        last = (value.mean, value.spread or 0.0) if value else None
        line = _mean([(seed, of(course)) for seed, course in arm.courses])
        found.append(Strand(arm.css, arm.text, line, arm.events, last))
    return found


def _mean(rows: Sequence[tuple[object, Sequence[tuple[float, float]]]]) -> list[Dot]:
    """Return mean and spread over seeds at every x that some run has."""
    at: dict[float, list[tuple[object, float]]] = {}
    for seed, points in rows:
        for x, y in points:
            at.setdefault(x, []).append((seed, y))
    values = [(x, over_seeds(found)) for x, found in sorted(at.items())]
    return [(x, value.mean, value.spread or 0.0) for x, value in values]


def _cut(arms: Sequence[_Runs]) -> list[str]:
    """Return the groups that some run cut, in the order of the model."""
    names = dict.fromkeys(name for arm in arms for _, course in arm.courses for name in course.widths)
    courses = [course for arm in arms for _, course in arm.courses]
    return [name for name in names if any(len(set(course.widths.get(name, ()))) > 1 for course in courses)]


def _widths(arms: Sequence[_Runs], name: str) -> list[Strand]:
    """Return one strand for each arm that has group ``name``: its mean units."""
    found = []
    for arm in arms:
        runs = [(seed, course.widths[name]) for seed, course in arm.courses if name in course.widths]
        columns = itertools.zip_longest(*(values for _, values in runs))
        seeds = [seed for seed, _ in runs]
        means = [
            over_seeds([(seed, value) for seed, value in zip(seeds, column, strict=True) if value is not None]).mean
            for column in columns
        ]
        if means:
            found.append(Strand(arm.css, arm.text, steps(means), arm.events))
    return found
