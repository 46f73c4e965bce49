"""Copies: images into padded planes, planes into phases for strided convolutions, results out."""

from __future__ import annotations

from llvmlite import ir

from secateur.runtime.engine.emit import F32, I32, I64, PTR, Emit, Value

LAYOUT = (
    "src",  # bytes from the workspace, or -1: the image, whose address is the first word of the workspace
    "src_plane",
    "src_pitch",
    "ids",
    "count",
    "height",
    "width",
    "stride_y",
    "stride_x",
    "dst",
    "dst_plane",
    "dst_phase",
    "dst_pitch",
)
STORE = ("data", "plane", "pitch", "height", "width", "ids", "count", "units", "offset")


def layout(module: ir.Module, lanes: int) -> ir.Function:
    """Write every active plane into stride_y x stride_x phase planes: pixel (y, x) to phase (y % sy, x % sx)."""
    e = Emit(module, "layout", [PTR, PTR], lanes)
    desc, ws = e.function.args
    f = {name: e.field(desc, number) for number, name in enumerate(LAYOUT)}
    image = e.b.inttoptr(e.get(ws, I64(0), I64), PTR)
    src = e.b.select(e.b.icmp_signed("==", f["src"], I64(-1)), image, e.at(ws, f["src"]))
    dst, ids = e.at(ws, f["dst"]), e.at(ws, f["ids"])
    count = e.get(e.at(ws, f["count"]), I64(0), I64)
    phase = e.b.mul(f["stride_x"], f["dst_phase"])
    with e.loop(I64(0), count, 1) as (a, _):
        channel = e.b.sext(e.get(ids, a, I32), I64)
        plane, to = e.at(src, e.b.mul(channel, f["src_plane"])), e.at(dst, e.b.mul(channel, f["dst_plane"]))
        with e.loop(I64(0), f["height"], 1, I64(0), I64(0)) as (y, place):  # of the row: its phase, where it lies there
            line = e.at(plane, e.b.mul(y, f["src_pitch"]))
            row = e.at(to, e.b.add(e.b.mul(place[0], phase), place[1]))
            _row(e, f, line, row)
            next_phase, below = e.b.add(place[0], I64(1)), e.b.add(place[1], f["dst_pitch"])
            around = e.b.icmp_signed("==", next_phase, f["stride_y"])
            place[:] = [e.b.select(around, I64(0), next_phase), e.b.select(around, below, place[1])]
    e.b.ret_void()
    return e.function


def _row(e: Emit, f: dict[str, Value], line: Value, row: Value) -> None:
    """Copy one row: as it is, split into even and odd columns, or one pixel at a time for other strides."""
    plain, halves, others, done = (e.function.append_basic_block(n) for n in ("plain", "halves", "others", "copied"))
    cases = e.b.switch(f["stride_x"], others)
    cases.add_case(I64(1), plain)
    cases.add_case(I64(2), halves)
    width, lanes = f["width"], e.lanes
    e.b.position_at_end(plain)
    whole = e.b.and_(width, I64(-lanes))
    with e.loop(I64(0), whole, lanes) as (x, _):
        e.vstore(e.vload(line, x), row, x)
    with e.loop(whole, width, lanes) as (x, _):
        inside = _below(e, e.b.sub(width, x))
        e.give(e.take(line, x, inside), row, x, inside)
    e.b.branch(done)
    e.b.position_at_end(halves)
    whole = e.b.and_(width, I64(-2 * lanes))
    with e.loop(I64(0), whole, 2 * lanes) as (x, _):
        pair = e.vload(line, x), e.vload(line, e.b.add(x, I64(lanes)))
        for odd in (0, 1):
            at = e.at(row, f["dst_phase"]) if odd else row
            e.vstore(_every_other(e, pair, odd), at, e.b.sdiv(x, I64(2)))
    with e.loop(whole, width, 2 * lanes) as (x, _):
        left = e.b.sub(width, x)
        first = e.take(line, x, _below(e, left))
        second = e.take(line, e.b.add(x, I64(lanes)), _below(e, e.b.sub(left, I64(lanes))))
        for odd in (0, 1):
            number = e.b.sdiv(e.b.add(left, I64(1 - odd)), I64(2))
            at = e.at(row, f["dst_phase"]) if odd else row
            e.give(_every_other(e, (first, second), odd), at, e.b.sdiv(x, I64(2)), _below(e, number))
    e.b.branch(done)
    e.b.position_at_end(others)
    with e.loop(I64(0), width, 1) as (x, _):
        at = e.at(row, e.b.mul(e.b.urem(x, f["stride_x"]), f["dst_phase"]))
        e.put(e.get(line, x, F32), at, e.b.udiv(x, f["stride_x"]))
    e.b.branch(done)
    e.b.position_at_end(done)


def _every_other(e: Emit, pair: tuple[Value, Value], odd: int) -> Value:
    """Return the even or the odd lanes of two vectors."""
    order = ir.Constant(ir.VectorType(I32, e.lanes), [2 * i + odd for i in range(e.lanes)])
    return e.b.shuffle_vector(*pair, order)


def _below(e: Emit, limit: Value) -> Value:
    """Return a mask of the lanes whose number is below ``limit``."""
    numbers = ir.Constant(ir.VectorType(I32, e.lanes), list(range(e.lanes)))
    return e.b.icmp_signed("<", numbers, e.splat(e.b.trunc(limit, I32)))


def store(module: ir.Module, lanes: int) -> ir.Function:
    """Write a value out: every channel, row and column; channels that are not active are zeros."""
    e = Emit(module, "store", [PTR, PTR], lanes)
    desc, ws = e.function.args
    f = {name: e.field(desc, number) for number, name in enumerate(STORE)}
    out = e.at(e.b.inttoptr(e.get(ws, I64(1), I64), PTR), f["offset"])
    size = e.b.mul(f["height"], f["width"])
    with e.loop(I64(0), e.b.mul(f["units"], size), 1) as (i, _):
        e.put(F32(0.0), out, i)
    data, ids = e.at(ws, f["data"]), e.at(ws, f["ids"])
    with e.loop(I64(0), e.get(e.at(ws, f["count"]), I64(0), I64), 1) as (a, _):
        channel = e.b.sext(e.get(ids, a, I32), I64)
        plane = e.at(data, e.b.mul(channel, f["plane"]))
        begin = e.b.mul(channel, size)
        with e.loop(I64(0), f["height"], 1) as (y, _):
            line = e.at(plane, e.b.mul(y, f["pitch"]))
            place = e.b.add(begin, e.b.mul(y, f["width"]))
            with e.loop(I64(0), f["width"], 1) as (x, _):
                e.put(e.get(line, x, F32), out, e.b.add(place, x))
    e.b.ret_void()
    return e.function
