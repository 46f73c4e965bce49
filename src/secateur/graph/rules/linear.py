"""Matrix products and convolutions: merge over the contracted axis, units of the weight on the output axis."""

from __future__ import annotations

import numpy as np

from secateur.graph.cells import KERNEL
from secateur.graph.flow import Axes, Axis, Flow
from secateur.graph.rules.norm import tie_grouped
from secateur.graph.rules.table import arg, base_name, rule
from secateur.graph.trace import Op, Ref

Grid = list[np.ndarray | None]


def _contract(flow: Flow, a: Axis | None, b: Axis | None) -> None:
    """Tie two contracted axes; exact when a dead unit is zero on at least one side."""
    both = flow.tie(a, b)
    if both is not None and not ((a is not None and a.zero) or (b is not None and b.zero)):
        flow.mix(both)
    for axis in (a, b):
        flow.role(axis, "in")


def _out(axis: Axis | None) -> Axis | None:
    return Axis(axis.ids, axis.zero) if axis is not None else None


def _add_bias(flow: Flow, bias: Ref, out: Axes) -> Axes:
    own = flow.of(bias)
    shape = flow.shape(bias)
    for k in range(1, min(len(own), len(out)) + 1):
        axis, mine = out[-k], own[-k]
        if axis is None and mine is None:
            continue
        if shape[-k] == 1:  # one number added to every unit: a dead unit is no longer zero
            out[-k] = Axis(axis.ids, False) if axis is not None else None
            continue
        tied = flow.tie(axis, mine)
        flow.role(mine, "along")
        zero = axis is not None and axis.zero and mine is not None and mine.zero
        out[-k] = Axis(tied.ids, zero) if tied is not None else None
    return out


def _product(flow: Flow, a: Ref, b: Ref) -> Axes:
    """(..., m, k) x (..., k, n) with equal batch axes."""
    left, right = flow.of(a), flow.of(b)
    shape_a, shape_b = flow.shape(a), flow.shape(b)
    rank = len(shape_a)
    _contract(flow, left[-1], right[-2])
    batch: Axes = []
    for k in range(rank - 2):
        x, y = left[k], right[k]
        tied = flow.tie(x, y)
        if tied is not None:
            # every batched product counts, with weights (experts) or between activations (heads)
            flow.cells.mark_heads(tied.ids)
            zero = (x is not None and x.zero) or (y is not None and y.zero)
            batch.append(Axis(tied.ids, zero))
        else:
            batch.append(None)
    flow.role(left[-2], "out")
    flow.role(right[-1], "out")
    sizes = [(batch[k], shape_a[k]) for k in range(rank - 2)]
    flow.cost(1.0, *sizes, (left[-2], shape_a[-2]), (left[-1] or right[-2], shape_a[-1]), (right[-1], shape_b[-1]))
    return [*batch, _out(left[-2]), _out(right[-1])]


@rule("mm bmm")
def matmul(flow: Flow, op: Op) -> None:
    """Plain product."""
    flow.set(_product(flow, op.args[0], op.args[1]))


@rule("addmm baddbmm")
def addmm(flow: Flow, op: Op) -> None:
    """Product plus a broadcast bias."""
    flow.set(_add_bias(flow, op.args[0], _product(flow, op.args[1], op.args[2])))


@rule("_grouped_mm")
def grouped_matmul(flow: Flow, op: Op) -> None:
    """Rows (tokens) sorted by expert times one matrix per expert (experts, k, n); experts keep their numbers."""
    a, b = op.args[0], op.args[1]
    left, right = flow.of(a), flow.of(b)
    if len(left) != 2 or len(right) != 3:
        flow.block([*left, *right])
        return
    flow.block([right[0]], f"experts are chosen by number in {flow.where}")
    _contract(flow, left[1], right[1])
    flow.role(right[2], "out")
    flow.cost(float(flow.shape(a)[0]), (right[1], flow.shape(b)[1]), (right[2], flow.shape(b)[2]))
    out: Axes = [left[0], _out(right[2])]
    bias = arg(op, 3, "bias")
    flow.set(_add_bias(flow, bias, out) if isinstance(bias, Ref) else out)


