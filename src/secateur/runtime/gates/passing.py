"""How the units of a map pass an operator: the same operator moves an array with the number of each unit.

Only what keeps an exact zero at zero passes units on; behind any other operator nothing is known, and everything
counts as computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.graph.trace import Op, Recording, Ref
from secateur.runtime.gates.flows import Flow, beside, union

NAMES = """
    relu relu_ relu6 relu6_ leaky_relu leaky_relu_ silu silu_ gelu gelu_ elu elu_ celu celu_ tanh tanh_ hardswish
    hardswish_ mish mish_ hardtanh hardtanh_ _prelu_kernel
"""
ACTIVATIONS = frozenset(f"aten::{name}" for name in NAMES.split())  # f(0) = 0
POOLS = """
    max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices max_pool2d avg_pool1d avg_pool2d avg_pool3d
    _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d mean.dim upsample_nearest2d upsample_bilinear2d
"""
POOLING = frozenset(f"aten::{name}" for name in POOLS.split())
SAME = "dropout dropout_ native_dropout clone detach alias _to_copy contiguous neg abs expand div.Scalar"
STILL = frozenset(f"aten::{name}" for name in SAME.split())
ADD = ("aten::add.Tensor", "aten::add_.Tensor")
MUL = ("aten::mul.Tensor", "aten::mul_.Tensor", "aten::mul.Scalar", "aten::div.Tensor", "aten::div_.Tensor")
VIEWS = ("aten::view", "aten::_unsafe_view", "aten::reshape", "aten::flatten.using_ints", "aten::squeeze.dim")
MOVES = ("aten::permute", "aten::transpose.int", "aten::unsqueeze", "aten::slice.Tensor", "aten::split.Tensor")
PASSING = POOLING | STILL | {*ADD, *MUL, *VIEWS, *MOVES, "aten::cat", "aten::split_with_sizes"}


@dataclass(frozen=True, eq=False)
class Held:
    """The units of one value: ``ids``, of its rank and of size 1 where nothing varies, count in ``flow``."""

    flow: Flow
    ids: Tensor

    @classmethod
    def on(cls, flow: Flow, rank: int, axis: int) -> Held | None:
        """Return ``flow`` on ``axis`` of a value of ``rank`` axes; None when no gate decides."""
        shape = [1] * rank
        shape[axis] = flow.units
        return cls(flow, torch.arange(flow.units).reshape(shape)) if flow.decided else None

    def along(self, axis: int, size: int) -> Flow | None:
        """Return the flow of ``axis`` with ``size`` units; None when they do not lie there and nowhere else."""
        axis %= self.ids.dim()
        found = self.ids.movedim(axis, 0)
        if len(found) != size or found.numel() != size:
            return None
        return self.flow.pick(found.flatten())


def passed(rec: Recording, op: Op, held: Mapping[int, Held]) -> dict[int, Held]:
    """Return what is known of the results of ``op`` from what is known of its arguments."""
    outs = [out for out in op.outs if out is not None]
    if not outs or not (op.target in PASSING or activates(op)):
        return {}
    if op.target == "aten::cat":
        return _joined(rec, op, outs[0], held)
    source = op.args[0].value if op.args and isinstance(op.args[0], Ref) else -1
    if op.target in ADD:
        return _added(rec, op, outs[0], held)
    shape = rec.values[outs[0]].shape
    if op.target in MUL and source not in held and op.target.startswith("aten::mul"):
        source = op.args[1].value if isinstance(op.args[1], Ref) else -1  # a zero on either side makes a zero
    if source not in held:
        return {}
    before, ids = rec.values[source].shape, held[source].ids
    if op.target in MUL:
        return {outs[0]: held[source]} if shape == before else {}
    if op.target in VIEWS:
        moved = [_viewed(ids, before, shape)]
    elif op.target in RULES:
        moved = RULES[op.target](ids, before, op.args[1:])
    else:
        moved = [ids if len(shape) == len(before) else _reduced(ids, op)]
    found = {out: Held(held[source].flow, new) for out, new in zip(outs, moved, strict=False) if new is not None}
    return {out: one for out, one in found.items() if _lies(one.ids.shape, rec.values[out].shape)}


def _lies(ids: torch.Size, shape: tuple[int, ...]) -> bool:
    return len(ids) == len(shape) and all(size in (1, length) for size, length in zip(ids, shape, strict=True))


def activates(op: Op) -> bool:
    """Is ``op`` an activation with f(0) = 0?"""
    if op.target not in ACTIVATIONS:
        return False
    low, high = limits(op) if "hardtanh" in op.target else (0.0, 0.0)
    return low <= 0 <= high


def limits(op: Op) -> tuple[float, float]:
    """Return the smallest and largest value of a hardtanh (of ReLU6: 0 and 6)."""
    low, high = [*op.args[1:], *[-1.0, 1.0][len(op.args) - 1 :]][:2]
    return float(low), float(high)


def _joined(rec: Recording, op: Op, out: int, held: Mapping[int, Held]) -> dict[int, Held]:
    shape = rec.values[out].shape
    axis = (op.args[1] if len(op.args) > 1 else 0) % max(len(shape), 1)
    parts = [part.value for part in op.args[0] if isinstance(part, Ref)]
    if not any(part in held for part in parts):
        return {}
    flows = []
    for part in parts:
        size = rec.values[part].shape[axis] if len(rec.values[part].shape) == len(shape) else -1
        flow = held[part].along(axis, size) if part in held else Flow.whole(max(size, 0))
        flows.append(flow)
    known = [flow for flow in flows if flow is not None]
    if len(known) < len(flows) or sum(flow.units for flow in known) != shape[axis]:
        return {}
    return _kept(out, Held.on(beside(known), len(shape), axis))


def _added(rec: Recording, op: Op, out: int, held: Mapping[int, Held]) -> dict[int, Held]:
    """A sum is zero where all summands are."""
    sides = [held.get(arg.value) if isinstance(arg, Ref) else None for arg in op.args[:2]]
    shape = rec.values[out].shape
    one, two = sides
    if one is None or two is None or one.ids.shape != two.ids.shape:
        return {}
    axis = next((axis for axis, size in enumerate(one.ids.shape) if size > 1), 0)
    flows = [side.along(axis, shape[axis]) for side in (one, two)]
    if flows[0] is None or flows[1] is None:
        return {}
    return _kept(out, Held.on(union(flows[0], flows[1]), len(shape), axis))


def _kept(out: int, held: Held | None) -> dict[int, Held]:
    return {} if held is None else {out: held}


def _viewed(ids: Tensor, before: tuple[int, ...], after: tuple[int, ...]) -> Tensor | None:
    """Return ``ids`` in another shape; None where samples mix with units."""
    if not before or not after or ids.shape[0] != 1:
        return None
    if before[0] != after[0]:
        rows = _leading(before, after)  # (B, T, F) to (B T, F) and back: the units stay on the last axis
        if rows is None or any(size != 1 for size in ids.shape[:-1]) or before[-1] != after[-1]:
            return None
        return ids.reshape([1] * (len(after) - 1) + [-1])
    spread = ids.expand(1, *before[1:]).reshape(1, *after[1:])
    for axis in range(1, spread.dim()):
        first = spread.narrow(axis, 0, 1)
        spread = first if spread.shape[axis] and bool((spread == first).all()) else spread
    return spread


def _leading(before: tuple[int, ...], after: tuple[int, ...]) -> int | None:
    """Return the number of rows when two shapes agree in it, counted over all axes but the last."""
    rows = [torch.Size(shape[:-1]).numel() for shape in (before, after)]
    return rows[0] if rows[0] == rows[1] else None


def _reduced(ids: Tensor, op: Op) -> Tensor | None:
    """A mean without its axes."""
    axes = sorted((axis % ids.dim() for axis in op.args[1]), reverse=True) if len(op.args) > 1 and op.args[1] else []
    if op.target != "aten::mean.dim" or any(ids.shape[axis] != 1 for axis in axes):
        return None
    for axis in axes:
        ids = ids.squeeze(axis)
    return ids


def _permuted(ids: Tensor, before: tuple[int, ...], rest: Any) -> list[Tensor | None]:
    return [ids.permute(rest[0])]


def _transposed(ids: Tensor, before: tuple[int, ...], rest: Any) -> list[Tensor | None]:
    return [ids.transpose(rest[0], rest[1])]


def _unsqueezed(ids: Tensor, before: tuple[int, ...], rest: Any) -> list[Tensor | None]:
    return [ids.unsqueeze(rest[0])]


def _sliced(ids: Tensor, before: tuple[int, ...], rest: Any) -> list[Tensor | None]:
    given: list[Any] = [*rest, *[0, None, None, 1][len(rest) :]]
    axis, begin, end, step = given
    if ids.shape[axis] == 1:
        return [ids]
    return [ids.movedim(axis, 0)[slice(begin, end, step)].movedim(0, axis)]


def _split(ids: Tensor, before: tuple[int, ...], rest: Any) -> list[Tensor | None]:
    axis = rest[1] if len(rest) > 1 else 0
    if ids.shape[axis] != 1:
        return list(ids.split(rest[0], axis))
    parts = len(rest[0]) if isinstance(rest[0], list | tuple) else -(-before[axis] // rest[0])
    return [ids] * parts


RULES: dict[str, Callable[[Tensor, tuple[int, ...], Any], list[Tensor | None]]] = {
    "aten::permute": _permuted,
    "aten::transpose.int": _transposed,
    "aten::unsqueeze": _unsqueezed,
    "aten::slice.Tensor": _sliced,
    "aten::split.Tensor": _split,
    "aten::split_with_sizes": _split,
}
