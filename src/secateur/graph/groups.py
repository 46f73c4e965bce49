"""From a recording to groups: run the operator table, decide the splits, collect units and their members."""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.graph.calls import LIKE, bind
from secateur.graph.flow import Axis, Flow
from secateur.graph.members import build_groups
from secateur.graph.rules import apply_rule
from secateur.graph.rules.point import pointwise
from secateur.graph.trace import Recording, Ref, inputs_of, record, unused
from secateur.graph.vanish import mark_vanishing
from secateur.types import Cost, Graph, Group, TraceError


def trace(model: nn.Module, example_inputs: Any) -> Graph:
    """Run ``model`` once and return its ``Graph``: groups of units, unit ids of every tensor, costs.

    ``example_inputs`` is a tensor, a tuple of positional arguments, a dict of keyword arguments, or any nested
    structure of them (integer tensors too).  The model runs in eval mode without gradients; its state, mode and
    random state are as before.  Wrapped models (DDP, compiled) are unwrapped.

    Raises ``TraceError`` when the model fails on the inputs or is not a module.

    >>> import torch, secateur as sc
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> [(g.name, g.units, g.frozen) for g in sc.trace(net, torch.rand(1, 4)).groups if g.prunable]
    [('0', 8, None)]
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"trace takes a torch.nn.Module, got {type(model).__name__}; pass the model itself.")
    begin = time.perf_counter()
    model = unwrap(model)
    args, kwargs = inputs_of(example_inputs)
    recording = record(model, args, kwargs)
    return group(model, args, kwargs, recording, begin)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the plain model inside DistributedDataParallel, DataParallel or torch.compile.

    Raises ``TraceError`` for scripted models: their code can't be resized.
    """
    while True:
        if isinstance(model, torch.jit.ScriptModule):
            raise TraceError("a scripted model cannot be resized; pass the eager model it was scripted from.")
        if hasattr(model, "_orig_mod"):
            model = cast("nn.Module", model._orig_mod)  # torch.compile
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = cast("nn.Module", model.module)
        else:
            return model


def group(model: nn.Module, args: Any, kwargs: Any, recording: Recording, begin: float) -> Graph:
    """Pass units through a recording and collect them into a ``Graph``."""
    flow = Flow(recording)
    costs_of_inference: int | None = None
    alive = recording.read.union(recording.outputs)
    matters = _matters(recording)
    for n, op in enumerate(recording.ops):
        flow.idle = not matters[n]
        if n == recording.eval_ops:
            costs_of_inference = len(flow.costs)
        # a picked position that nothing reads was made for its shape only
        if not op.target.startswith("aten::select") or any(index in alive for index in op.outs):
            apply_rule(flow, op, pointwise)
    if costs_of_inference is not None:
        del flow.costs[costs_of_inference:]
    flow.op = None
    idle = [str(recording.values[index].name) for index in unused(recording)]
    _freeze_ends(flow, recording)
    flow.cells.resolve()
    built = build_groups(flow, model)
    unit_of = built.unit_of
    costs = tuple(
        Cost(t.op, t.module, t.scale, tuple(unit_of[flow.cells.find(ids)] for ids in t.axes)) for t in flow.costs
    )
    axes = {
        value.name: tuple(_ids(flow, unit_of, axis) for axis in flow.axes[index])
        for index, value in enumerate(recording.values)
        if value.origin == "parameter" and value.name is not None
    }
    graph = Graph(
        model=model,
        args=args,
        kwargs=kwargs,
        groups=built.groups,
        axes=axes,
        aliases=dict(recording.aliases),
        costs=costs,
        fingerprint="",
        operators=len(recording.ops),
        seconds=0.0,
        calls=bind(flow, unit_of),
        notes=(
            *_unitless(flow, built.groups),
            *(f"{name} was not used on the example inputs: what feeds it is unknown" for name in idle),
        ),
        caches=tuple(recording.caches),
        unmaskable=frozenset(flow.unmaskable),
    )
    from secateur.trial import foreign, settle

    if foreign(model):
        graph = settle(graph)
    graph = mark_vanishing(graph, recording)
    return replace(graph, fingerprint=fingerprint(graph, recording), seconds=time.perf_counter() - begin)


def _freeze_ends(flow: Flow, recording: Recording) -> None:
    """What leaves the model, what the example did not reach, and what must stay alike."""
    for index in unused(recording):
        flow.block(flow.axes[index], f"{recording.values[index].name} was not used on the example inputs")
    led = _led_on(recording)
    for index, value in enumerate(recording.values):
        if 0 in value.shape and index not in led:
            flow.block(flow.axes[index], "an empty tensor ends here: give example inputs that fill it")
    _tie_alike(flow)
    for index in recording.outputs:
        for k, axis in enumerate(flow.axes[index]):
            if axis is not None:
                flow.cells.freeze(axis.ids, f"output of the model (axis {k})")


def _tie_alike(flow: Flow) -> None:
    """``x.expand_as(y)`` takes y's sizes: the axes of both must be cut alike."""
    for call in flow.recording.calls:
        if call.name in LIKE and len(call.args) > 1 and isinstance(call.args[1], Ref) and call.outs[0] is not None:
            for a, b in zip(flow.axes[call.outs[0]], flow.axes[call.args[1].value], strict=False):
                if a is not None or b is not None:
                    flow.tie(a, b)


def _led_on(recording: Recording) -> set[int]:
    """Values that an operator with results reads, or that are outputs."""
    read = set(recording.outputs)
    for op in recording.ops:
        if op.outs:
            read.update(x.value for x in pytree.tree_leaves((op.args, op.kwargs)) if isinstance(x, Ref))
    return read


def _matters(recording: Recording) -> list[bool]:
    """Which operators' results reach an output or are written in place."""
    needed, out = set(recording.outputs), []
    for op in reversed(recording.ops):
        writes = op.target.split(".")[0].endswith("_") or op.target.endswith("out")
        out.append(writes or any(index in needed for index in op.outs))
        if out[-1]:
            needed.update(x.value for x in pytree.tree_leaves((op.args, op.kwargs)) if isinstance(x, Ref))
    return out[::-1]


def _unitless(flow: Flow, groups: tuple[Group, ...]) -> tuple[str, ...]:
    """Weights that no group mentions: every axis has a single position, or they were never used."""
    held = {member.tensor for item in groups for member in item.members}
    notes = []
    for value in flow.recording.values:
        weight = value.origin == "parameter" and len(value.shape) > 1 and value.dtype.is_floating_point
        if weight and value.name not in held:
            notes.append(f"{value.name} {value.shape}: no axis with more than one unit, nothing to cut")
    return tuple(notes)


def _ids(flow: Flow, unit_of: np.ndarray, axis: Axis | None) -> np.ndarray | None:
    if axis is None:
        return None
    ids = unit_of[flow.cells.find(axis.ids)]
    return ids if (ids >= 0).any() else None


def fingerprint(graph: Graph, recording: Recording) -> str:
    """Hash of operators, tensor shapes and groups: equal for equal structure, whatever the weights."""
    digest = hashlib.sha256()
    for op in recording.ops:
        digest.update(f"{op.target}@{op.module};".encode())
    for name, axes in graph.axes.items():
        digest.update(f"{name}{[0 if a is None else len(a) for a in axes]}".encode())
    for item in graph.groups:
        digest.update(f"{item.name}:{item.offset}:{item.units}:{item.frozen is None};".encode())
    return digest.hexdigest()[:16]
