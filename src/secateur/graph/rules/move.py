"""Movement operators: they move the unit arrays themselves."""

from __future__ import annotations

import numpy as np

from secateur.graph.cells import FIXED
from secateur.graph.flow import Axes, Axis, Flow
from secateur.graph.reshape import reshape
from secateur.graph.rules.table import arg, base_name, rule
from secateur.graph.trace import Op, Ref


def _first(flow: Flow, op: Op) -> tuple[Axes, tuple[int, ...]]:
    return list(flow.of(op.args[0])), flow.shape(op.args[0])


@rule("view _unsafe_view reshape _reshape_alias flatten unflatten squeeze unsqueeze view_as _reshape_copy")
def view(flow: Flow, op: Op) -> None:
    """Any change of shape in row-major order."""
    axes, shape = _first(flow, op)
    if op.outs[0] is None:
        return
    name, after = base_name(op.target), flow.shape(op.outs[0])
    if name in ("aten::squeeze", "aten::unsqueeze"):
        kept = [a for a, n in zip(axes, shape, strict=True) if n != 1]
        rest = iter(kept)
        flow.set([next(rest) if n != 1 else None for n in after])
        return
    if op.target == "aten::view.dtype":
        flow.block(axes)
        return
    flow.set(reshape(flow, axes, shape, after))


@rule("t transpose permute numpy_T swapaxes swapdims movedim moveaxis")
def permute(flow: Flow, op: Op) -> None:
    """Reorder axes."""
    axes, _ = _first(flow, op)
    name = base_name(op.target)
    if name in ("aten::t", "aten::numpy_T"):
        flow.set(axes[::-1])
    elif name == "aten::permute":
        flow.set([axes[d] for d in op.args[1]])
    elif name in ("aten::transpose", "aten::swapaxes", "aten::swapdims"):
        a, b = (d % max(len(axes), 1) for d in op.args[1:3])
        if axes:
            axes[a], axes[b] = axes[b], axes[a]
        flow.set(axes)
    else:
        flow.block(axes)


@rule("expand broadcast_to expand_as")
def expand(flow: Flow, op: Op) -> None:
    """Repeated axes are uniform: they take whatever units they meet."""
    axes, shape = _first(flow, op)
    after = flow.shape(op.outs[0])
    lead = len(after) - len(shape)
    out: Axes = []
    for k, size in enumerate(after):
        old = axes[k - lead] if k >= lead else None
        if old is None and size > 1 and (k < lead or shape[k - lead] == 1) and size <= 1 << 16:
            out.append(Axis(flow.cells.fresh(size), False, free=True))
        else:
            out.append(old)
    flow.set(out)


@rule("repeat tile")
def repeat(flow: Flow, op: Op) -> None:
    """Whole-axis repetition: the same units again; a repeated single position is uniform."""
    axes, shape = _first(flow, op)
    times = op.args[1]
    after = flow.shape(op.outs[0])
    lead = len(after) - len(shape)
    out: Axes = []
    for k, size in enumerate(after):
        n = times[k - (len(after) - len(times))] if k >= len(after) - len(times) else 1
        old = axes[k - lead] if k >= lead else None
        if old is not None:
            out.append(Axis(np.tile(old.ids, n), old.zero))
        elif size > 1 and (k < lead or shape[k - lead] == 1):
            out.append(Axis(flow.cells.fresh(size), False) if size <= 1 << 16 else None)
        else:
            out.append(None)
    flow.set(out)


@rule("repeat_interleave")
def repeat_interleave(flow: Flow, op: Op) -> None:
    """Element-wise repetition along one axis."""
    axes, _ = _first(flow, op)
    times, dim = arg(op, 1, "repeats"), arg(op, 2, "dim")
    if dim is None or not isinstance(times, int):
        flow.block(axes)
        return
    axis = axes[dim]
    axes[dim] = Axis(np.repeat(axis.ids, times), axis.zero) if axis is not None else None
    flow.set(axes)


