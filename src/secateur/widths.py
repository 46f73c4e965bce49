"""Widths: which ones a group may have, and the combination whose cost is nearest to a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np

from secateur.allocation import Path
from secateur.types import Budget, Graph, PlanError

NEAR = 0.02  # a budget counts as met when it is missed by no more than this fraction of the whole
CLOSE_ENOUGH = 0.001  # rounded widths are adjusted until the budget is this near
AUTO_STEP, AUTO_WIDTH = 8, 32  # round_to="auto": multiples of 8 in groups at least 32 wide

Cost = Callable[[np.ndarray], np.ndarray]  # widths (..., G) -> fraction of the whole (...)


def steps(graph: Graph, round_to: str | int | None) -> list[int]:
    """Return per group the number of units that make up a multiple of ``round_to`` positions.

    Raises ``PlanError`` for anything but 'auto', an int of at least 1, or None.
    """
    auto = round_to == "auto"
    counted = isinstance(round_to, int) and not isinstance(round_to, bool) and round_to > 0
    if not (auto or round_to is None or counted):
        raise PlanError(f"allocate(round_to=...) is 'auto', an int of at least 1, or None; got {round_to!r}.")
    multiple = AUTO_STEP if auto else int(round_to or 1)
    wide = AUTO_WIDTH if auto else multiple
    found = []
    for group in graph.groups:
        k = min((member.index.shape[1] for member in group.members if member.role == "out"), default=1)
        rounded = k > 0 and group.units * k >= wide
        found.append(multiple // gcd(multiple, k) if rounded else 1)
    return found


def allowed(units: int, step: int, least: int) -> np.ndarray:
    """Return the widths that a group may have: multiples of ``step`` from ``least`` on, and its own width."""
    first = -(-min(least, units) // step) * step
    multiples = np.arange(first, units + 1, step)
    return multiples if units % step == 0 else np.append(multiples, units)


def nearest(choices: np.ndarray, width: float) -> int:
    """Return the choice nearest to ``width``; of two equally near ones the smaller."""
    return int(choices[np.argmin(np.abs(choices - width))])


@dataclass(frozen=True, eq=False)
class Search:
    """Finds widths of the groups numbered ``slots``; the others keep their width in ``start``."""

    cost: Cost
    start: np.ndarray
    slots: np.ndarray
    choices: Sequence[np.ndarray]

    def run(self, path: Path, budget: Budget, limits: str) -> np.ndarray:
        """Return the widths (G,) along ``path`` whose cost is nearest to the budget, rounded.

        Raises ``PlanError`` with the smallest reachable value if the budget lies below; ``limits`` says why.
        """
        target = budget.keep
        smallest = float(self.cost(self._with(np.array([self.choices[i][0] for i in self.slots]))))
        if smallest > target + NEAR:
            raise PlanError(
                f"Budget({budget.kind}={target:g}) can't be reached: the smallest reachable value is "
                f"{smallest:.4f} ({limits}, {len(self.slots)} of {len(self.start)} groups free). "
                "Ask for more, or relax these limits."
            )
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            below = float(self.cost(self._with(path(middle)))) <= target
            low, high = (middle, high) if below else (low, middle)
        ends = (self._with(path(low)), self._with(path(high)))
        return self._round(min(ends, key=lambda widths: abs(float(self.cost(widths)) - target)), target)

    def _with(self, free: np.ndarray) -> np.ndarray:
        widths = self.start.astype(float)
        widths[self.slots] = free
        return widths

    def _round(self, ideal: np.ndarray, target: float) -> np.ndarray:
        """Round every group to its nearest width, then move groups while that brings the cost nearer.

        Of the moves that do, the one goes first that strays least from the ideal width, in its own steps.
        """
        widths = ideal.copy()
        for i in self.slots:
            widths[i] = nearest(self.choices[i], ideal[i])
        if np.array_equal(widths, ideal):
            return widths.astype(int)  # nothing was rounded: one threshold, as the path has it
        gap = float(self.cost(widths)) - target
        while abs(gap) > CLOSE_ENOUGH:
            slots, moved = self._moves(widths, -1 if gap > 0 else 1)
            if not len(slots):
                break
            table = np.repeat(widths[None], len(slots), axis=0)
            table[np.arange(len(slots)), slots] = moved
            gaps = self.cost(table) - target
            old, new = widths[slots] - ideal[slots], moved - ideal[slots]
            strain = (new**2 - old**2) / (moved - widths[slots]) ** 2
            strain[np.abs(gaps) >= abs(gap)] = np.inf
            chosen = int(np.argmin(strain))
            if strain[chosen] == np.inf:
                break
            widths, gap = table[chosen], float(gaps[chosen])
        return widths.astype(int)

    def _moves(self, widths: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the groups that can take one step down (-1) or up (1), and their width after it."""
        slots, moved = [], []
        for i in self.slots:
            at = int(np.searchsorted(self.choices[i], widths[i])) + step
            if 0 <= at < len(self.choices[i]):
                slots.append(i)
                moved.append(self.choices[i][at])
        return np.array(slots, dtype=int), np.array(moved, dtype=float)
