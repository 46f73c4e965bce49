"""The micro-kernel: a register tile of R output channels times V vectors of output pixels.

For every entry k of the input list (one active input channel and one tap of the kernel) the tile loads V vectors of
pixels at ``address of k`` and multiplies them with R weights, each broadcast to all lanes: no gather, no packing.
Then the epilogue: y = a * S + T + residual, floor (0 for ReLU, -inf without), masked store (the columns between the
rows of a plane stay 0).

Other kinds of tiles serve maps whose rows touch: ``tight`` masks the pixels of each tap.  3 x 3 kernels on maps of
2 x 2 (``corner``) and 4 x 4 (``quad``) need few weights at a time, and loading them one by one would take longer than
the arithmetic.  So lane 4 p + q is output pixel p times input pixel q of four: the weights of a row of the kernel, or
of all, are loaded at once and brought into that order; the lanes of a pixel are summed at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from secateur.runtime.engine.emit import F32, I16, I32, I64, PTR, Emit, Value

WIDTHS = (3, 2, 1)
KINDS = ("wide", "tight", "corner", "quad")
Size = tuple[int, int, str]


def heights(lanes: int, kind: str) -> tuple[int, ...]:
    """Return the tile heights that fit the registers: 32 vectors of 16 lanes, or 16 of 8."""
    return (8, 4, 2, 1) if lanes == 16 and kind != "quad" else (4, 2, 1)


def sizes(lanes: int) -> list[Size]:
    """Return (height, width, kind) of all tiles."""
    plain = [(h, w, kind) for kind in KINDS[:2] for w in WIDTHS for h in heights(lanes, kind)]
    return plain + [(h, 1, kind) for kind in KINDS[2:] for h in heights(lanes, kind) if lanes == 16]


def tile(module: ir.Module, lanes: int, height: int, width: int, kind: str) -> ir.Function:
    """Write the micro-kernel of ``height`` outputs and ``width`` vectors.

    Arguments: workspace, list of entries, its length, first lane, the arrays of S, T, row address, destination
    offset and residual offset from the first output on, the row addresses of the next tile (its weights are asked
    for meanwhile), floor, masks.  An entry is (input offset, weight offset) in bytes, int32.  Of a ``tight`` plane it
    says too which lanes the tap leaves inside their row: (input offset, weight offset, bits, 0).  Of a ``corner`` and
    a ``quad`` it stands for all taps of a channel.
    """
    e = Emit(module, f"tile_{height}x{width}_{kind}", [PTR, PTR, I64, I64, *[PTR] * 6, F32, PTR], lanes)
    ws, entries, count, lane, scales, shifts, rows, dst, res, soon, floor, masks = e.function.args
    b = e.b
    base = e.at(ws, lane, F32)
    row = [e.get(rows, I64(r), PTR) for r in range(height)]
    following = [e.get(soon, I64(r), PTR) for r in range(height)]
    sums = 4 if kind == "quad" else width  # vectors per output
    with e.loop(I64(0), count, 1, *[e.floats(0.0)] * (height * sums)) as (k, acc):
        pair = b.shl(k, I64(2 if kind == "tight" else 1))
        x_at = e.at(base, b.sext(e.get(entries, pair, I32), I64))
        w_at = b.sext(e.get(entries, b.or_(pair, I64(1)), I32), I64)
        weights = [e.at(row[r], w_at) for r in range(height)]
        if kind == "quad":
            _ask(e, [e.at(n, w_at) for n in following])
            _quads(e, x_at, weights, acc)
        elif kind == "corner":
            _corners(e, x_at, weights, acc)
        else:
            if height > 1 and width < 3:  # over the entries of a channel, each output's turn comes
                e.prefetch(e.at(e.get(soon, b.and_(k, I64(height - 1)), PTR), w_at))
            bits = e.get(entries, b.or_(pair, I64(2)), I32) if kind == "tight" else None
            _broadcasts(e, x_at, weights, acc, bits)
    if kind in KINDS[2:]:
        acc = [_summed(e, acc[sums * r : sums * (r + 1)]) for r in range(height)]
    _finish(e, acc, width, (ws, lane, scales, shifts, dst, res, floor, masks))
    b.ret_void()
    return e.function


def _ask(e: Emit, weights: list[Value]) -> None:
    """Ask for the nine weights at each address."""
    for at in weights:
        e.prefetch(at)
        e.prefetch(e.at(at, I64(4 * 9 - 1)))


def _finish(e: Emit, acc: list[Value], width: int, state: tuple[Value, ...]) -> None:
    """Scale, shift, add, floor and store the sums, ``width`` vectors per output."""
    ws, lane, scales, shifts, dst, res, floor, masks = state
    b, low = e.b, e.splat(floor)
    first = b.udiv(lane, I64(e.lanes))
    bits = [e.get(masks, b.add(first, I64(v)), I16) for v in range(width)]
    for r in range(len(acc) // width):
        scale, shift = e.splat(e.get(scales, I64(r), F32)), e.splat(e.get(shifts, I64(r), F32))
        to, add = (e.at(ws, e.get(array, I64(r), I64)) for array in (dst, res))
        for v in range(width):
            at = b.add(lane, I64(e.lanes * v))
            y = b.fadd(e.fma(acc[r * width + v], scale, shift), e.vload(add, at))
            y = b.select(b.fcmp_ordered("<", y, low), low, y)  # NaN stays NaN, like in torch
            e.masked(y, to, at, bits[v])


def _broadcasts(e: Emit, x_at: Value, weights: list[Value], acc: list[Value], bits: Value | None) -> None:
    """Multiply vectors of pixels (those with ``bits`` alone) with one weight per output."""
    width = len(acc) // len(weights)
    if bits is None:
        x = [e.vload(x_at, I64(e.lanes * v)) for v in range(width)]
    else:
        x = [e.take(x_at, I64(e.lanes * v), e.bools(bits)) for v in range(width)]
    for r, at in enumerate(weights):
        w = e.splat(e.b.load(at, typ=F32))
        for v in range(width):
            acc[r * width + v] = e.fma(x[v], w, acc[r * width + v])


def _corners(e: Emit, x_at: Value, weights: list[Value], acc: list[Value]) -> None:
    """Multiply the four pixels of a channel with all nine weights; each pixel meets each output pixel."""
    steps = [(q // 2 - p // 2 + 1, q % 2 - p % 2 + 1) for p in range(4) for q in range(4)]
    x = _four(e, x_at)
    for r, at in enumerate(weights):
        w = e.b.load(at, typ=e.vector, align=4)
        acc[r] = e.fma(x, _shuffle(e, w, [3 * down + right for down, right in steps]), acc[r])


def _quads(e: Emit, x_at: Value, weights: list[Value], acc: list[Value]) -> None:
    """Multiply the four rows of a channel with the three rows of the kernel; ``acc`` are four rows per output."""
    rows = [_four(e, e.at(x_at, I64(4 * y), F32)) for y in range(4)]
    reach = [q - p + 1 for p in range(4) for q in range(4)]
    for r, at in enumerate(weights):
        w = e.b.load(at, typ=e.vector, align=4)
        for down in range(3):
            turned = _shuffle(e, w, [3 * down + right if 0 <= right < 3 else 16 for right in reach])
            for y in range(4):
                if 0 <= y + down - 1 < 4:
                    acc[4 * r + y] = e.fma(rows[y + down - 1], turned, acc[4 * r + y])


def _shuffle(e: Emit, vector: Value, order: Sequence[int]) -> Value:
    """Return the lanes of ``vector`` in this order; the lanes behind its end are zeros."""
    kind = ir.VectorType(I32, len(order))
    zeros = ir.Constant(vector.type, None)
    return e.b.shuffle_vector(vector, zeros, ir.Constant(kind, list(order)))


def _four(e: Emit, address: Value) -> Value:
    """Load four pixels into every four lanes."""
    return _shuffle(e, e.b.load(address, typ=ir.VectorType(F32, 4), align=4), [lane % 4 for lane in range(16)])


def _summed(e: Emit, vectors: list[Value]) -> Value:
    """Return the sums of every four lanes of the vectors, one after another."""
    out = None
    for number, vector in enumerate(vectors):
        for step in (1, 2):
            vector = e.b.fadd(vector, _shuffle(e, vector, [lane ^ step for lane in range(16)]))
        order = [4 * (lane % 4) if lane // 4 == number else 16 for lane in range(16)]
        here = _shuffle(e, vector, order)
        out = here if out is None else e.b.fadd(out, here)
    return out
