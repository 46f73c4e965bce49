"""The decisions of gates: predictor, k winners by bisection on the bits of their saliencies, prefixes."""

from __future__ import annotations

from llvmlite import ir

from secateur.runtime.engine.emit import F32, I32, I64, PTR, Emit, Value

BLOCK = 4  # vectors of outputs that a matrix-vector product keeps in registers
AHEAD = 12  # active inputs whose weights are asked for in advance

LINEAR = (
    "in_data",  # floats, by channel, row, column
    "in_plane",
    "pitch",
    "height",
    "width",
    "in_ids",
    "in_count",
    "compact",  # 1: value number a of the list lies at a, not at its channel
    "weights_at",  # (blocks of outputs, channels * height * width, outputs of a block) float32
    "inputs",  # channels * height * width
    "bias_at",
    "padded",  # outputs, rounded up to whole blocks
    "floor",
    "out_data",
)
WIN = (
    "saliency",
    "padded",
    "units",
    "k",
    "out_ids",
    "out_count",
    "scales",
    "shifts",
    "rows",
    "dst",
    "scale_at",  # constants of the batch norm, per channel
    "shift_at",
    "weights_at",
    "row_bytes",
    "dst_data",
    "dst_plane",
)
PREFIX = ("layer", "sizes_at", "out_count", "groups")


def linear(module: ir.Module, lanes: int) -> ir.Function:
    """Write out = max(floor, bias + sum over active inputs of x * row of weights)."""
    e = Emit(module, "linear", [PTR, PTR], lanes)
    desc, ws = e.function.args
    f = {name: e.field(desc, number) for number, name in enumerate(LINEAR)}
    weights, bias = (e.b.inttoptr(f[n], PTR) for n in ("weights_at", "bias_at"))
    data, ids, out = (e.at(ws, f[n]) for n in ("in_data", "in_ids", "out_data"))
    count = e.get(e.at(ws, f["in_count"]), I64(0), I64)
    low = e.splat(e.b.bitcast(e.b.trunc(f["floor"], I32), F32))
    pixels, size = e.b.mul(f["height"], f["width"]), I64(BLOCK * lanes)
    with e.loop(I64(0), f["padded"], BLOCK * lanes) as (j, _):
        begin = [e.vload(bias, e.b.add(j, I64(v * lanes))) for v in range(BLOCK)]
        block = e.at(weights, e.b.mul(e.b.mul(e.b.udiv(j, size), f["inputs"]), size), F32)
        with e.loop(I64(0), count, 1, *begin) as (a, acc):
            far = e.b.add(a, I64(AHEAD))
            near = e.b.select(e.b.icmp_signed("<", far, count), far, a)
            soon = e.b.sext(e.get(ids, near, I32), I64)
            later = e.at(block, e.b.mul(e.b.mul(soon, pixels), size), F32)
            for v in range(BLOCK):
                e.prefetch(e.at(later, I64(v * lanes), F32))
            channel = e.b.sext(e.get(ids, a, I32), I64)
            place = e.b.select(e.b.icmp_signed("!=", f["compact"], I64(0)), a, channel)
            plane = e.at(data, e.b.mul(place, f["in_plane"]))
            row = e.at(block, e.b.mul(e.b.mul(channel, pixels), size), F32)
            with e.loop(I64(0), f["height"], 1, *acc) as (y, inner):
                line = e.at(plane, e.b.mul(y, f["pitch"]))
                with e.loop(I64(0), f["width"], 1, *inner) as (x, last):
                    number = e.b.add(e.b.mul(y, f["width"]), x)
                    here = e.at(row, e.b.mul(number, size), F32)
                    value = e.splat(e.get(line, x, F32))
                    last[:] = [e.fma(value, e.vload(here, I64(v * lanes)), last[v]) for v in range(BLOCK)]
                inner[:] = last
            acc[:] = inner
        for v in range(BLOCK):
            y = e.b.select(e.b.fcmp_ordered("<", acc[v], low), low, acc[v])
            e.vstore(y, out, e.b.add(j, I64(v * lanes)))
    e.b.ret_void()
    return e.function


