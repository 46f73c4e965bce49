"""Pruning while training: what the schedule ``during`` says about the rest of a recipe, and the widths of its events.

T epochs in all, I before the first event, then an event every D epochs; each is followed by D epochs of training, the
last one by as many as are left, so that the total is T exactly.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from secateur.problems import at
from secateur.sections import When
from secateur.types import Budget, Group
from secateur.yaml_source import Path

if TYPE_CHECKING:
    from secateur.recipe import Recipe

KEPT = (("prune", "allocation"), ("prune", "round_to"), ("prune", "budget"))  # told where ``keep`` is given


def stays(keep: float, units: int) -> int:
    """Return how many of ``units`` stay at an event: those of rank at most max(1, keep * units), best first.

    ``keep`` is taken as the decimal number it is written as.

    >>> widths = [50]
    >>> for _ in range(7):
    ...     widths.append(stays(0.9, widths[-1]))
    >>> widths
    [50, 45, 40, 36, 32, 28, 25, 22]
    """
    return max(1, math.floor(Fraction(repr(float(keep))) * units))


def event(groups: Iterable[Group], keep: float, frozen: Collection[str]) -> tuple[Budget, dict[str, float]]:
    """Return what stays at an event: of all units, and the fraction of each prunable group; ``frozen`` ones whole."""
    units = {group.name: group.units for group in groups if group.prunable}
    left = {name: count if name in frozen else stays(keep, count) for name, count in units.items()}
    whole = Budget(units=sum(left.values()) / sum(units.values())) if units else Budget(units=1)
    return whole, {name: count / units[name] for name, count in left.items()}


def told(when: When) -> dict[Path, Any]:
    """Return path -> value for what ``when`` decides about elsewhere in a recipe."""
    if not when.training:
        return {}
    found: dict[Path, Any] = {("train", "epochs"): when.initial_iterations}
    if when.events:
        found |= {("recover", "epochs"): when.increment, ("recover", "final_epochs"): when.last}
    if when.keep is not None:
        found |= dict(zip(KEPT, ("uniform", None, {"units": when.keep**when.events}), strict=True))
    return found


def spell_out(values: Any) -> None:
    """Put what the schedule tells into the ``values`` of a recipe, where the recipe leaves it out."""
    section = at(values, ("prune", "schedule"))
    try:
        when = When.model_validate(section)
    except ValidationError:
        return  # told with the other problems
    if not when.training:
        return
    for path, value in {**told(when), ("recover", "carry_optimizer"): True}.items():
        here = values
        for key in path[:-1]:
            here = here.setdefault(key, {}) if isinstance(here, dict) else None
        if isinstance(here, dict):
            here.setdefault(path[-1], value)


def conflicts(recipe: Recipe) -> dict[Path, str]:
    """Return path -> rule for each value of ``recipe`` that its schedule ``during`` rules out."""
    when, prune, recover = recipe.prune.schedule, recipe.prune, recipe.recover
    if not when.training:
        return {} if when.keep is None else {("prune", "schedule", "keep"): "belongs to the schedule during"}
    found: dict[Path, str] = {}
    if when.initial_iterations > when.total_epochs:
        return {("prune", "schedule", "initial_iterations"): f"must be at most total_epochs = {when.total_epochs}"}
    values = recipe.model_dump()
    for path, value in told(when).items():
        given = at(values, path)
        if not _same(given, value):
            found[path] = f"the schedule during makes it {value!r}; leave it out"
    if recover.steps is not None:
        found["recover", "steps"] = "the schedule during counts epochs; leave it out"
    if recover.name not in ("distil", "finetune"):
        found["recover", "name"] = "the schedule during trains on after each event: finetune or distil"
    if when.keep is not None and prune.keep:
        found["prune", "keep"] = "the schedule has one keep for all groups; leave it out, or freeze groups"
    if when.keep is None and not when.events and recipe.budget.keep < 1:
        found["prune", "budget"] = (
            "there is no event that could reach it: give prune.schedule.keep, or budget {units: 1}"
        )
    return found


def _same(given: Any, value: Any) -> bool:
    """Compare a value of the recipe with what the schedule says; of a budget, the keys that are given."""
    if isinstance(value, Mapping):
        held = {k: v for k, v in dict(given).items() if v is not None}
        return held.keys() == value.keys() and all(math.isclose(held[k], value[k], rel_tol=1e-9) for k in value)
    return given == value
