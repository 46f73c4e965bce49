"""Granularity: what one unit is.

``channel``, ``head`` and ``neuron`` select among the groups of a graph.  ``kernel`` and ``weight`` make other
groups: one per weight tensor, whose units are 2-D (1-D, 3-D) kernels or single weights.  Such units share no
axis, so plans of these granularities are masks only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from secateur.measure import counts
from secateur.types import Cost, Graph, Group, Member, Plan, PlanError

CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
# granularity -> (modules whose weight is meant, number of leading axes that number the units; None: all)
MASKED: dict[str, tuple[tuple[type[nn.Module], ...], int | None]] = {
    "kernel": (CONVOLUTIONS, 2),
    "weight": ((*CONVOLUTIONS, nn.Linear), None),
}
SELECTED = ("channel", "head", "neuron")


def units(graph: Graph, granularity: str) -> Graph:
    """Return ``graph`` with units of one granularity.

    ``channel``, ``head``, ``neuron``: the same groups, all others frozen.  ``kernel``: one group per
    convolution weight W (O, I, ...), unit o * I + i is the kernel W[o, i].  ``weight``: one group per
    convolution or linear weight, every entry a unit.  The fingerprint stays, so a plan for either graph
    fits the model.

    Raises ``PlanError`` for another word, or when the model has no such unit.
    """
    if granularity in SELECTED:
        reason = f"granularity {granularity!r} asked, this group is "
        groups = tuple(
            group
            if group.frozen or group.granularity == granularity
            else replace(group, frozen=reason + group.granularity)
            for group in graph.groups
        )
    elif granularity in MASKED:
        groups = tuple(_masked_groups(graph.model, granularity))
    else:
        raise PlanError(f"granularity is one of {', '.join((*SELECTED, *MASKED))}; got {granularity!r}.")
    if not any(group.prunable for group in groups):
        raise PlanError(f"the model has no prunable unit of granularity {granularity!r}; see print(graph).")
    return replace(graph, groups=groups)


def masks(graph: Graph, plan: Plan) -> dict[str, Tensor]:
    """Return tensor name -> bool mask (True = stays) in the shape of the tensor, for a kernel or weight plan.

    Raises ``PlanError`` for a plan of another granularity or another graph.
    """
    if plan.granularity not in MASKED:
        raise PlanError(
            f"masks() takes a plan of kernels or weights; this plan is of granularity {plan.granularity!r}."
        )
    if plan.fingerprint != graph.fingerprint:
        raise PlanError(
            f"the plan is for graph {plan.fingerprint}, this graph is {graph.fingerprint}; make it again."
        )
    tensors = dict(graph.model.named_parameters())
    found = {}
    for name, count, indices in plan.keep:
        tensor = tensors.get(name)
        lead = MASKED[plan.granularity][1]
        if tensor is None or count != tensor.shape[:lead].numel():
            raise PlanError(
                f"the plan cuts {count} units of {name!r}, which this model does not have; make it again."
            )
        mask = torch.zeros(count, dtype=torch.bool)
        mask[torch.as_tensor(indices)] = True
        spread = mask.reshape(*tensor.shape[:lead], *[1] * (tensor.dim() - (lead or tensor.dim())))
        found[name] = spread.expand(tensor.shape).contiguous().to(tensor.device)
    return found


def unit_size(graph: Graph, group: Group) -> int:
    """Return the number of weights in one unit of a kernel or weight group."""
    return graph.model.get_parameter(group.name).numel() // group.units


def unit_macs(graph: Graph, group: Group) -> float:
    """Return the multiply-accumulates of one unit of a kernel or weight group, on the inputs of the trace.

    Those of the operators that its module runs, in equal parts; 0 where another module or function uses the weight.
    """
    weight = graph.model.get_parameter(group.name)
    owners = {path for path, module in graph.model.named_modules() if getattr(module, "weight", None) is weight}
    return sum(_dense(cost) for cost in graph.costs if cost.module in owners) / group.units


def unit_shares(graph: Graph, kind: str) -> np.ndarray:
    """Return the fraction of the model's ``params`` or ``macs`` that one unit of each group is (G,)."""
    total = {
        "params": sum(parameter.numel() for parameter in graph.model.parameters()),
        "macs": sum(_dense(cost) for cost in graph.costs),
    }[kind]
    of = {"params": unit_size, "macs": unit_macs}[kind]
    return np.array([of(graph, group) / max(total, 1) for group in graph.groups])


def _dense(cost: Cost) -> float:
    return cost.scale * math.prod(len(ids) for ids in cost.axes)


def left(graph: Graph, plan: Plan) -> tuple[int, int]:
    """Return the weights, and the multiply-accumulates on the inputs of the trace, that are not masked.

    ``graph`` is the model's own, ``plan`` one of kernels or weights.  What the masks leave is arithmetic that a
    sparse kernel could skip; dense kernels skip none of it.
    """
    groups = {group.name: group for group in _masked_groups(graph.model, plan.granularity)}
    weights, work = float(counts.params(graph)), float(counts.macs(graph))
    for name, count, indices in plan.keep:
        weights -= (count - len(indices)) * unit_size(graph, groups[name])
        work -= (count - len(indices)) * unit_macs(graph, groups[name])
    return round(weights), round(work)


def _masked_groups(model: nn.Module, granularity: str) -> Iterator[Group]:
    kinds, lead = MASKED[granularity]
    parameters = {id(parameter): name for name, parameter in model.named_parameters()}
    offset = 0
    done = set()
    for module in model.modules():
        weight = getattr(module, "weight", None) if isinstance(module, kinds) else None
        name = parameters.get(id(weight))
        if weight is None or name is None or name in done:  # tied weights are one group
            continue
        done.add(name)
        count = weight.shape[:lead].numel()
        member = Member(name, -1, np.empty((count, 0), dtype=np.int64), "out")
        yield Group(
            name,
            offset,
            count,
            granularity,
            (member,),
            signature=f"{granularity}:{tuple(weight.shape[lead:])}",
        )
        offset += count