def win(module: ir.Module, lanes: int) -> ir.Function:
    """Write the selection of the k largest saliencies (>= 0; of equal ones the lower index) and their lists."""
    e = Emit(module, "win", [PTR, PTR], lanes)
    desc, ws = e.function.args
    f = {name: e.field(desc, number) for number, name in enumerate(WIN)}
    bits = e.at(ws, f["saliency"])
    limit = _threshold(e, bits, f["padded"], f["units"], f["k"])
    above = _count(e, bits, f["padded"], f["units"], e.b.add(limit, I32(1)))
    lists = {n: e.at(ws, f[n]) for n in ("out_ids", "scales", "shifts", "rows", "dst")}
    scale, shift = (e.b.inttoptr(f[n], PTR) for n in ("scale_at", "shift_at"))
    with e.loop(I64(0), f["units"], 1, I64(0), e.b.sub(f["k"], above)) as (c, carried):
        place, ties = carried
        raw = e.get(bits, c, I32)
        equal = e.b.and_(e.b.icmp_signed("==", raw, limit), e.b.icmp_signed(">", ties, I64(0)))
        wins = e.b.or_(e.b.icmp_signed(">", raw, limit), equal)
        pi = e.b.bitcast(raw, F32)
        e.put(e.b.trunc(c, I32), lists["out_ids"], place)  # a loser is overwritten by the next winner
        e.put(e.b.fmul(pi, e.get(scale, c, F32)), lists["scales"], place)
        e.put(e.b.fmul(pi, e.get(shift, c, F32)), lists["shifts"], place)
        e.put(e.b.add(f["weights_at"], e.b.mul(c, f["row_bytes"])), lists["rows"], place)
        e.put(e.b.add(f["dst_data"], e.b.mul(c, f["dst_plane"])), lists["dst"], place)
        carried[0] = e.b.add(place, e.b.zext(wins, I64))
        carried[1] = e.b.sub(ties, e.b.zext(equal, I64))
    e.put(f["k"], e.at(ws, f["out_count"]), I64(0))
    e.b.ret_void()
    return e.function


def _count(e: Emit, bits: Value, padded: Value, units: Value, limit: Value) -> Value:
    """Return how many of the first ``units`` saliencies have bits of at least ``limit``."""
    ints = ir.VectorType(I32, e.lanes)
    least = e.splat(limit)
    mask = ir.IntType(e.lanes)
    with e.loop(I64(0), padded, e.lanes, I64(0)) as (j, total):
        raw = e.b.load(e.at(bits, j, I32), typ=ints, align=4)
        hits = e.b.bitcast(e.b.icmp_signed(">=", raw, least), mask)
        number = e.intrinsic(f"llvm.ctpop.i{e.lanes}", mask, [hits])
        total[0] = e.b.add(total[0], e.b.zext(number, I64))
    return total[0]


def _threshold(e: Emit, bits: Value, padded: Value, units: Value, k: Value) -> Value:
    """Return the bits of the k-th largest saliency, from the highest bit down (floats >= 0 order like integers).

    First the bits are cleaned: signs go (of NaN), what is behind the last unit becomes -1 and never counts.
    """
    with e.loop(I64(0), units, 1) as (c, _):
        e.put(e.b.and_(e.get(bits, c, I32), I32(0x7FFFFFFF)), bits, c)
    with e.loop(units, padded, 1) as (c, _):
        e.put(I32(-1), bits, c)
    with e.loop(I64(0), I64(31), 1, I32(0)) as (step, found):
        bit = e.b.shl(I32(1), e.b.trunc(e.b.sub(I64(30), step), I32))
        tried = e.b.or_(found[0], bit)
        enough = e.b.icmp_signed(">=", _count(e, bits, padded, units, tried), k)
        found[0] = e.b.select(enough, tried, found[0])
    return found[0]


def prefix(module: ir.Module, lanes: int) -> ir.Function:
    """Write the number of channels that the action of a layer computes; the lists of a prefix never change.

    The third word of the workspace points at the actions of the sample, or is 0: everything is computed.
    """
    e = Emit(module, "prefix", [PTR, PTR], lanes)
    desc, ws = e.function.args
    f = {name: e.field(desc, number) for number, name in enumerate(PREFIX)}
    actions = e.get(ws, I64(2), I64)
    given = e.b.icmp_signed("!=", actions, I64(0))
    safe = e.b.select(given, e.b.inttoptr(actions, PTR), ws)
    action = e.b.select(given, e.get(safe, e.b.select(given, f["layer"], I64(0)), I64), f["groups"])
    size = e.get(e.b.inttoptr(f["sizes_at"], PTR), e.b.sub(action, I64(1)), I64)
    e.put(size, e.at(ws, f["out_count"]), I64(0))
    e.b.ret_void()
    return e.function
