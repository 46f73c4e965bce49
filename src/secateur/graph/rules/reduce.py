"""Reductions: over units they mix them, over other axes units pass."""

from __future__ import annotations

from secateur.graph.flow import Axes, Axis, Flow
from secateur.graph.rules.table import arg, base_name, rule
from secateur.graph.trace import Op


def _dims(op: Op, rank: int) -> set[int]:
    dims = arg(op, 1, "dim")
    if isinstance(dims, bool) or (dims is not None and not isinstance(dims, int | list | tuple)):
        dims = None
    if dims is None or dims == [] or dims == ():
        return set(range(rank))
    return {d % rank for d in ([dims] if isinstance(dims, int) else dims)} if rank else set()


def _reduced(flow: Flow, op: Op, axes: Axes, gone: set[int], zero_out: bool) -> None:
    for n, index in enumerate(op.outs):
        if index is None:
            continue
        keep = len(flow.shape(index)) == len(axes)
        out: Axes = []
        for k, axis in enumerate(axes):
            if k in gone:
                if keep:
                    out.append(None)
            else:
                out.append(Axis(axis.ids, axis.zero and zero_out) if axis is not None else None)
        flow.set(out, n)


@rule("sum nansum")
def total(flow: Flow, op: Op) -> None:
    """A sum over units is exact when dead units are zero."""
    axes = flow.of(op.args[0])
    gone = _dims(op, len(axes))
    for k in gone:
        axis = axes[k]
        if axis is not None and not axis.zero:
            flow.mix(axis)
    _reduced(flow, op, axes, gone, True)


@rule(
    "mean var std var_mean std_mean amax amin max min aminmax prod any all argmax argmin logsumexp median nanmedian "
    "norm_except_dim count_nonzero"
)
def statistic(flow: Flow, op: Op) -> None:
    """Means, variances, extremes: inexact over units."""
    axes = flow.of(op.args[0])
    name = base_name(op.target)
    if name in ("aten::max", "aten::min") and op.target.endswith(".other"):
        from secateur.graph.rules.point import pointwise

        pointwise(flow, op)
        return
    gone = _dims(op, len(axes))
    places = name in ("aten::argmax", "aten::argmin")
    if op.target.endswith((".dim", ".names_dim")) and len(op.outs) == 2:  # values and where they were found
        places = op.outs[1] in flow.recording.read or op.outs[1] in flow.recording.outputs
    for k in gone:
        axis = axes[k]
        if places:
            flow.block([axis], f"positions of units are results of {flow.where}")
        else:
            flow.mix(axis)
    _reduced(flow, op, axes, gone, name not in ("aten::logsumexp", "aten::any", "aten::all"))


@rule("cumsum cumprod cummax cummin logcumsumexp _cummax_helper _cummin_helper diff")
def running(flow: Flow, op: Op) -> None:
    """Running totals: position matters along their axis."""
    axes = list(flow.of(op.args[0]))
    dim = arg(op, 1, "dim", -1)
    if axes:
        flow.block([axes[dim]], f"positions are accumulated by {flow.where}")
        axes[dim] = None
    for n in range(len(op.outs)):
        flow.set(axes, n)
