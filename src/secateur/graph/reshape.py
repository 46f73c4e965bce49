"""How units pass through a change of shape: the smallest blocks of axes that map onto each other."""

from __future__ import annotations

import numpy as np

from secateur.graph.flow import Axes, Axis, Flow

MAX_BLOCK = 1 << 22  # positions of one folded axis; beyond it the units are frozen, not followed


def blocks(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Return minimal pairs (input axes, output axes) with equal products; axes of size 1 are left out.

    >>> blocks((2, 8, 9), (2, 2, 4, 9))
    [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    left = [i for i, n in enumerate(before) if n != 1]
    right = [j for j, n in enumerate(after) if n != 1]
    out: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(left) and j < len(right):
        ins, outs = [left[i]], [right[j]]
        a, b = before[left[i]], after[right[j]]
        i, j = i + 1, j + 1
        while a != b:
            if a < b and i < len(left):
                a *= before[left[i]]
                ins.append(left[i])
                i += 1
            elif j < len(right):
                b *= after[right[j]]
                outs.append(right[j])
                j += 1
            else:
                break
        out.append((ins, outs))
    return out


def reshape(flow: Flow, axes: Axes, before: tuple[int, ...], after: tuple[int, ...]) -> Axes:
    """Return the axes of a tensor of shape ``before`` viewed as ``after``.

    An axis that is split gets factor cells where units vary along more than one part (``Cells.factor``); axes
    that are merged get element cells (``Cells.product``); repeats along axes without units cost nothing.
    """
    out: Axes = [None] * len(after)
    if 0 in before:
        flow.block(axes)
        return out
    for ins, outs in blocks(before, after):
        if len(ins) == 1 and len(outs) == 1:
            out[outs[0]] = axes[ins[0]]
            continue
        with_units = [i for i in ins if (a := axes[i]) is not None and not a.free]
        if not with_units:
            if all(axes[i] is not None for i in ins):  # uniform before, uniform after
                for j in outs:
                    out[j] = Axis(flow.cells.fresh(after[j]), False, free=True)
            continue
        shape_in = tuple(before[i] for i in ins)
        if int(np.prod(shape_in)) > MAX_BLOCK:
            flow.block([axes[i] for i in ins], f"{flow.where} folds too many positions")
            continue
        zero = all(a.zero for i in with_units if (a := axes[i]) is not None)
        element = _element(flow, [axes[i] if i in with_units else None for i in ins], shape_in)
        if element is None:
            continue
        shape_out = tuple(after[j] for j in outs)
        factors = flow.cells.factor(element.reshape(shape_out), flow.where)
        for j, ids in zip(outs, factors, strict=True):
            if ids is not None:
                out[j] = Axis(ids, zero)
    return out


def _element(flow: Flow, axes: Axes, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return the cell of every position of a block of axes."""
    held = [(k, axis) for k, axis in enumerate(axes) if axis is not None]
    if len(held) == 1:
        k, axis = held[0]
        view = [1] * len(shape)
        view[k] = shape[k]
        return np.broadcast_to(axis.ids.reshape(view), shape)
    if any((axis.ids < 0).any() for _, axis in held):
        flow.block([axis for _, axis in held], f"{flow.where} folds units and fixed positions")
        return None
    element = flow.cells.product([axis.ids for _, axis in held], flow.where)
    view = [1] * len(shape)
    for k, _ in held:
        view[k] = shape[k]
    return np.broadcast_to(element.reshape(view), shape)
