"""Work on whole planes: one number per plane, windows of pooling, sums of two maps, lists of channels."""

from __future__ import annotations

from llvmlite import ir

from secateur.runtime.engine.emit import F32, I8, I16, I32, I64, PTR, Emit, Value

KINDS = ("l1", "avg", "l2", "max")

STATS = ("data", "plane", "ids", "count", "vectors", "masks_at", "kind", "pixels", "out", "compact")
WINDOW = (
    "data",
    "plane",
    "ids",
    "count",
    "taps_at",
    "tap_count",
    "vectors",
    "masks_at",
    "out_data",
    "out_plane",
    "maximum",  # 1: max, 0: sum times scale
    "scale",
    "floor",
    "ceiling",
)
UNION = ("a_ids", "a_count", "a_data", "a_plane", "b_ids", "b_count", "units", "flags", "zero", "ids", "count", "res")
UNION += ("only_ids", "only_count")  # channels of a that are not in b
ADD = ("a_ids", "a_count", "a_data", "a_plane", "b_ids", "b_count", "b_data", "b_plane", "units", "flags", "zero")
ADD += ("ids", "count", "data", "plane", "vectors", "masks_at", "floor")
IDS = ("src_ids", "src_count", "shift", "append", "ids", "count")


def stats(module: ir.Module, lanes: int) -> ir.Function:
    """Write one number per active plane: mean |x|, mean, root mean square or maximum of its pixels."""
    e = Emit(module, "stats", [PTR, PTR], lanes)
    desc, ws = e.function.args
    f = {name: e.field(desc, number) for number, name in enumerate(STATS)}
    data, ids, out = (e.at(ws, f[n]) for n in ("data", "ids", "out"))
    masks = e.b.inttoptr(f["masks_at"], PTR)
    count = e.get(e.at(ws, f["count"]), I64(0), I64)
    one = e.b.fdiv(F32(1.0), e.b.sitofp(f["pixels"], F32))
    kind = [e.b.icmp_signed("==", f["kind"], I64(number)) for number in range(len(KINDS))]
    start = e.b.select(kind[3], e.floats(float("-inf")), e.floats(0.0))
    with e.loop(I64(0), count, 1) as (a, _):
        channel = e.b.sext(e.get(ids, a, I32), I64)
        plane = e.at(data, e.b.mul(channel, f["plane"]))
        with e.loop(I64(0), f["vectors"], 1, start) as (v, acc):
            raw = e.vload(plane, e.b.mul(v, I64(lanes)))
            inside = e.bools(e.get(masks, v, I16))
            x = e.b.select(inside, raw, start)
            size = e.intrinsic(f"llvm.fabs.v{lanes}f32", e.vector, [x])
            term = e.b.select(kind[0], size, e.b.select(kind[2], e.b.fmul(x, x), x))
            larger = e.b.select(e.b.fcmp_ordered("<", term, acc[0]), acc[0], term)
            acc[0] = e.b.select(kind[3], larger, e.b.fadd(acc[0], term))
        total = e.b.fmul(e.sum(acc[0]), one)
        root = e.intrinsic("llvm.sqrt.f32", F32, [total])
        value = e.b.select(kind[3], _largest(e, acc[0]), e.b.select(kind[2], root, total))
        e.put(value, out, e.b.select(e.b.icmp_signed("!=", f["compact"], I64(0)), a, channel))
    e.b.ret_void()
    return e.function


def _largest(e: Emit, vector: Value) -> Value:
    return e.intrinsic(f"llvm.vector.reduce.fmax.v{e.lanes}f32", F32, [vector])


def window(module: ir.Module, lanes: int) -> ir.Function:
    """Write max or scaled sum over the taps of a window, for every active plane."""
    e = Emit(module, "window", [PTR, PTR], lanes)
    desc, ws = e.function.args
    f = {name: e.field(desc, number) for number, name in enumerate(WINDOW)}
    data, ids, out = (e.at(ws, f[n]) for n in ("data", "ids", "out_data"))
    taps, masks = (e.b.inttoptr(f[n], PTR) for n in ("taps_at", "masks_at"))
    count = e.get(e.at(ws, f["count"]), I64(0), I64)
    maximum = e.b.icmp_signed("!=", f["maximum"], I64(0))
    start = e.b.select(maximum, e.floats(float("-inf")), e.floats(0.0))
    scale, low, high = (e.splat(e.b.bitcast(e.b.trunc(f[n], I32), F32)) for n in ("scale", "floor", "ceiling"))
    with e.loop(I64(0), count, 1) as (a, _):
        channel = e.b.sext(e.get(ids, a, I32), I64)
        plane, to = e.at(data, e.b.mul(channel, f["plane"])), e.at(out, e.b.mul(channel, f["out_plane"]))
        with e.loop(I64(0), f["vectors"], 1) as (v, _):
            lane = e.b.mul(v, I64(lanes))
            with e.loop(I64(0), f["tap_count"], 1, start) as (t, acc):
                x = e.vload(e.at(plane, e.b.sext(e.get(taps, t, I32), I64)), lane)
                larger = e.b.select(e.b.fcmp_ordered("<", x, acc[0]), acc[0], x)
                acc[0] = e.b.select(maximum, larger, e.b.fadd(acc[0], x))
            y = e.b.fmul(acc[0], scale)
            y = e.b.select(e.b.fcmp_ordered("<", y, low), low, y)
            y = e.b.select(e.b.fcmp_ordered(">", y, high), high, y)
            e.masked(y, to, lane, e.get(masks, v, I16))
    e.b.ret_void()
    return e.function


