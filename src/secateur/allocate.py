"""Allocate: the only place that chooses.  Scores and a budget in, a plan out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np

from secateur.allocation import ALLOCATIONS, Allocation, Free, best
from secateur.granularity import MASKED, unit_size
from secateur.measure.counts import Counter
from secateur.types import Budget, Graph, Group, Plan, PlanError, Scores
from secateur.widths import NEAR, Search, allowed, nearest, steps


def allocate(
    scores: Scores,
    budget: Budget,
    allocation: str | Allocation = "global",
    *,
    round_to: str | int | None = "auto",
    min_units: int = 1,
    exact_only: bool = False,
    keep: Mapping[str, float] | None = None,
    freeze: Sequence[str] = (),
) -> Plan:
    """Return the plan that keeps the best units of every group within ``budget``.

    ``allocation`` splits the budget over the groups: ``uniform``, ``global``, ``isomorphic`` or an object
    of these classes.  Budgets of params and macs are fractions of the whole model, budgets of units are
    fractions of all units in prunable groups.  Of kernels and weights ``params`` is the fraction of the weights
    in all their groups, so that a 7 x 7 kernel counts 49; ``macs`` is refused, because zeros save no time.
    Within a group the best scores stay; ties go to the lower index.

    ``round_to`` makes widths multiples: ``auto`` of 8 positions in groups at least 32 wide, an int of
    that number in groups at least so wide, None nowhere.  Rounding goes to the nearest width, then single
    groups move up or down, those that are furthest from their ideal width first, until the budget is
    nearest.  At least ``min_units`` stay in each group; with 0 all units of a block with a way around it may
    go (``Group.vanishes``), elsewhere one stays.  ``exact_only`` leaves groups whole where masking
    and compacting may differ. ``keep`` fixes the fraction of groups by name pattern (fnmatch on the
    group's name, or on the path of a module that produces its units), ``freeze`` leaves groups whole.

    Raises ``PlanError`` when the budget can't be reached (with the smallest value that can), when nothing
    can be cut, when a score is not finite, or when a pattern matches nothing.
    """
    graph = scores.graph
    step = steps(graph, round_to)
    if isinstance(min_units, bool) or not isinstance(min_units, int) or min_units < 0:
        raise PlanError(f"allocate(min_units=...) is an int of at least 0; got {min_units!r}.")
    if isinstance(allocation, str) and allocation not in ALLOCATIONS:
        raise PlanError(f"allocate(allocation=...) is one of {', '.join(ALLOCATIONS)}; got {allocation!r}.")
    how = ALLOCATIONS[allocation] if isinstance(allocation, str) else allocation
    fixed = {**_fractions(graph, keep or {}), **dict.fromkeys(matching(graph, freeze), 1.0)}
    ranked = {g.name: _checked(scores, g) for g in graph.groups if g.prunable and g.name in scores.values}
    least = [min_units if group.vanishes else max(1, min_units) for group in graph.groups]
    choices = [allowed(group.units, step[i], least[i]) for i, group in enumerate(graph.groups)]
    widths = np.array([group.units for group in graph.groups])
    slots = []
    for i, group in enumerate(graph.groups):
        if group.name in ranked and (group.exact or not exact_only):
            if group.name in fixed:
                widths[i] = nearest(choices[i], fixed[group.name] * group.units)
            else:
                slots.append(i)
    search = Search(_cost(graph, budget.kind), widths, np.array(slots, dtype=int), choices)
    if slots:
        groups = tuple(graph.groups[i] for i in slots)
        free = Free(groups, tuple(ranked[g.name] for g in groups), np.array([choices[i][0] for i in slots]))
        widths = search.run(how.path(free), budget, f"min_units={min_units}, round_to={round_to!r}")
    elif budget.keep < 1 and not fixed:
        raise PlanError(_nothing(graph, exact_only))
    return _plan(scores, budget, widths, ranked, search)


def matching(graph: Graph, patterns: Sequence[str]) -> list[str]:
    """Return the names of the groups that match any pattern; each pattern must match one."""
    names = []
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        found = [g.name for g in graph.groups if any(fnmatchcase(path, pattern) for path in _paths(g))]
        if not found:
            raise PlanError(
                f"pattern {pattern!r} matches no group and no module that produces units; see print(graph)."
            )
        names += found
    return names


def limited(graph: Graph, patterns: Sequence[str]) -> Graph:
    """Return ``graph`` with all groups frozen that match none of ``patterns`` (as in ``allocate``; none: all stay)."""
    if not patterns:
        return graph
    reason = f"not among the groups that may be cut: {', '.join(patterns)}"
    groups = tuple(
        group
        if group.frozen or any(fnmatchcase(path, pattern) for path in _paths(group) for pattern in patterns)
        else replace(group, frozen=reason)
        for group in graph.groups
    )
    return replace(graph, groups=groups)


def _paths(group: Group) -> set[str]:
    """Return the group's name and the modules that produce its units or ride with them."""
    return {group.name, *(m.tensor.rpartition(".")[0] for m in group.members if m.role != "in")}


def _fractions(graph: Graph, keep: Mapping[str, float]) -> dict[str, float]:
    fixed = {}
    for pattern, fraction in keep.items():
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
            raise PlanError(f"allocate(keep={{{pattern!r}: ...}}) is a fraction in (0, 1]; got {fraction!r}.")
        fixed.update(dict.fromkeys(matching(graph, (pattern,)), float(fraction)))
    return fixed


def _checked(scores: Scores, group: Group) -> np.ndarray:
    values = scores.values[group.name].detach().cpu().float().numpy().copy()
    if values.shape != (group.units,) or not np.isfinite(values).all():
        raise PlanError(
            f"scores of group {group.name!r} must be {group.units} finite numbers; got shape {values.shape}, "
            f"{int((~np.isfinite(values)).sum())} not finite. Score again."
        )
    return values


def _cost(graph: Graph, kind: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function from widths (..., G) to the fraction of ``kind`` that stays."""
    dense = np.array([group.units for group in graph.groups], dtype=float)
    masked = _granularity(graph) in MASKED
    if masked and kind == "macs":
        raise PlanError(
            f"plans of {_granularity(graph)}s are masks, and zeros save no time: "
            "they take Budget(units=...) or Budget(params=...), not macs=."
        )
    if masked or kind == "units":
        sizes = [unit_size(graph, g) if kind == "params" else 1 for g in graph.groups]
        weigh = np.array([size * g.prunable for size, g in zip(sizes, graph.groups, strict=True)], dtype=float)
        total = float(dense @ weigh)
        return lambda widths: widths @ weigh / max(total, 1.0)
    counter = Counter.of(graph)
    total = float(counter(kind, dense))
    if total <= 0:
        raise PlanError(
            f"the graph counts no {kind}, so Budget({kind}=...) means nothing; use Budget(units=...)."
        )
    return lambda widths: counter(kind, widths) / total


def _granularity(graph: Graph) -> str:
    first = graph.groups[0].granularity if graph.groups else "unit"
    return first if first in MASKED else "unit"


def _plan(
    scores: Scores, budget: Budget, widths: np.ndarray, ranked: Mapping[str, np.ndarray], search: Search
) -> Plan:
    graph = scores.graph
    kept = tuple(
        (group.name, group.units, tuple(best(ranked[group.name], width).tolist()))
        for group, width in zip(graph.groups, widths.tolist(), strict=True)
        if width < group.units
    )
    masked = _granularity(graph) in MASKED
    kinds = ("units", "params") if masked else ("units", "params", "macs")
    achieved = tuple((kind, float(_cost(graph, kind)(widths))) for kind in kinds)
    notes = []
    got = float(search.cost(widths))
    if abs(got - budget.keep) > NEAR:
        largest = max((int(np.diff(search.choices[i]).max(initial=0)) for i in search.slots), default=0)
        notes.append(
            f"asked {budget.kind}={budget.keep:g}, reached {got:.4f}: {len(search.slots)} of "
            f"{len(graph.groups)} groups were free, in steps of up to {largest} units; no step comes nearer."
        )
    floor = [i for i in search.slots if masked and widths[i] == search.choices[i][0] < graph.groups[i].units]
    if floor:
        notes.append(
            f"{len(floor)} layers are almost empty: of {graph.groups[floor[0]].name!r} only the {widths[floor[0]]} "
            f"{_granularity(graph)}s that min_units protects stay."
        )
    whole = [g.name for g in graph.groups if g.prunable and g.name not in scores.values]
    if whole:
        notes.append(
            f"{len(whole)} groups have no scores from {scores.criterion} and stay whole, e.g. {whole[0]!r}."
        )
    return Plan(
        graph.fingerprint, kept, _granularity(graph), (budget.kind, budget.keep), achieved, tuple(notes)
    )


def _nothing(graph: Graph, exact_only: bool) -> str:
    frozen = [f"{g.name}: {g.frozen}" for g in graph.groups if g.frozen][:3]
    asked = "exact_only=True leaves inexact groups whole. " if exact_only else ""
    return f"nothing can be cut: none of {len(graph.groups)} groups is free. {asked}{'; '.join(frozen)}"
