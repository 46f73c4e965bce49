"""A trial cut: what no operator shows, such as ``assert x.shape[1] == 40`` or a table chosen by width.

Models of unknown code are cut once when they are traced.  Groups that make the forward fail, or the small model
differ from the masked one, are frozen with that as the reason.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from secateur.compact import compact
from secateur.types import Graph, Group, Plan, SecateurError

TRIED = frozenset(["torch", "torchvision", "timm", "transformers"])  # the census cuts their models


def foreign(model: nn.Module) -> bool:
    """Does ``model`` hold a module whose code is not of a library that the census covers?"""
    return any(kind.__module__.split(".")[0] not in TRIED for kind in {type(m) for m in model.modules()})


def settle(graph: Graph) -> Graph:
    """Return the graph with those groups frozen that cannot be cut in fact.

    One trial each for the exact and the inexact groups together; where it fails, halves of the failing set until
    single groups are left, so that few trials do for many groups.
    """
    refused: dict[str, str] = {}
    for exact in (True, False):
        whole = [g for g in graph.groups if g.prunable and g.exact == exact]
        refused.update(_search(graph, whole))
        rest = [g for g in whole if g.name not in refused]
        if len(rest) < len(whole) and (reason := _refusal(graph, rest)):  # they fail only together
            refused.update((g.name, reason) for g in rest)
    if not refused:
        return graph
    groups = tuple(replace(g, frozen=refused[g.name]) if g.name in refused else g for g in graph.groups)
    return replace(graph, groups=groups)


def _search(graph: Graph, groups: list[Group]) -> dict[str, str]:
    refused: dict[str, str] = {}
    pending = [groups]
    while pending:
        some = pending.pop()
        reason = _refusal(graph, some)
        if reason and len(some) == 1:
            refused[some[0].name] = reason
        elif reason:
            pending += [some[: len(some) // 2], some[len(some) // 2 :]]
    return refused


def _refusal(graph: Graph, groups: list[Group]) -> str | None:
    """The reason why the model cannot lose half of the units of ``groups``, if it cannot."""
    rows = []
    for item in groups:
        half = item.units // 16 * 8 if item.units >= 16 else item.units // 2
        rows.append((item.name, item.units, tuple(range(half))))
    if not rows:
        return None
    try:
        compact(graph, Plan(graph.fingerprint, tuple(rows)))
    except SecateurError as error:
        return "in a trial cut " + str(error).split("; freeze")[0]
    return None