def union(module: ir.Module, lanes: int) -> ir.Function:
    """Write the union of lists a and b, and for each of b where its residual lies: its plane of a, or zeros."""
    e = Emit(module, "union", [PTR, PTR], lanes)
    desc, ws = e.function.args
    f = {name: e.field(desc, number) for number, name in enumerate(UNION)}
    flags = _flag(e, ws, f)
    b_ids, res = e.at(ws, f["b_ids"]), e.at(ws, f["res"])
    with e.loop(I64(0), e.get(e.at(ws, f["b_count"]), I64(0), I64), 1) as (i, _):
        channel = e.b.sext(e.get(b_ids, i, I32), I64)
        both = e.b.icmp_signed("==", e.get(flags, channel, I8), I8(3))
        plane = e.b.add(f["a_data"], e.b.mul(channel, f["a_plane"]))
        e.put(e.b.select(both, plane, f["zero"]), res, i)
    _gather(e, ws, f, flags)
    only = e.at(ws, f["only_ids"])
    with e.loop(I64(0), f["units"], 1, I64(0)) as (c, place):
        e.put(e.b.trunc(c, I32), only, place[0])
        found = e.b.icmp_signed("==", e.get(flags, c, I8), I8(1))
        place[0] = e.b.add(place[0], e.b.zext(found, I64))
    e.put(place[0], e.at(ws, f["only_count"]), I64(0))
    e.b.ret_void()
    return e.function


def _flag(e: Emit, ws: Value, f: dict[str, Value]) -> Value:
    """Write a byte per channel: bit 0 is in list a, bit 1 in list b."""
    flags = e.at(ws, f["flags"])
    with e.loop(I64(0), f["units"], 1) as (c, _):
        e.put(I8(0), flags, c)
    for name, bit in (("a", 1), ("b", 2)):
        ids = e.at(ws, f[f"{name}_ids"])
        with e.loop(I64(0), e.get(e.at(ws, f[f"{name}_count"]), I64(0), I64), 1) as (i, _):
            channel = e.b.sext(e.get(ids, i, I32), I64)
            e.put(e.b.or_(e.get(flags, channel, I8), I8(bit)), flags, channel)
    return flags


def _gather(e: Emit, ws: Value, f: dict[str, Value], flags: Value) -> None:
    """Write the ascending list of channels with a flag."""
    ids = e.at(ws, f["ids"])
    with e.loop(I64(0), f["units"], 1, I64(0)) as (c, place):
        e.put(e.b.trunc(c, I32), ids, place[0])
        found = e.b.icmp_signed("!=", e.get(flags, c, I8), I8(0))
        place[0] = e.b.add(place[0], e.b.zext(found, I64))
    e.put(place[0], e.at(ws, f["count"]), I64(0))


def add(module: ir.Module, lanes: int) -> ir.Function:
    """Write out = max(floor, a + b) on the union of their channels; a plane that is not there counts as zeros."""
    e = Emit(module, "add", [PTR, PTR], lanes)
    desc, ws = e.function.args
    f = {name: e.field(desc, number) for number, name in enumerate(ADD)}
    flags = _flag(e, ws, f)
    _gather(e, ws, f, flags)
    masks, ids = e.b.inttoptr(f["masks_at"], PTR), e.at(ws, f["ids"])
    low = e.splat(e.b.bitcast(e.b.trunc(f["floor"], I32), F32))
    with e.loop(I64(0), e.get(e.at(ws, f["count"]), I64(0), I64), 1) as (i, _):
        channel = e.b.sext(e.get(ids, i, I32), I64)
        flag = e.get(flags, channel, I8)
        terms = []
        for name, bit in (("a", 1), ("b", 2)):
            there = e.b.icmp_signed("!=", e.b.and_(flag, I8(bit)), I8(0))
            plane = e.b.add(f[f"{name}_data"], e.b.mul(channel, f[f"{name}_plane"]))
            terms.append(e.at(ws, e.b.select(there, plane, f["zero"])))
        to = e.at(ws, e.b.add(f["data"], e.b.mul(channel, f["plane"])))
        with e.loop(I64(0), f["vectors"], 1) as (v, _):
            lane = e.b.mul(v, I64(lanes))
            y = e.b.fadd(*(e.vload(term, lane) for term in terms))
            y = e.b.select(e.b.fcmp_ordered("<", y, low), low, y)
            e.masked(y, to, lane, e.get(masks, v, I16))
    e.b.ret_void()
    return e.function


def ids(module: ir.Module, lanes: int) -> ir.Function:
    """Write a list of channels, shifted, over or behind another (concatenation)."""
    e = Emit(module, "ids", [PTR, PTR], lanes)
    desc, ws = e.function.args
    f = {name: e.field(desc, number) for number, name in enumerate(IDS)}
    total = e.at(ws, f["count"])
    begin = e.b.mul(e.get(total, I64(0), I64), f["append"])
    count = e.get(e.at(ws, f["src_count"]), I64(0), I64)
    src, to = e.at(ws, f["src_ids"]), e.at(ws, f["ids"])
    with e.loop(I64(0), count, 1) as (i, _):
        e.put(e.b.add(e.get(src, i, I32), e.b.trunc(f["shift"], I32)), to, e.b.add(begin, i))
    e.put(e.b.add(begin, count), total, I64(0))
    e.b.ret_void()
    return e.function
