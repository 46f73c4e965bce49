"""Normalisation: affine vectors and statistics ride along; where units are mixed they become inexact."""

from __future__ import annotations

import numpy as np

from secateur.graph.flow import Axes, Axis, Flow
from secateur.graph.reshape import reshape
from secateur.graph.rules.table import arg, base_name, rule
from secateur.graph.trace import Op, Ref


@rule(
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm batch_norm "
    "miopen_batch_norm _batch_norm_no_update _batch_norm_with_update _batch_norm_impl_index"
)
def batch_norm(flow: Flow, op: Op) -> None:
    """Statistics per channel (axis 1); the other axes are averaged when batch statistics are used."""
    axes = list(flow.of(op.args[0]))
    vectors = [x for x in op.args[1:5] if isinstance(x, Ref)]
    channel = axes[1]
    for ref in vectors:
        channel = flow.tie(channel, flow.of(ref)[0]) if flow.of(ref) else channel
        flow.role(flow.of(ref)[0] if flow.of(ref) else None, "along")
    affine = isinstance(op.args[1], Ref)
    running = len(op.args) > 3 and isinstance(op.args[3], Ref)
    old = axes[1]
    zero = affine or (running and old is not None and old.zero)
    if not running or arg(op, 5, "training") is True:
        for k, axis in enumerate(axes):
            if k != 1:
                flow.mix(axis)
        zero = affine or (old is not None and old.zero)
    axes[1] = Axis(channel.ids, zero) if channel is not None else None
    axes = [Axis(a.ids, a.zero and k == 1) if a is not None else None for k, a in enumerate(axes)]
    flow.set(axes)


@rule("native_layer_norm layer_norm _fused_rms_norm rms_norm")
def layer_norm(flow: Flow, op: Op) -> None:
    """Statistics over the last axes: the units there are mixed."""
    axes = list(flow.of(op.args[0]))
    rank = len(op.args[1])
    weight = op.args[2] if len(op.args) > 2 else None
    bias = op.args[3] if len(op.args) > 3 and isinstance(op.args[3], Ref) else None
    for k in range(len(axes) - rank, len(axes)):
        axis = axes[k]
        for ref in (weight, bias):
            if isinstance(ref, Ref):
                own = flow.of(ref)[k - len(axes) + rank]
                if own is not None:
                    axis = flow.tie(axis, own)
                    flow.role(own, "along")
        flow.mix(axis)
        zero = isinstance(weight, Ref) and (isinstance(bias, Ref) or weight is not None)
        axes[k] = Axis(axis.ids, zero) if axis is not None else None
    flow.set(axes)


@rule("native_group_norm group_norm")
def group_norm(flow: Flow, op: Op) -> None:
    """Statistics per group of channels: either whole groups go (exact) or equal positions of all groups."""
    if base_name(op.target) == "aten::group_norm":
        groups, weight, bias = op.args[1], arg(op, 2, "weight"), arg(op, 3, "bias")
    else:
        weight, bias, groups = op.args[1], op.args[2], op.args[6]
    axes = list(flow.of(op.args[0]))
    channels = flow.shape(op.args[0])[1]
    channel = axes[1]
    for ref in (weight, bias):
        if isinstance(ref, Ref) and flow.of(ref):
            channel = flow.tie(channel, flow.of(ref)[0])
            flow.role(flow.of(ref)[0], "along")
    for k, axis in enumerate(axes):
        if k > 1:
            flow.mix(axis)
    if channel is not None and groups < channels:
        tie_grouped(flow, channel, groups, channels // groups, mixes=True)
    zero = isinstance(weight, Ref) or (channel is not None and channel.zero and groups == channels)
    axes[1] = Axis(channel.ids, zero) if channel is not None else None
    flow.set(axes)


def tie_grouped(flow: Flow, axis: Axis, groups: int, width: int, mixes: bool = False) -> list[np.ndarray | None]:
    """Keep an axis a full (groups, width) grid: its factor cells decide, see ``Cells.factor``."""
    if (axis.ids < 0).any():
        flow.block([axis], f"{flow.where} needs equal groups of units and fixed positions")
        return [None, None]
    factors = flow.cells.factor(axis.ids.reshape(groups, width), flow.where)
    if mixes and factors[1] is not None:
        flow.mix(Axis(factors[1]))
    return factors


@rule("_weight_norm_interface _weight_norm")
def weight_norm(flow: Flow, op: Op) -> None:
    """v * g / ||v||: zero norms would divide by zero, so the rows of v are not zeroed when masking."""
    v, g = flow.of(op.args[0]), flow.of(op.args[1])
    dim = arg(op, 2, "dim", 0)
    axes = list(v)
    kept = axes[dim]
    if kept is not None and kept.source is not None:
        flow.unmaskable.add(kept.source)
    both = flow.tie(kept, g[dim]) if g else kept
    source = kept.source if kept is not None else None
    axes[dim] = Axis(both.ids, True, source) if both is not None else None
    flow.set(axes)


@rule("linalg_vector_norm norm")
def vector_norm(flow: Flow, op: Op) -> None:
    """The norm over some axes: exact when dead slices are zero; the other axes stay."""
    axes = flow.of(op.args[0])
    dims = arg(op, 2, "dim")
    gone = set(range(len(axes))) if not dims else {d % len(axes) for d in ([dims] if isinstance(dims, int) else dims)}
    keep = len(flow.shape(op.outs[0])) == len(axes) if op.outs and op.outs[0] is not None else False
    out: Axes = []
    for k, axis in enumerate(axes):
        if k in gone:
            if axis is not None and not axis.zero:
                flow.mix(axis)
            if keep:
                out.append(None)
        else:
            out.append(axis)
    flow.set(out)


@rule("_softmax _log_softmax _safe_softmax softmax log_softmax")
def softmax(flow: Flow, op: Op) -> None:
    """Units along the normalised axis are mixed; the others pass, no longer zero where dead."""
    axes = list(flow.of(op.args[0]))
    flow.mix(axes[op.args[1]] if axes else None)
    flow.set([Axis(a.ids, False) if a is not None else None for a in axes])


@rule("channel_shuffle native_channel_shuffle")
def channel_shuffle(flow: Flow, op: Op) -> None:
    """View (groups, width), transpose, flatten."""
    shape = flow.shape(op.args[0])
    groups = op.args[1]
    split = (shape[0], groups, shape[1] // groups, *shape[2:])
    axes = reshape(flow, flow.of(op.args[0]), shape, split)
    turned = (split[0], split[2], split[1], *split[3:])
    flow.block([axes[1]], f"the number of groups is fixed in {flow.where}")
    axes[1], axes[2] = axes[2], axes[1]
    flow.set(reshape(flow, axes, turned, shape))
