"""A convolution over active channels: the list of inputs, then tiles over outputs and pixels."""

from __future__ import annotations

from collections.abc import Mapping

from llvmlite import ir

from secateur.runtime.engine.emit import F32, I32, I64, PTR, Emit, Value
from secateur.runtime.engine.team import helper, share
from secateur.runtime.engine.tile import KINDS, Size

# fields of the descriptor (int64 each); *_at are absolute addresses, the others bytes from the workspace or numbers
FIELDS = (
    "in_data",  # pixel (0, 0) of plane 0
    "in_plane",  # bytes from plane to plane
    "in_ids",  # int32, ascending
    "in_count",
    "taps_at",  # int32 byte offsets, one per tap
    "tap_count",
    "entries",  # scratch for the list
    "out_ids",
    "out_count",
    "scales",
    "shifts",
    "rows",
    "dst",
    "res",
    "floor",  # bits of a float32
    "masks_at",  # int16, one per vector of lanes
    "vectors",
    "groups",
    "in_per_group",
    "out_per_group",
    "kind",  # of the tiles: its number in KINDS
    "tap_masks_at",  # int32, one per tap
    "weight_step",  # bytes from channel to channel in a row of weights
)
Tiles = Mapping[Size, ir.Function]


def convolve(module: ir.Module, lanes: int, tiles: Tiles) -> ir.Function:
    """Write ``convolve(descriptor, workspace)``, group after group; see ``FIELDS``."""
    cover = _cover(module, lanes, tiles)
    helper(module, lanes, cover)
    core = _core(module, lanes, cover)
    e = Emit(module, "convolve", [PTR, PTR], lanes)
    desc, ws = e.function.args
    f = {name: e.field(desc, number) for number, name in enumerate(FIELDS)}
    n_in, n_out = (e.get(e.at(ws, f[n]), I64(0), I64) for n in ("in_count", "out_count"))
    with e.loop(I64(0), f["groups"], 1, I64(0), I64(0)) as (g, begin):
        upto = [e.b.mul(e.b.add(g, I64(1)), f[n]) for n in ("in_per_group", "out_per_group")]
        ends = [
            _reach(e, e.at(ws, f[ids]), start, count, limit)
            for ids, start, count, limit in zip(("in_ids", "out_ids"), begin, (n_in, n_out), upto, strict=True)
        ]
        e.b.call(core, [desc, ws, begin[0], ends[0], begin[1], ends[1], e.b.mul(g, f["in_per_group"])])
        begin[:] = ends
    e.b.ret_void()
    return e.function


def _reach(e: Emit, ids: Value, begin: Value, count: Value, limit: Value) -> Value:
    """Return how far the ascending ``ids`` stay below ``limit``: the end of a group's share of a list."""
    with e.loop(begin, count, 1, begin) as (i, end):
        inside = e.b.icmp_signed("<", e.b.sext(e.get(ids, i, I32), I64), limit)
        end[0] = e.b.add(end[0], e.b.zext(inside, I64))
    return end[0]


def _core(module: ir.Module, lanes: int, cover: ir.Function) -> ir.Function:
    """Write the convolution of inputs [a, b) of the list with outputs [c, d), weights counted from channel ``base``."""
    e = Emit(module, "convolve_group", [PTR, PTR, *[I64] * 5], lanes)
    desc, ws, in_begin, in_end, done, n_out, base = e.function.args
    f = {name: e.field(desc, number) for number, name in enumerate(FIELDS)}
    at = {n: e.at(ws, f[n]) for n in ("in_ids", "entries")}
    length = _entries(e, f, at["in_ids"], in_begin, in_end, base, at["entries"])
    share(e, ws, (desc, length, done, n_out), cover)
    e.b.ret_void()
    return e.function


def _cover(module: ir.Module, lanes: int, tiles: Tiles) -> ir.Function:
    """Write ``cover(descriptor, workspace, length of the list, first output, end)``: tiles over outputs and pixels."""
    e = Emit(module, "cover", [PTR, PTR, I64, I64, I64], lanes)
    desc, ws, length, done, n_out = e.function.args
    f = {name: e.field(desc, number) for number, name in enumerate(FIELDS)}
    end = e.function.append_basic_block("end")
    cases = e.b.switch(f["kind"], end)
    for number, kind in enumerate(KINDS):
        chosen = {(h, w): function for (h, w, k), function in tiles.items() if k == kind}
        if chosen:
            block = e.function.append_basic_block(kind)
            cases.add_case(I64(number), block)
            e.b.position_at_end(block)
            _lay(e, f, (ws, length, done, n_out), chosen)
            e.b.branch(end)
    e.b.position_at_end(end)
    e.b.ret_void()
    return e.function


