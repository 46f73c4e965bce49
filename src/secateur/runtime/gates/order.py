"""Put the units of each group in the order of their scores: nested prefixes then hold the best ones first."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from secateur.graph.verify import distance, outputs, rearranged, tolerance
from secateur.mask import tensors_of
from secateur.types import Graph, PlanError, Scores


def ordered(scores: Scores) -> nn.Module:
    """Return a copy of the model whose units stand in falling order of ``scores`` in each group; it computes the same.

    Units of one group are interchangeable, so this is no approximation: producers, norms and consumers move
    together.  Groups without scores stay as they are.

    Raises ``PlanError`` when the copy does not compute the same on the example inputs of the graph.

    >>> import secateur as sc
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> with torch.no_grad():
    ...     _ = net[0].weight.copy_(torch.tensor([[1.0], [3.0], [2.0]]).expand(3, 4))
    >>> graph = sc.trace(net, torch.rand(2, 4))
    >>> ordered(sc.score(graph, sc.criteria.Magnitude()))[0].weight[:, 0].tolist()
    [3.0, 2.0, 1.0]
    """
    graph = scores.graph
    model = copy.deepcopy(graph.model)
    target = np.arange(graph.units + 1)
    for group in graph.groups:
        if group.name in scores.values:
            best = torch.as_tensor(scores.values[group.name]).argsort(descending=True, stable=True)
            target[group.offset : group.offset + group.units] = group.offset + best.cpu().numpy()
    with torch.no_grad():
        held = tensors_of(model)
        for name, value in rearranged(graph, target).items():
            held[name].copy_(value)
    _check(graph, model)
    return model


def _check(graph: Graph, model: nn.Module) -> None:
    """Compare the two models on the example inputs; raises ``PlanError`` when they differ."""
    error = distance(outputs(graph.model, graph), outputs(model, graph))
    if error > 10 * tolerance(model):
        raise PlanError(
            f"the units of this model can't be put in another order: its outputs then differ by {error:.1e} relative. "
            "Check the groups with sc.verify(graph); in a recipe, rnp.order: given leaves them as they are."
        )