@rule("_cdist_forward _euclidean_dist")
def distances(flow: Flow, op: Op) -> None:
    """Distances between rows of x (..., p, m) and y (..., r, m): m is contracted, dead units add nothing."""
    left, right = flow.of(op.args[0]), flow.of(op.args[1])
    both = flow.tie(left[-1], right[-1])
    if not all(axis is not None and axis.zero for axis in (left[-1], right[-1])):
        flow.mix(both)
    batch = [flow.tie(a, b) for a, b in zip(left[:-2], right[:-2], strict=True)]
    out = [*batch, left[-2], right[-2]]
    flow.set([Axis(a.ids, False) if a is not None else None for a in out])


@rule("mv dot vdot addmv")
def vector_product(flow: Flow, op: Op) -> None:
    """Matrix (or vector) times vector."""
    shift = 1 if base_name(op.target) == "aten::addmv" else 0
    a, b = op.args[shift], op.args[shift + 1]
    left, right = flow.of(a), flow.of(b)
    _contract(flow, left[-1], right[0])
    flow.cost(1.0, *zip(left, flow.shape(a), strict=True))
    out: Axes = [_out(left[0])] if len(left) == 2 else []
    if len(left) == 2:
        flow.role(left[0], "out")
    flow.set(_add_bias(flow, op.args[0], out) if shift else out)


@rule("linear mkldnn_linear _mkldnn_linear")
def linear(flow: Flow, op: Op) -> None:
    """x (..., i) times weight (o, i)."""
    x, w = op.args[0], op.args[1]
    axes, weight = flow.of(x), flow.of(w)
    _contract(flow, axes[-1], weight[1])
    flow.role(weight[0], "out")
    sizes = list(zip(axes[:-1], flow.shape(x)[:-1], strict=True))
    flow.cost(1.0, *sizes, (weight[0], flow.shape(w)[0]), (weight[1] or axes[-1], flow.shape(w)[1]))
    out = [*axes[:-1], _out(weight[0])]
    bias = arg(op, 2, "bias")
    flow.set(_add_bias(flow, bias, out) if isinstance(bias, Ref) else out)


@rule("convolution _convolution conv1d conv2d conv3d mkldnn_convolution convolution_overrideable thnn_conv2d")
def convolution(flow: Flow, op: Op) -> None:
    """Channel axes of input and weight meet; grouped weights keep a (groups, width) grid."""
    x, w, bias = op.args[0], op.args[1], op.args[2]
    transposed = bool(op.args[6]) if base_name(op.target) in ("aten::convolution", "aten::_convolution") else False
    groups = op.args[8] if base_name(op.target) in ("aten::convolution", "aten::_convolution") else op.args[6]
    axes, weight = flow.of(x), flow.of(w)
    shape_w, shape_x, shape_o = flow.shape(w), flow.shape(x), flow.shape(op.outs[0])
    batched = len(shape_x) == len(shape_w)
    at = 1 if batched else 0
    pointwise = all(n == 1 for n in shape_w[2:]) and shape_o[at + 1 :] == shape_x[at + 1 :]
    if not pointwise:
        flow.block(axes[at + 1 :], f"spatial axes of {flow.where}")
    for axis in weight[2:]:
        if axis is not None:
            flow.cells.freeze(axis.ids, KERNEL)
            flow.role(axis, "kernel")
    inner, outer = (weight[0], weight[1]) if transposed else (weight[1], weight[0])
    out = convolve_channels(flow, axes[at], inner, outer, (groups, transposed, shape_x[at], shape_o[at]))
    kernel = 1.0
    for size in shape_w[2:]:
        kernel *= size
    positions = kernel * (shape_x[0] if batched else 1)
    for size in (shape_x if transposed else shape_o)[at + 1 :]:
        positions *= size
    flow.cost(positions, (weight[0], shape_w[0]), (weight[1], shape_w[1]))
    zero = not isinstance(bias, Ref)
    others = [Axis(a.ids, a.zero and zero) if a is not None else None for a in axes]
    spatial: Axes = others[at + 1 :] if pointwise else [None] * (len(shape_o) - at - 1)
    head = others[:at]
    if isinstance(bias, Ref):
        out = _add_bias(flow, bias, [out])[0]
    flow.set([*head, out, *spatial])


