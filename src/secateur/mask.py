"""Zero the units that a plan drops, in place and reversibly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from secateur.types import Graph, Plan, PlanError

_SAVED = "_secateur_masked"
Place = tuple[str, int | None, torch.Tensor]  # tensor, axis, positions; without an axis a bool per weight
Saved = tuple[Place, torch.Size, torch.Tensor]  # shape of the whole tensor, values that were there


def dead_slices(graph: Graph, kept: np.ndarray) -> dict[str, list[tuple[int, np.ndarray]]]:
    """Return for each tensor the (axis, positions) that belong to dropped units.

    Axes that something divides by (weight norm's direction) are left out: see ``Graph.unmaskable``.
    """
    dead: dict[str, list[tuple[int, np.ndarray]]] = {}
    for name, axes in graph.axes.items():
        for axis, ids in enumerate(axes):
            if ids is None or (name, axis) in graph.unmaskable:
                continue
            positions = np.flatnonzero(~kept[ids])
            if len(positions):
                dead.setdefault(name, []).append((axis, positions))
    return dead


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, every name of a tied tensor included."""
    parameters, buffers = (
        model.named_parameters(remove_duplicate=False),
        model.named_buffers(remove_duplicate=False),
    )
    return {**dict(parameters), **dict(buffers)}


def mask_(graph: Graph, plan: Plan) -> nn.Module:
    """Zero every member of every dropped unit of ``graph.model``, in place; ``unmask_`` undoes it.

    Producers, consumers, norms and buffers are zeroed alike, so activations with f(0) != 0 do not matter.
    A second call replaces the first.  Kernel and weight plans zero single kernels and weights.

    Raises ``PlanError`` when the plan is for another graph.

    >>> import torch, secateur as sc
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> graph = sc.trace(net, torch.rand(1, 4))
    >>> plan = sc.allocate(sc.score(graph, sc.criteria.Magnitude()), sc.Budget(units=0.5), round_to=None)
    >>> int((sc.mask_(graph, plan)[0].bias == 0).sum()), int((sc.unmask_(graph)[0].bias == 0).sum())
    (4, 0)
    """
    unmask_(graph)
    tensors = tensors_of(graph.model)
    if plan.granularity in ("kernel", "weight"):
        from secateur.granularity import masks

        places: list[Place] = [
            (name, None, ~keep.to(tensors[name].device)) for name, keep in masks(graph, plan).items()
        ]
    else:
        places = _dead_places(graph, plan.kept(graph))
    _zero(graph.model, places)
    return graph.model


def _dead_places(graph: Graph, kept: np.ndarray) -> list[Place]:
    tensors = tensors_of(graph.model)
    return [
        (name, axis, torch.from_numpy(positions).to(tensors[name].device))
        for name, parts in dead_slices(graph, kept).items()
        for axis, positions in parts
    ]


def unmask_(graph: Graph) -> nn.Module:
    """Give ``graph.model`` the values back that ``mask_`` zeroed.

    Only those: what training did to the other weights meanwhile stays.  Raises ``PlanError`` when a tensor has
    another shape than when it was masked.
    """
    _give_back(graph.model)
    return graph.model


def _zero(model: nn.Module, places: list[Place]) -> None:
    tensors = tensors_of(model)
    saved: list[Saved] = []
    with torch.no_grad():
        for place in places:
            name, axis, index = place
            tensor = tensors[name].detach()
            value = tensor[index] if axis is None else tensor.index_select(axis, index)
            saved.append((place, tensor.shape, value))
            if axis is None:
                tensor.masked_fill_(index, 0)
            else:
                tensor.index_fill_(axis, index, 0)
    model.__dict__[_SAVED] = saved


def _give_back(model: nn.Module) -> list[Place]:
    """Undo ``_zero``, last place first; return the places."""
    saved: list[Saved] = model.__dict__.get(_SAVED, [])
    tensors = tensors_of(model)
    for (name, _, _), shape, _ in saved:
        if name not in tensors or tensors[name].shape != shape:
            raise PlanError(f"{name} changed its shape while masked; unmask before changing the model.")
    with torch.no_grad():
        for (name, axis, index), _, value in reversed(saved):
            tensor = tensors[name].detach()
            if axis is None:
                tensor[index] = value
            else:
                tensor.index_copy_(axis, index, value)
    model.__dict__.pop(_SAVED, None)
    return [place for place, _, _ in saved]


@contextlib.contextmanager
def unmasked(model: nn.Module) -> Iterator[nn.Module]:
    """Take a mask off for the length of a ``with`` block."""
    places = _give_back(model)
    try:
        yield model
    finally:
        if places:
            _zero(model, places)


@contextlib.contextmanager
def zeroed(graph: Graph, kept: np.ndarray) -> Iterator[nn.Module]:
    """The model with the dropped units zeroed for the length of a ``with`` block; no mask may be in place."""
    try:
        _zero(graph.model, _dead_places(graph, kept))
        yield graph.model
    finally:
        _give_back(graph.model)


@contextlib.contextmanager
def masked(graph: Graph, plan: Plan) -> Iterator[nn.Module]:
    """``mask_`` for the length of a ``with`` block; a mask that was there comes back."""
    with unmasked(graph.model):
        try:
            yield mask_(graph, plan)
        finally:
            unmask_(graph)
