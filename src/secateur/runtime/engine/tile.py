"""The micro-kernel: a register tile of R output channels times V vectors of output pixels.

For every entry k of the input list (one active input channel and one tap of the kernel) the tile loads V vectors of
pixels at ``address of k`` and multiplies them with R weights, each broadcast to all lanes: no gather, no packing.
Then the epilogue: y = a * S + T + residual, floor (0 for ReLU, -inf without), masked store (the columns between the
rows of a plane stay 0).
"""

from __future__ import annotations

from llvmlite import ir

from secateur.runtime.engine.emit import F32, I16, I32, I64, PTR, Emit

HEIGHTS = (8, 4, 2, 1)
WIDTHS = (3, 2, 1)


def heights(lanes: int) -> tuple[int, ...]:
    """Return the tile heights that fit the registers: 32 vectors of 16 lanes, or 16 of 8."""
    return HEIGHTS if lanes == 16 else HEIGHTS[1:]


def tile(module: ir.Module, lanes: int, height: int, width: int, tight: bool) -> ir.Function:
    """Write the micro-kernel of ``height`` outputs and ``width`` vectors.

    Arguments: workspace, list of entries, its length, first lane, the arrays of S, T, row address, destination
    offset and residual offset from the first output on, floor, masks.  An entry is (input offset, weight offset) in
    bytes, int32.  Rows of a ``tight`` plane touch, so its entries say too which lanes the tap leaves inside their
    row: (input offset, weight offset, bits, 0).
    """
    e = Emit(
        module,
        f"tile_{height}x{width}{'_tight' if tight else ''}",
        [PTR, PTR, I64, I64, PTR, PTR, PTR, PTR, PTR, F32, PTR],
        lanes,
    )
    ws, entries, count, lane, scales, shifts, rows, dst, res, floor, masks = e.function.args
    b = e.b
    base = e.at(ws, lane, F32)
    row = [e.get(rows, I64(r), PTR) for r in range(height)]
    with e.loop(I64(0), count, 1, *[e.floats(0.0)] * (height * width)) as (k, acc):
        pair = b.shl(k, I64(2 if tight else 1))
        x_at = e.at(base, b.sext(e.get(entries, pair, I32), I64))
        w_at = b.sext(e.get(entries, b.or_(pair, I64(1)), I32), I64)
        if tight:
            inside = e.bools(e.get(entries, b.or_(pair, I64(2)), I32))
            x = [e.take(x_at, I64(lanes * v), inside) for v in range(width)]
        else:
            x = [e.vload(x_at, I64(lanes * v)) for v in range(width)]
        for r in range(height):
            w = e.splat(b.load(e.at(row[r], w_at), typ=F32))
            for v in range(width):
                acc[r * width + v] = e.fma(x[v], w, acc[r * width + v])
    low = e.splat(floor)
    first = b.udiv(lane, I64(lanes))
    bits = [e.get(masks, b.add(first, I64(v)), I16) for v in range(width)]
    for r in range(height):
        scale, shift = e.splat(e.get(scales, I64(r), F32)), e.splat(e.get(shifts, I64(r), F32))
        to, add = (e.at(ws, e.get(array, I64(r), I64)) for array in (dst, res))
        for v in range(width):
            at = b.add(lane, I64(lanes * v))
            y = b.fadd(e.fma(acc[r * width + v], scale, shift), e.vload(add, at))
            y = b.select(b.fcmp_ordered("<", y, low), low, y)  # NaN stays NaN, like in torch
            e.masked(y, to, at, bits[v])
    b.ret_void()
    return e.function