def _lay(
    e: Emit,
    f: Mapping[str, Value],
    state: tuple[Value, ...],
    tiles: Mapping[tuple[int, int], ir.Function],
) -> None:
    """Lay the tallest tiles first, for the rest smaller ones."""
    ws, length, done, n_out = state
    at = {n: e.at(ws, f[n]) for n in ("entries", "scales", "shifts", "rows", "dst", "res")}
    masks = e.b.inttoptr(f["masks_at"], PTR)
    floor = e.b.bitcast(e.b.trunc(f["floor"], I32), F32)
    for height, widths in _widths(tiles).items():
        size = I64(height)
        end = e.b.add(done, e.b.mul(e.b.sdiv(e.b.sub(n_out, done), size), size))
        with e.loop(done, end, height) as (o, _):
            lists = [e.at(at[n], o, kind) for n, kind in (("scales", F32), ("shifts", F32), ("rows", I64))]
            lists += [e.at(at[n], o, I64) for n in ("dst", "res")]
            more = e.b.icmp_signed("<=", e.b.add(o, I64(2 * height)), end)
            lists.append(e.at(at["rows"], e.b.select(more, e.b.add(o, size), o), I64))  # not beyond the end
            lane: Value = I64(0)
            for width in widths:
                stop = e.b.add(lane, e.b.mul(_tiles(e, f["vectors"], lane, width), I64(width * e.lanes)))
                with e.loop(lane, stop, width * e.lanes) as (first, _):
                    e.b.call(tiles[height, width], [ws, at["entries"], length, first, *lists, floor, masks])
                lane = stop
        done = end


def _widths(tiles: Mapping[tuple[int, int], ir.Function]) -> dict[int, list[int]]:
    """Return the widths of the tiles of each height, both falling."""
    return {
        h: sorted((w for other, w in tiles if other == h), reverse=True) for h in sorted({h for h, _ in tiles})[::-1]
    }


def _tiles(e: Emit, vectors: Value, lane: Value, width: int) -> Value:
    """Return how many tiles of ``width`` to lay from ``lane`` on; 4 vectors are 2 + 2, as a lone one starves."""
    left = e.b.sub(vectors, e.b.sdiv(lane, I64(e.lanes)))
    number = e.b.sdiv(left, I64(width))
    if width < 3:
        return number
    lone = e.b.icmp_signed("==", e.b.srem(left, I64(3)), I64(1))
    return e.b.select(e.b.and_(lone, e.b.icmp_signed(">", number, I64(0))), e.b.sub(number, I64(1)), number)


def _entries(e: Emit, f: Mapping[str, Value], ids: Value, begin: Value, end: Value, base: Value, to: Value) -> Value:
    """Write (input offset, weight offset) of every active channel and tap; return their number."""
    taps, masks = (e.b.inttoptr(f[n], PTR) for n in ("taps_at", "tap_masks_at"))
    tight = e.b.icmp_signed("==", f["kind"], I64(KINDS.index("tight")))
    bits = e.b.select(tight, I64(2), I64(1))  # log2 of the int32 per entry
    with e.loop(begin, end, 1, I64(0)) as (a, carried):
        channel = e.b.sext(e.get(ids, a, I32), I64)
        plane = e.b.add(f["in_data"], e.b.mul(channel, f["in_plane"]))
        weight = e.b.mul(e.b.sub(channel, base), f["weight_step"])
        first = carried[0]
        with e.loop(I64(0), f["tap_count"], 1) as (t, _):
            place = e.b.shl(e.b.add(first, t), bits)
            offset = e.b.add(plane, e.b.sext(e.get(taps, t, I32), I64))
            e.put(e.b.trunc(offset, I32), to, place)
            e.put(e.b.trunc(e.b.add(weight, e.b.shl(t, I64(2))), I32), to, e.b.or_(place, I64(1)))
            # of a wide entry, the next one overwrites this; the list has room behind its end
            e.put(e.get(masks, t, I32), to, e.b.add(place, I64(2)))
        carried[0] = e.b.add(first, f["tap_count"])
    return carried[0]
