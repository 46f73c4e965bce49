"""Multiply-accumulates of a gated model per sample: which channels of each operand the gates have computed.

A channel that a gate skips is exactly zero.  It stays zero through ReLU, pooling and dropout, is skipped in a sum
only where every summand skips it, and keeps its place in a concatenation.  The recorded run says how the maps flow;
the choices of the gates, one mask per layer and sample, say what was computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.graph.trace import Op, Recording, Ref, inputs_of, record
from secateur.runtime.gates.choice import Choice
from secateur.runtime.gates.gated import Gated
from secateur.runtime.gates.wrap import ADD

ZERO_STAYS = """
    relu relu_ relu6 hardtanh hardtanh_ leaky_relu leaky_relu_ silu silu_ gelu elu elu_ tanh tanh_ hardswish hardswish_
    dropout native_dropout clone detach alias _to_copy contiguous max_pool2d_with_indices max_pool2d avg_pool2d
    _adaptive_avg_pool2d adaptive_max_pool2d mean.dim
"""
STILL = frozenset(f"aten::{name}" for name in ZERO_STAYS.split())  # f(0) = 0, each channel for itself
PRODUCTS = ("aten::addmm", "aten::mm", "aten::linear", "aten::bmm")
SHAPED = ("aten::view", "aten::_unsafe_view", "aten::reshape", "aten::flatten.using_ints")


@dataclass(frozen=True)
class Flow:
    """Where the channels of a map come from: ``gate`` (a path), ``full``, ``sum``, ``cat`` or ``spread`` (flattened).

    ``units`` is the number of channels, ``parts`` the flows it is made of.
    """

    kind: str
    units: int
    gate: str = ""
    parts: tuple[Flow, ...] = ()

    def mask(self, choices: Mapping[str, Choice], samples: int) -> Tensor | None:
        """Return what is computed, bool (samples, units); None stands for everything."""
        if self.kind == "full" or (self.kind == "gate" and self.gate not in choices):
            return None
        if self.kind == "gate":
            return choices[self.gate].mask
        masks = [part.mask(choices, samples) for part in self.parts]
        known = [mask for mask in masks if mask is not None]
        if not known or (self.kind == "sum" and len(known) < len(masks)):
            return None
        if self.kind == "sum":
            return torch.stack(known).any(0)
        if self.kind == "spread":
            return known[0].repeat_interleave(self.units // known[0].shape[1], 1)
        whole = [
            known[0].new_ones(samples, part.units) if mask is None else mask
            for part, mask in zip(self.parts, masks, strict=True)
        ]
        return torch.cat(whole, 1)


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
        found: dict[str, Tensor] = {}
        for term in self.terms:  # a layer may run several times
            found[term.path] = found.get(term.path, 0) + _count(term, choices, samples)
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
    gates = {path: module.conv.out_channels for path, module in model.named_modules() if isinstance(module, Gated)}
    flows: dict[int, Flow] = {}
    terms: list[Term] = []
    batch = next((rec.values[i[0]].shape[0] for at in rec.inputs.values() for i in at if i and i[0] is not None), 1)
    for op in rec.ops[: rec.eval_ops or None]:
        out = op.outs[0] if op.outs else None
        if out is None:
            continue
        owner = next((path for path in gates if f"{op.module}.".startswith(f"{path}.")), None)
        inner = None if owner is None else Flow("gate", gates[owner], owner)  # from its convolution on
        term = _term(rec, op, out, flows, batch) if inner is None or op.module == f"{owner}.conv" else None
        if term is not None and owner is not None and inner is not None:
            term = replace(term, path=owner, after=inner)
        if term is not None:
            terms.append(term)
        flows[out] = inner or (_flow(rec, op, out, flows) if term is None else term.after)
    return Meter(tuple(terms))


def _term(rec: Recording, op: Op, out: int, flows: Mapping[int, Flow], batch: int) -> Term | None:
    """Return the cost of a convolution or of a product with a weight; None for other operators."""
    shape = rec.values[out].shape
    refs = [arg.value for arg in op.args if isinstance(arg, Ref)]
    if op.target == "aten::convolution":
        source, weight = rec.values[refs[0]].shape, rec.values[refs[1]].shape
        groups, turned = op.args[8], op.args[6]
        places = source if turned else shape
        scale = float(torch.Size(weight[2:]).numel() * torch.Size(places[2:]).numel())
        known = flows.get(refs[0], Flow("full", source[1]))
        depthwise = groups > 1 and groups == source[1] == shape[1]
        made = known if depthwise else Flow("full", shape[1])  # a skipped input gives a skipped output
        return Term(op.module, scale, known, made, groups)
    if op.target in PRODUCTS:
        source = refs[1] if op.target == "aten::addmm" else refs[0]
        if not op.module or not any(rec.values[ref].origin == "parameter" for ref in _ancestors(rec, refs)):
            return None
        known = flows.get(source, Flow("full", rec.values[source].shape[-1]))
        return Term(op.module, torch.Size(shape[:-1]).numel() / batch, known, Flow("full", shape[-1]))
    return None


def _ancestors(rec: Recording, refs: list[int]) -> list[int]:
    """Return ``refs`` and what their transposes were made of: a weight is turned before a product."""
    turned = {op.outs[0]: op.args[0].value for op in rec.ops if op.target in ("aten::t", "aten::transpose.int")}
    return refs + [turned[ref] for ref in refs if ref in turned]


def _flow(rec: Recording, op: Op, out: int, flows: Mapping[int, Flow]) -> Flow:
    """Return the flow of what ``op`` makes."""
    shape = rec.values[out].shape
    units = shape[1] if len(shape) > 1 else 1
    full = Flow("full", units)
    refs = [arg.value for arg in op.args if isinstance(arg, Ref)]
    known = [flows.get(ref, Flow("full", rec.values[ref].shape[1])) for ref in refs if len(rec.values[ref].shape) > 1]
    if op.target in STILL and known and known[0].units == units:
        return known[0]
    if op.target in ADD and len(known) == 2 and all(flow.units == units for flow in known):
        return Flow("sum", units, parts=tuple(known))
    if op.target == "aten::cat" and (len(op.args) < 2 or op.args[1] in (1, 1 - len(shape))):
        parts = [arg.value for arg in op.args[0] if isinstance(arg, Ref)]
        flowing = tuple(flows.get(part, Flow("full", rec.values[part].shape[1])) for part in parts)
        return Flow("cat", units, parts=flowing) if sum(f.units for f in flowing) == units else full
    if op.target in SHAPED and known and len(rec.values[refs[0]].shape) == 4 and len(shape) == 2:
        same = known[0].units and units % known[0].units == 0 and shape[0] == rec.values[refs[0]].shape[0]
        return Flow("spread", units, parts=(known[0],)) if same else full
    return full


def _count(term: Term, choices: Mapping[str, Choice], samples: int) -> Tensor:
    sides = []
    for flow in (term.before, term.after):
        mask = flow.mask(choices, samples)
        mask = torch.ones(samples, flow.units, dtype=torch.bool) if mask is None else mask.cpu()
        sides.append(mask.unflatten(1, (term.groups, -1)).sum(2).double())
    return term.scale * (sides[0] * sides[1]).sum(1)
