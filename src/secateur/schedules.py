"""Schedules: how the kept fraction falls from 1 to its final value, one value per cut.

A schedule takes the final kept fraction in (0, 1], the number of cuts, the number of units there are and the number
that goes in one event, and returns one decreasing fraction per cut, the last of which is the final one exactly.
"""

from __future__ import annotations

from collections.abc import Callable

Schedule = Callable[[float, int, int, int], tuple[float, ...]]


def once(keep: float, steps: int = 1, total: int = 0, units: int = 1) -> tuple[float, ...]:
    """Return one cut, whatever ``steps`` says.

    >>> once(0.5, 4)
    (0.5,)
    """
    return (keep,)


def every(keep: float, steps: int, total: int, units: int = 1) -> tuple[float, ...]:
    """Return as many cuts of ``units`` units as lead from ``total`` units to the budget, whatever ``steps`` says.

    >>> every(0.5, 1, total=8, units=2), every(0.5, 1, total=8, units=3)
    ((0.75, 0.5), (0.625, 0.5))
    """
    gone = total - round(keep * total)
    return (*(1 - k * units / total for k in range(1, -(-gone // units))), keep)


def iterative(keep: float, steps: int, total: int = 0, units: int = 1) -> tuple[float, ...]:
    """Return cuts of equal size: 1 - (1 - keep) k / steps.

    >>> iterative(0.5, 2)
    (0.75, 0.5)
    """
    return (*(1 - (1 - keep) * k / steps for k in range(1, steps)), keep)


def cubic(keep: float, steps: int, total: int = 0, units: int = 1) -> tuple[float, ...]:
    """Return cuts that are large first: keep + (1 - keep) (1 - k / steps)^3.

    Source: Zhu and Gupta 2017, arXiv 1710.01878, equation 1.

    >>> cubic(0.5, 2)
    (0.5625, 0.5)
    """
    return (*(keep + (1 - keep) * (1 - k / steps) ** 3 for k in range(1, steps)), keep)


def during(keep: float, steps: int, total: int = 0, units: int = 1) -> tuple[float, ...]:
    """Return ``steps`` cuts (none is possible) that take the same fraction of what is there: keep ** (k / steps).

    Source: train-time pruning by neural importance (reference system S1), which keeps 0.9 of each layer at an event.

    >>> during(0.25, 2), during(1.0, 0)
    ((0.5, 0.25), ())
    """
    return tuple(keep if k == steps else keep ** (k / steps) for k in range(1, steps + 1))


SCHEDULES: dict[str, Schedule] = {f.__name__: f for f in (cubic, during, every, iterative, once)}
