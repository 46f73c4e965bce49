"""Multiply-accumulates of a gated model per sample: which channels of each operand the gates have computed.

A channel that a gate skips is exactly zero.  It stays zero through activations, pooling and dropout, is skipped in
a sum only where every summand skips it, and keeps its place in a concatenation.  The recorded run says how the maps
flow; the choices of the gates, one mask per layer and sample, say what was computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.graph.trace import Op, Recording, Ref, inputs_of, record
from secateur.runtime.gates.choice import Choice
from secateur.runtime.gates.flows import Flow
from secateur.runtime.gates.follow import Follower
from secateur.runtime.gates.gated import Gated
from secateur.runtime.gates.passing import Held, passed
from secateur.runtime.gates.sites import CONVOLUTION, Scene, depthwise


@dataclass(frozen=True)
class Term:
    """One convolution or linear layer: ``scale`` multiply-accumulates per pair of an input and an output unit.

    Both lie in ``groups`` equal parts, and pairs within a part.
    """

    path: str
    scale: float
    before: Flow
    after: Flow
    groups: int = 1


@dataclass(frozen=True)
class Meter:
    """Counts what a gated model computes; made by ``meter``."""

    terms: tuple[Term, ...]

    @property
    def dense(self) -> float:
        """Multiply-accumulates of one sample when every gate computes everything."""
        return float(sum(self.of({}, 1).values()))

    def of(self, choices: Mapping[str, Choice], samples: int) -> dict[str, Tensor]:
        """Return for each layer the multiply-accumulates of each sample, path -> float64 (samples,)."""
        masks = {path: choice.mask for path, choice in choices.items()}
        found: dict[str, Tensor] = {}
        for term in self.terms:  # a layer may run several times
            found[term.path] = found.get(term.path, 0) + _count(term, masks, samples)
        return found

    def __call__(self, choices: Mapping[str, Choice], samples: int) -> Tensor:
        """Return the multiply-accumulates of each sample, float64 (samples,), gates themselves not counted."""
        return torch.stack(list(self.of(choices, samples).values())).sum(0)


def meter(model: nn.Module, example: Any) -> Meter:
    """Return the meter of a gated ``model``; counts its convolutions and linear layers.

    Weights, not activations, decide what is counted: products of two activations (attention) are left out.

    >>> from secateur.runtime.gates import gate, watch
    >>> chain = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False))
    >>> x = torch.rand(2, 3, 6, 6)
    >>> model = gate(chain, 0.5, x).model
    >>> count = meter(model, x)
    >>> with watch(model) as choices:
    ...     _ = model(x)
    >>> count.dense, count(choices, 2).tolist()  # 4 of 8 channels, both as outputs and as inputs
    (3968.0, [1984.0, 1984.0])
    """
    args, kwargs = inputs_of(example)
    rec = record(model, args, kwargs)
    scene = Scene.of(model, rec, everywhere=True)
    owners = {path: module for path, module in model.named_modules() if isinstance(module, Gated | Follower)}
    inside = [_owner(op, owners) for op in scene.ops]
    ends = {path: number for number, path in enumerate(inside) if path}
    counted = {id(op) for op in scene.weighted}
    held: dict[int, Held] = {}
    terms: list[Term] = []
    for number, (op, path) in enumerate(zip(scene.ops, inside, strict=True)):
        owner = owners.get(path)
        if owner is None or op.module.startswith(f"{path}.{'conv' if isinstance(owner, Gated) else 'layer'}"):
            term = _term(scene, op, held) if id(op) in counted else None
            terms += [] if term is None else [_owned(term, path, owner)]
            held |= _made(rec, op, held, term)
        if number == ends.get(path) and owner is not None:
            held |= _on(rec, op, _flow_of(path, owner), _axis(owner))
    return Meter(tuple(terms))


def _owner(op: Op, owners: Mapping[str, nn.Module]) -> str:
    """Return the path of the gated or following layer that ``op`` runs in, "" for none."""
    return next((path for path in owners if f"{op.module}.".startswith(f"{path}.")), "")


def _flow_of(path: str, owner: nn.Module) -> Flow:
    return owner.flow if isinstance(owner, Follower) else Flow.of(path, owner.units)  # type: ignore[arg-type, return-value]


def _axis(owner: nn.Module) -> int:
    return -1 if isinstance(owner, Gated) and isinstance(owner.conv, nn.Linear) else 1


def _owned(term: Term, path: str, owner: nn.Module | None) -> Term:
    """Return ``term`` under the path of its owner, with what the owner decides about its outputs."""
    return term if owner is None else Term(path, term.scale, term.before, _flow_of(path, owner), term.groups)


def _on(rec: Recording, op: Op, flow: Flow, axis: int) -> dict[int, Held]:
    out = op.outs[0] if op.outs else None
    one = None if out is None else Held.on(flow, len(rec.values[out].shape), axis)
    return {} if one is None or out is None else {out: one}


def _made(rec: Recording, op: Op, held: Mapping[int, Held], term: Term | None) -> dict[int, Held]:
    """Return what is known of the results of ``op``: a depthwise convolution without bias passes zeros on."""
    if term is None:
        return passed(rec, op, held)
    return _on(rec, op, term.after, 1)


def _term(scene: Scene, op: Op, held: Mapping[int, Held]) -> Term | None:
    """Return the cost of a convolution or of a product with a weight."""
    rec, out = scene.rec, op.outs[0]
    refs = [arg.value for arg in op.args if isinstance(arg, Ref)]
    if out is None:
        return None
    shape = rec.values[out].shape
    if op.target == CONVOLUTION:
        source, weight = rec.values[refs[0]].shape, rec.values[refs[1]].shape
        groups, turned = op.args[8], op.args[6]
        places = source if turned else shape
        scale = float(torch.Size(weight[2:]).numel() * torch.Size(places[2:]).numel())
        known = _along(held, refs[0], 1, source[1])
        follows = depthwise(scene, op) and op.args[2] is None  # a skipped input gives a skipped output
        made = known.pick(torch.arange(shape[1]) // (shape[1] // source[1])) if follows else Flow.whole(shape[1])
        return Term(op.module, scale, known, made, groups)
    at = refs[1] if op.target in ("aten::addmm", "aten::baddbmm") else refs[0]
    known = _along(held, at, -1, rec.values[at].shape[-1])
    return Term(op.module, torch.Size(shape[:-1]).numel() / scene.batch, known, Flow.whole(shape[-1]))


def _along(held: Mapping[int, Held], value: int, axis: int, size: int) -> Flow:
    """Return which units of an axis are computed."""
    found = held[value].along(axis, size) if value in held else None
    return Flow.whole(size) if found is None else found


def _count(term: Term, masks: Mapping[str, Tensor], samples: int) -> Tensor:
    sides = []
    for flow in (term.before, term.after):
        mask = flow.mask(masks, samples)
        mask = torch.ones(samples, flow.units, dtype=torch.bool) if mask is None else mask.cpu()
        sides.append(mask.unflatten(1, (term.groups, -1)).sum(2).double())
    return term.scale * (sides[0] * sides[1]).sum(1)
