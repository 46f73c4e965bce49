"""Which groups may lose all of their units: the inside of a block with a way around it.

Without units a producer makes nothing and a consumer gives its bias alone.  That is a network only where the output
still depends on the input by another way, such as a shortcut or a concatenation.
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from operator import and_, or_

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from secateur.graph.trace import Recording, Ref
from secateur.types import Graph, Group, Member


def mark_vanishing(graph: Graph, recording: Recording) -> Graph:
    """Return ``graph`` with ``vanishes`` set on the groups that may lose all of their units."""
    modules = dict(graph.model.named_modules())
    alone = [group.prunable and group.exact and _stands_alone(graph, group, modules) for group in graph.groups]
    if not any(alone):
        return graph
    vital = _vital(graph, recording)
    groups = tuple(
        replace(group, vanishes=ok and not vital >> number & 1)
        for number, (group, ok) in enumerate(zip(graph.groups, alone, strict=True))
    )
    return replace(graph, groups=groups)


def _stands_alone(graph: Graph, group: Group, modules: dict[str, nn.Module]) -> bool:
    """Do only whole axes of convolutions, linear layers and batch norms hold the group's units?"""
    tied = set(graph.aliases.values())
    consumed = any(member.role == "in" for member in group.members)
    return consumed and all(m.tensor not in tied and _whole(graph, group, m, modules) for m in group.members)


def _whole(graph: Graph, group: Group, member: Member, modules: dict[str, nn.Module]) -> bool:
    owner = modules.get(member.tensor.rpartition(".")[0])
    ids = graph.axes[member.tensor][member.axis]
    if ids is None or not ((ids >= group.offset) & (ids < group.offset + group.units)).all():
        return False
    if isinstance(owner, _ConvNd):
        return owner.groups == 1 or (member.role != "in" and member.axis == 0 and owner.groups == owner.in_channels)
    return isinstance(owner, nn.Linear) or (isinstance(owner, _BatchNorm | nn.PReLU) and member.role == "along")


def _vital(graph: Graph, recording: Recording) -> int:
    """Return one bit per group: set where every way from an input to an output leads through the group.

    One pass over the operators: what a group's consumer gives depends on the input by way of the group alone.
    """
    consumed: dict[str, int] = {}
    for number, group in enumerate(graph.groups):
        for member in group.members:
            if member.role == "in":
                consumed[member.tensor] = consumed.get(member.tensor, 0) | 1 << number
    through = {i: consumed.get(str(value.name), 0) for i, value in enumerate(recording.values)}
    behind = {i: 0 for i, value in enumerate(recording.values) if value.origin == "input"}
    for op in recording.ops:
        refs = [x.value for x in pytree.tree_leaves((op.args, op.kwargs)) if isinstance(x, Ref)]
        outs = [index for index in op.outs if index is not None]
        bits = reduce(or_, (through[index] for index in refs), 0)
        known = [behind[index] for index in refs if index in behind]
        if known:
            behind |= dict.fromkeys(outs, reduce(and_, known) | bits)
        else:  # made of weights alone, such as the transposed one of a linear layer
            through |= dict.fromkeys(outs, bits)
    return reduce(and_, (behind[index] for index in recording.outputs if index in behind), -1)
