"""Collect classes of cells into units, and interchangeable units into groups."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from torch import nn

from secateur.graph.cells import KERNEL
from secateur.graph.flow import Flow
from secateur.types import Group, Member, Site

TIED = "tied by the view"
PARAMETRISED = "parametrizations"


@dataclass(frozen=True, eq=False)
class Built:
    """Groups, and the unit id of every cell root (-1: no unit)."""

    groups: tuple[Group, ...]
    unit_of: np.ndarray


def build_groups(flow: Flow, model: nn.Module) -> Built:
    """Units are classes of cells that reach a parameter; a group is all units with the same set of slices.

    Two units with equal slices in the same axes of the same tensors can be exchanged; what differs in any tensor,
    in being frozen, or in exactness is another group.
    """
    cells = flow.cells
    slots = _slots(flow)
    if not slots:
        return Built((), np.full(cells.count + 1, -1))
    rng = np.random.default_rng(0)
    keys = np.zeros(cells.count, dtype=np.uint64)
    order = np.full(cells.count, np.iinfo(np.int64).max)
    learnable = np.zeros(cells.count, dtype=bool)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for n, (name, axis, roots) in enumerate(slots):
        unique, counts = np.unique(roots, return_counts=True)
        salt = rng.integers(1, 2**63, dtype=np.uint64)
        keys[unique] += salt * (counts.astype(np.uint64) * np.uint64(2654435761) + np.uint64(1))
        rank = n + (0 if flow.roles.get((name, axis)) == "out" else len(slots))
        order[unique] = np.minimum(order[unique], rank)
        learnable[unique] |= name in parameters
    keys += cells.part_keys()
    reached = np.flatnonzero(learnable)
    keys[reached] += cells.frozen[reached].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    keys[reached] += (cells.inexact[reached] > 0).astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F)
    keep = reached[np.lexsort((reached, keys[reached], order[reached]))]
    keep = keep[~_silent(flow, keep)]
    starts = np.flatnonzero(np.r_[True, keys[keep][1:] != keys[keep][:-1]]) if len(keep) else np.array([], int)
    unit_of = np.full(cells.count + 1, -1, dtype=np.int64)
    unit_of[keep] = np.arange(len(keep))
    group_of = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(keep)]))
    members = _members(flow, slots, unit_of, group_of, starts)
    sites = _sites(flow, model, unit_of, group_of, starts)
    groups: list[Group] = []
    names: dict[str, int] = defaultdict(int)
    sizes = np.diff(np.r_[starts, len(keep)])
    for g, (start, size) in enumerate(zip(starts.tolist(), sizes.tolist(), strict=True)):
        root = keep[start]
        name = _name(members[g])
        names[name] += 1
        groups.append(
            Group(
                name=name if names[name] == 1 else f"{name}#{names[name]}",
                offset=start,
                units=size,
                granularity=_granularity(flow, model, members[g], root),
                members=tuple(members[g]),
                exact=bool(cells.inexact[root] == 0),
                why_inexact=cells.reasons[cells.inexact[root]],
                frozen=_frozen(flow, size, root) or _borrowed(members[g], parameters),
                sites=tuple(sites[g]),
                signature=_signature(model, members[g]),
            )
        )
    return Built(tuple(groups), unit_of)


def _slots(flow: Flow) -> list[tuple[str, int, np.ndarray]]:
    """(tensor, axis, roots) for every parameter or buffer axis that has cells."""
    out = []
    for index, value in enumerate(flow.recording.values):
        if value.origin != "parameter" or value.name is None:
            continue
        for k, axis in enumerate(flow.axes[index]):
            if axis is not None:
                out.append((value.name, k, flow.cells.find(axis.ids)))
    return out


def _silent(flow: Flow, roots: np.ndarray) -> np.ndarray:
    """Kernel positions, table rows and the tied factors of views are no units anyone would ask about."""
    reasons = flow.cells.reasons
    quiet = np.array([text == KERNEL or text.startswith((TIED, "rows are looked up")) for text in reasons])
    quiet[0] = False
    return quiet[flow.cells.frozen[roots]]


def _frozen(flow: Flow, size: int, root: int) -> str | None:
    if flow.cells.frozen[root]:
        return flow.cells.reasons[flow.cells.frozen[root]]
    return "a single unit: nothing would be left" if size == 1 else None


def _borrowed(members: list[Member], parameters: set[str]) -> str | None:
    """Units that only buffers make (coordinates, tables) are data: they have no weights to remove."""
    if any(m.tensor in parameters and m.role != "in" for m in members):
        return None
    buffers = [m.tensor for m in members if m.tensor not in parameters]
    return f"its units come from the buffer {buffers[0]}" if buffers else None


def _members(flow: Flow, slots: list, unit_of: np.ndarray, group_of: np.ndarray, starts: np.ndarray) -> list:
    members: list[list[Member]] = [[] for _ in starts]
    for name, axis, roots in slots:
        role = flow.roles.get((name, axis), "along")
        for g, index in _by_group(unit_of[roots], group_of, starts):
            members[g].append(Member(name, axis, index, role))
    return members


def _by_group(units: np.ndarray, group_of: np.ndarray, starts: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Return (group, index (units, k)) for every group that has all its units on this axis equally often."""
    positions = np.flatnonzero(units >= 0)
    if not len(positions):
        return []
    order = positions[np.argsort(units[positions], kind="stable")]
    groups = group_of[units[order]]
    ends = np.r_[starts[1:], len(group_of)]
    cuts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1], True])
    out = []
    for a, b in itertools.pairwise(cuts):
        g = int(groups[a])
        n = int(ends[g] - starts[g])
        counts = np.bincount(units[order[a:b]] - starts[g], minlength=n)
        if (b - a) % n == 0 and (counts == (b - a) // n).all():
            out.append((g, order[a:b].reshape(n, -1)))
    return out


def _sites(flow: Flow, model: nn.Module, unit_of: np.ndarray, group_of: np.ndarray, starts: np.ndarray) -> list:
    """Inputs of leaf modules that contract the units with a weight of their own."""
    sites: list[list[Site]] = [[] for _ in starts]
    consumed = _consumed(flow, unit_of, group_of)
    for path, calls in flow.recording.inputs.items():
        if path not in consumed or {name for name, _ in model.get_submodule(path).named_children()} - {PARAMETRISED}:
            continue
        for n, value in enumerate(calls[0]):
            for k, axis in enumerate(flow.axes[value] if value is not None else []):
                if axis is None:
                    continue
                for g, index in _by_group(unit_of[flow.cells.find(axis.ids)], group_of, starts):
                    if g in consumed[path]:
                        sites[g].append(Site(path, n, k, index))
    return sites


def _consumed(flow: Flow, unit_of: np.ndarray, group_of: np.ndarray) -> dict[str, set[int]]:
    """Module path -> groups that a weight of that module contracts."""
    found: dict[str, set[int]] = defaultdict(set)
    for index, value in enumerate(flow.recording.values):
        for k, axis in enumerate(flow.axes[index] if value.origin == "parameter" and value.name else []):
            if axis is not None and flow.roles.get((str(value.name), k)) == "in":
                units = unit_of[flow.cells.find(axis.ids)]
                path = str(value.name).rpartition(".")[0].removesuffix(f".{PARAMETRISED}.weight")
                found[path].update(group_of[units[units >= 0]].tolist())
    return found


def _name(members: list[Member]) -> str:
    ranked = sorted(members, key=lambda m: m.role != "out")
    path, _, leaf = ranked[0].tensor.rpartition(".")
    return (
        path.removesuffix(".parametrizations.weight")
        if leaf in ("weight", "original", "original0", "original1")
        else ranked[0].tensor
    )


def _granularity(flow: Flow, model: nn.Module, members: list[Member], root: int) -> str:
    if flow.cells.head[root]:
        return "head"
    shapes = {name: p.dim() for name, p in model.named_parameters(remove_duplicate=False)}
    convolved = any(shapes.get(m.tensor, 0) > 2 and m.role in ("in", "out") for m in members)
    return "channel" if convolved else "neuron"


def _signature(model: nn.Module, members: list[Member]) -> str:
    """Equal for groups of the same structure: owners' classes, axes and positions per unit."""
    rows = []
    for m in members:
        path, _, leaf = m.tensor.rpartition(".")
        try:
            kind = type(model.get_submodule(path)).__name__
        except AttributeError:
            kind = "?"
        rows.append(f"{kind}.{leaf}:{m.axis}:{m.role}")
    return "|".join(sorted(rows))
