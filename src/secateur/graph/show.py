"""The groups of a graph as a table for people."""

from __future__ import annotations

from secateur.types import Graph


def table(graph: Graph) -> str:
    """Return one line per group: units, granularity, members, exactness, and why it is frozen."""
    prunable = [g for g in graph.groups if g.prunable]
    lines = [
        f"graph {graph.fingerprint}: {graph.operators} operators, {len(graph.groups)} groups, "
        f"{len(prunable)} prunable with {sum(g.units for g in prunable)} units",
        f"{'group':<44} {'units':>6} {'kind':<8} {'members':>7} {'exact':<6} frozen because",
    ]
    for group in graph.groups:
        name = group.name if len(group.name) <= 44 else "..." + group.name[-41:]
        exact = "yes" if group.exact else "no"
        lines.append(
            f"{name:<44} {group.units:>6} {group.granularity:<8} {len(group.members):>7} {exact:<6} "
            f"{group.frozen or ''}".rstrip()
        )
    lines += [f"note: {note}" for note in graph.notes]
    return "\n".join(lines)