@rule("slice narrow slice_copy")
def slice_(flow: Flow, op: Op) -> None:
    """A contiguous or strided part of one axis."""
    axes, shape = _first(flow, op)
    if base_name(op.target) == "aten::narrow":
        dim, start = op.args[1] % len(shape), op.args[2]
        stop, step = start + op.args[3], 1
    else:
        dim = arg(op, 1, "dim", 0) % len(shape)
        start, stop, step = arg(op, 2, "start"), arg(op, 3, "end"), arg(op, 4, "step", 1)
    axis = axes[dim]
    if any(isinstance(x, Ref) for x in (start, stop, step)):
        flow.block([axis], f"a bound of {flow.where} depends on values")
        axes[dim] = None
    elif axis is not None:
        where = slice(*slice(start, stop, step).indices(shape[dim]))
        ids = axis.ids[where]
        if step not in (None, 1):
            ids = _strided(flow, axis, shape[dim], step, where.start or 0)
        same = len(ids) == shape[dim]
        if not same:
            flow.cells.mark_part(ids)
        axes[dim] = axis if same else Axis(ids, axis.zero, axis.source)
    flow.set(axes)


def _strided(flow: Flow, axis: Axis, size: int, step: int, start: int) -> np.ndarray:
    """Every step-th position: whole strides go together, so that the same slice fits the smaller axis."""
    ids = axis.ids[start::step]
    if size % step or (axis.ids < 0).any():
        flow.block([axis], f"strided slice of {flow.where}")
        return ids
    rows = axis.ids.reshape(-1, step)
    flow.cells.union(rows[:, 1:], rows[:, :1])
    return ids


@rule("select unbind select_copy unbind_copy")
def select(flow: Flow, op: Op) -> None:
    """One position of an axis, or each of them: positions keep their meaning."""
    axes, shape = _first(flow, op)
    dim = arg(op, 1, "dim", 0) % len(shape)
    flow.block([axes[dim]], f"single positions are picked by {flow.where}")
    rest = axes[:dim] + axes[dim + 1 :]
    for n in range(len(op.outs)):
        flow.set(rest, n)


@rule("split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk tensor_split split_copy")
def split(flow: Flow, op: Op) -> None:
    """Consecutive parts of one axis."""
    axes, shape = _first(flow, op)
    dim = arg(op, 2, "dim", 0) % len(shape)
    start = 0
    axis = axes[dim]
    for n, index in enumerate(op.outs):
        if index is None:
            continue
        size = flow.shape(index)[dim]
        part = Axis(axis.ids[start : start + size], axis.zero, axis.source) if axis is not None else None
        if part is not None:
            flow.cells.mark_part(part.ids)
        flow.set([*axes[:dim], part, *axes[dim + 1 :]], n)
        start += size


def _aligned(flow: Flow, parts: list[Axes], skip: int) -> Axes:
    out: Axes = []
    for k in range(len(parts[0])):
        axis = parts[0][k]
        if k != skip:
            zero = axis is not None and axis.zero
            for other in parts[1:]:
                axis = flow.tie(axis, other[k])
                zero = zero and other[k] is not None and bool(other[k] and other[k].zero)  # type: ignore[union-attr]
            axis = Axis(axis.ids, zero) if axis is not None else None
        out.append(axis)
    return out


@rule("cat concat concatenate")
def cat(flow: Flow, op: Op) -> None:
    """Units one after the other; parts without units are fixed positions."""
    shapes = [flow.shape(ref) for ref in op.args[0]]
    refs = [ref for ref, shape in zip(op.args[0], shapes, strict=True) if shape != (0,)]
    rank = len(flow.shape(refs[0])) if refs else 0
    if not refs:
        return
    dim = arg(op, 1, "dim", 0) % rank
    parts = [flow.of(ref) for ref in refs]
    sizes = [flow.shape(ref)[dim] for ref in refs]
    out = _aligned(flow, parts, dim)
    held = [part[dim] for part in parts]
    if any(axis is not None for axis in held):
        ids = [
            axis.ids if axis is not None else np.full(n, FIXED, dtype=np.int64)
            for axis, n in zip(held, sizes, strict=True)
        ]
        zero = all(axis.zero for axis in held if axis is not None)
        out[dim] = Axis(np.concatenate(ids), zero)
    flow.set(out)


@rule("stack")
def stack(flow: Flow, op: Op) -> None:
    """A new axis of fixed positions; the others are tied."""
    parts = [flow.of(ref) for ref in op.args[0]]
    out = _aligned(flow, parts, -1)
    dim = arg(op, 1, "dim", 0) % (len(parts[0]) + 1)
    flow.set([*out[:dim], None, *out[dim:]])