def convolve_channels(
    flow: Flow, axis: Axis | None, inner: Axis | None, outer: Axis | None, sizes: tuple[int, bool, int, int]
) -> Axis | None:
    """Tie the channels of a convolution; returns the output channels.

    ``inner`` is the weight axis summed over, ``outer`` the one that makes outputs; ``sizes`` is (groups,
    transposed, input channels, output channels).
    """
    groups, transposed, channels_in, channels_out = sizes
    flow.role(inner, "in")
    flow.role(outer, "out")
    if groups == 1:
        _contract(flow, axis, inner)
        return _out(outer)
    whole_in, whole_out = (inner, None) if transposed else (axis, outer)
    if transposed:
        # weight (channels in, outputs per group): the outputs are a (groups, width) grid without own parameter
        flow.tie(axis, inner)
        out_ids = flow.cells.fresh(channels_out)
        whole_out = Axis(out_ids, True)
    per_in, per_out = channels_in // groups, channels_out // groups
    grid_in = tie_grouped(flow, whole_in, groups, per_in) if whole_in is not None else [None, None]
    grid_out = tie_grouped(flow, whole_out, groups, per_out) if whole_out is not None else [None, None]
    side = (grid_out[1], outer) if transposed else (grid_in[1], inner)
    if side[0] is not None and side[1] is not None:
        flow.cells.union(side[0], side[1].ids)
    elif side[1] is not None:
        flow.block([side[1]])
    _tie_groups(flow, whole_in, whole_out, (grid_in, grid_out), (per_in, per_out))
    return Axis(whole_out.ids, True) if whole_out is not None else None


def _tie_groups(
    flow: Flow, whole_in: Axis | None, whole_out: Axis | None, grids: tuple[Grid, Grid], widths: tuple[int, int]
) -> None:
    """Whole groups go on both sides together: tie the group factors of input and output."""
    (grid_in, grid_out), (per_in, per_out) = grids, widths
    first_in = grid_in[0] if per_in > 1 else (whole_in.ids if whole_in is not None else None)
    first_out = grid_out[0] if per_out > 1 else (whole_out.ids if whole_out is not None else None)
    if first_in is not None and first_out is not None:
        flow.tie(Axis(first_in), Axis(first_out))
        return
    for ids in (first_in, first_out):
        if ids is not None:
            flow.cells.freeze(ids, f"groups of {flow.where} meet fixed channels")


@rule("torchvision::deform_conv2d")
def deformable(flow: Flow, op: Op) -> None:
    """Like a convolution; the channels of offsets and masks have fixed meanings."""
    x, w, offset, mask, bias = op.args[:5]
    for ref in (offset, mask):
        flow.block(flow.of(ref), f"offsets of {flow.where}")
    axes, weight = flow.of(x), flow.of(w)
    shape_w, shape_o = flow.shape(w), flow.shape(op.outs[0])
    for axis in weight[2:]:
        if axis is not None:
            flow.cells.freeze(axis.ids, KERNEL)
            flow.role(axis, "kernel")
    groups, offset_groups = op.args[11], op.args[12]
    if offset_groups > 1:
        flow.block([axes[1]], f"offset groups of {flow.where}")
    out = convolve_channels(flow, axes[1], weight[1], weight[0], (groups, False, flow.shape(x)[1], shape_w[0]))
    flow.cost(
        float(shape_w[2] * shape_w[3] * shape_o[0] * shape_o[2] * shape_o[3]),
        (weight[0], shape_w[0]),
        (weight[1], shape_w[1]),
    )
    if isinstance(bias, Ref):
        out = _add_bias(flow, bias, [out])[0]
    flow.set([None, out, None, None])


@rule("_trilinear")
def trilinear(flow: Flow, op: Op) -> None:
    """nn.Bilinear: axes that are expanded are broadcast, the summed ones are contracted."""
    refs = op.args[:3]
    expands, summed = op.args[3:6], set(op.args[6])
    rank = len(flow.shape(refs[0])) + len(expands[0])
    aligned: list[Axes] = []
    for ref, expand in zip(refs, expands, strict=True):
        own = list(flow.of(ref))
        for k in sorted(expand):
            own.insert(k, None)
        aligned.append(own)
    out: Axes = []
    for k in range(rank):
        held = [axes[k] for axes, expand in zip(aligned, expands, strict=True) if k not in expand]
        axis = held[0]
        for other in held[1:]:
            axis = flow.tie(axis, other)
        if k in summed:
            if axis is not None and not any(a is not None and a.zero for a in held):
                flow.mix(axis)
            for a in held:
                flow.role(a, "in")
        else:
            for a in held:
                flow.role(a, "out")
            out.append(Axis(axis.ids, any(a is not None and a.zero for a in held)) if axis is not None else None)
    weight = list(zip(flow.of(refs[1]), flow.shape(refs[1]), strict=True))
    flow.cost(float(flow.shape(refs[0])[0]), *weight)
    flow.set(out)
