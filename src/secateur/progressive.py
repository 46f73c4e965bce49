"""Several cuts in a row, all told in terms of the dense model: budgets and plans.

After a cut the graph is a new one, with fewer units; a group of one unit has nothing left to cut and drops
out.  Here the fractions of the dense model become fractions of the present graph, and the plans of the present
graph become plans of the dense one.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import nn

from secateur.measure import counts
from secateur.types import Budget, Graph, Plan, PlanError

SMALLEST = 1e-9


def whole(dense: Graph) -> Plan:
    """Return the plan that keeps everything."""
    return Plan(dense.fingerprint, ())


def widths(dense: Graph, plan: Plan) -> dict[str, int]:
    """Return the units that ``plan`` keeps in each prunable group of ``dense``."""
    kept = {name: len(indices) for name, _, indices in plan.keep}
    return {g.name: kept.get(g.name, g.units) for g in dense.groups if g.prunable}


def relative(dense: Graph, done: Plan, graph: Graph, budget: Budget) -> Budget:
    """Return ``budget``, a fraction of the dense model, as a fraction of ``graph``, the present model.

    ``done`` is the plan of the dense model that led to ``graph``.  At most 1, which keeps everything.
    """
    if budget.kind == "units":
        now = widths(dense, done)
        asked = budget.keep * sum(g.units for g in dense.groups if g.prunable)
        free = sum(g.units for g in graph.groups if g.prunable)
        stuck = sum(now.values()) - free
        fraction = (asked - stuck) / max(free, 1)
    else:
        count = {"params": counts.params, "macs": counts.macs}[budget.kind]
        fraction = budget.keep * count(dense) / max(count(graph), 1)
    return Budget(**{budget.kind: min(1.0, max(SMALLEST, fraction))})


def compose(dense: Graph, done: Plan, plan: Plan, budget: Budget) -> Plan:
    """Return the plan of ``dense`` that equals ``done`` followed by ``plan``, with the fractions that stay.

    Raises ``PlanError`` when ``plan`` speaks of another number of units than ``done`` left.
    """
    kept = {name: np.asarray(indices) for name, _, indices in done.keep}
    for name, units, indices in plan.keep:
        before = kept.get(name, np.arange(dense.group(name).units))
        if len(before) != units:
            raise PlanError(f"group {name!r} has {len(before)} units left, the plan of the next cut says {units}.")
        kept[name] = before[list(indices)]
    rows = tuple((g.name, g.units, tuple(kept[g.name].tolist())) for g in dense.groups if g.name in kept)
    bare = Plan(dense.fingerprint, rows, plan.granularity, (budget.kind, budget.keep), notes=plan.notes)
    return replace(bare, achieved=achieved(dense, bare))


def achieved(dense: Graph, plan: Plan) -> tuple[tuple[str, float], ...]:
    """Return the fractions of units, params and macs of ``dense`` that ``plan`` leaves."""
    vector = plan.kept(dense)
    total = sum(g.units for g in dense.groups if g.prunable)
    return (
        ("units", sum(widths(dense, plan).values()) / max(total, 1)),
        ("params", counts.params(dense, vector) / max(counts.params(dense), 1)),
        ("macs", counts.macs(dense, vector) / max(counts.macs(dense), 1)),
    )


def remaining(dense: Graph, plan: Plan, model: nn.Module) -> Graph:
    """Return the graph of ``model``, of the structure of ``dense`` with the dropped units masked, without these units.

    Scores, budgets and plans of it are those of the model that ``compact`` would make; its members and sites point
    into the tensors and activations of the masked model.
    """
    kept = plan.kept(dense)
    number = np.where(kept, np.cumsum(kept) - 1, -1)
    number[-1] = -1  # positions of no unit

    def left(ids: np.ndarray) -> np.ndarray:
        return number[ids[kept[ids]]]

    groups = []
    for group in dense.groups:
        stays = kept[group.offset : group.offset + group.units]
        if stays.any():
            members = tuple(replace(m, index=m.index[stays]) for m in group.members)
            sites = tuple(replace(s, index=s.index[stays]) for s in group.sites)
            offset = int(number[group.offset + int(np.argmax(stays))])
            groups.append(replace(group, offset=offset, units=int(stays.sum()), members=members, sites=sites))
    return replace(
        dense,
        model=model,
        groups=tuple(groups),
        axes={name: tuple(None if a is None else left(a) for a in axes) for name, axes in dense.axes.items()},
        costs=tuple(replace(c, axes=tuple(left(a) for a in c.axes)) for c in dense.costs),
        fingerprint=f"{dense.fingerprint}-{int(kept.sum()) - 1}",
    )