@rule("flip")
def flip(flow: Flow, op: Op) -> None:
    """Reverse axes."""
    axes, _ = _first(flow, op)
    for dim in op.args[1]:
        axis = axes[dim]
        axes[dim] = Axis(axis.ids[::-1].copy(), axis.zero) if axis is not None else None
    flow.set(axes)


@rule("roll")
def roll(flow: Flow, op: Op) -> None:
    """Rotate axes; the shift is a size and follows the cut (``calls``)."""
    axes, _ = _first(flow, op)
    dims = arg(op, 2, "dims", [])
    if not dims:
        flow.block(axes)
        return
    for shift, dim in zip(op.args[1], dims, strict=True):
        axis = axes[dim]
        axes[dim] = Axis(np.roll(axis.ids, shift), axis.zero) if axis is not None else None
    flow.set(axes)


@rule("constant_pad_nd pad")
def pad(flow: Flow, op: Op) -> None:
    """Padding with a constant: the new positions are uniform and take the units they meet."""
    axes, shape = _first(flow, op)
    amounts = op.args[1]
    zero = arg(op, 2, "value", 0) == 0
    for k in range(len(amounts) // 2):
        dim = len(shape) - 1 - k
        before, after = amounts[2 * k], amounts[2 * k + 1]
        axis = axes[dim]
        if (before == 0 and after == 0) or axis is None:
            continue
        if before < 0 or after < 0:
            flow.block([axis])
            axes[dim] = None
            continue
        new = [flow.cells.fresh(before), axis.ids, flow.cells.fresh(after)]
        axes[dim] = Axis(np.concatenate(new), axis.zero and zero)
    flow.set(axes)


@rule("pixel_shuffle")
def pixel_shuffle(flow: Flow, op: Op) -> None:
    """(C r r, H, W) -> (C, H r, W r): the r x r positions of a channel go together."""
    axes, shape = _first(flow, op)
    r, at = op.args[1], len(shape) - 3
    channel = axes[at]
    flow.block(axes[at + 1 :])
    if channel is not None:
        grid = flow.cells.factor(channel.ids.reshape(-1, r * r), flow.where)
        if grid[1] is not None:
            flow.cells.freeze(grid[1], flow.where)
        axes[at] = Axis(grid[0], channel.zero) if grid[0] is not None else None
    flow.set([*axes[: at + 1], None, None])


@rule("pixel_unshuffle")
def pixel_unshuffle(flow: Flow, op: Op) -> None:
    """(C, H, W) -> (C r r, H / r, W / r): each channel is repeated r x r times."""
    axes, shape = _first(flow, op)
    r, at = op.args[1], len(shape) - 3
    channel = axes[at]
    flow.block(axes[at + 1 :])
    axes[at] = Axis(np.repeat(channel.ids, r * r), channel.zero) if channel is not None else None
    flow.set([*axes[: at + 1], None, None])


@rule("glu")
def glu(flow: Flow, op: Op) -> None:
    """First half times the sigmoid of the second: position i of both halves go together."""
    axes, shape = _first(flow, op)
    dim = arg(op, 1, "dim", -1)
    axis = axes[dim]
    if axis is not None:
        half = shape[dim] // 2
        a, b = Axis(axis.ids[:half], axis.zero), Axis(axis.ids[half:], axis.zero)
        axes[dim] = flow.tie(a, b)
    flow.set(axes)


@rule("as_strided as_strided_copy as_strided_scatter")
def as_strided(flow: Flow, op: Op) -> None:
    """Only a change of layout passes."""
    axes, shape = _first(flow, op)
    if tuple(op.args[1]) == shape:
        flow.set(axes)
    else:
        flow.block(axes)


@rule("slice_scatter select_scatter copy")
def copy(flow: Flow, op: Op) -> None:
    """``copy_``: the destination takes the units of the source."""
    axes, shape = _first(flow, op)
    if base_name(op.target) != "aten::copy":
        flow.block([*axes, *flow.of(op.args[1])])
        return
    source, own = flow.of(op.args[1]), flow.shape(op.args[1])
    out: Axes = []
    for k, size in enumerate(shape):
        at = k - len(shape) + len(own)
        other = source[at] if at >= 0 and own[at] == size else None
        if size > 1 and at >= 0 and own[at] == size:
            out.append(flow.tie(axes[k], other))
        else:
            out.append(axes[k])
    flow.set(out)
