"""Work on each pixel for itself: activations, and maps times one number per channel (squeeze and excitation)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llvmlite import ir

from secateur.runtime.engine.control import sigmoid
from secateur.runtime.engine.emit import F32, I16, I32, I64, PTR, Emit, Value

CURVE = ("data", "plane", "ids", "count", "vectors", "masks_at", "out_data", "out_plane", "slope")
TIMES = ("data", "plane", "ids", "count", "vectors", "masks_at", "by", "by_plane", "out_data", "out_plane")
Curve = Callable[[Emit, Value, Value], Value]  # of the numbers and of the slope, both vectors


def _hard(e: Emit, x: Value) -> Value:
    """Return x / 6 + 1/2, cut to 0 and 1."""
    y = e.fma(x, e.floats(1 / 6), e.floats(0.5))
    for limit, way in ((0.0, "<"), (1.0, ">")):
        y = e.b.select(e.b.fcmp_ordered(way, y, e.floats(limit)), e.floats(limit), y)
    return y


def _tanh(e: Emit, x: Value) -> Value:
    return e.fma(e.floats(2.0), sigmoid(e, e.b.fmul(e.floats(2.0), x)), e.floats(-1.0))


def _leaky(e: Emit, x: Value, slope: Value) -> Value:
    return e.b.select(e.b.fcmp_ordered("<", x, e.floats(0.0)), e.b.fmul(x, slope), x)


CURVES: Mapping[str, Curve] = {
    "sigmoid": lambda e, x, _: sigmoid(e, x),
    "silu": lambda e, x, _: e.b.fmul(x, sigmoid(e, x)),
    "hardsigmoid": lambda e, x, _: _hard(e, x),
    "hardswish": lambda e, x, _: e.b.fmul(x, _hard(e, x)),
    "tanh": lambda e, x, _: _tanh(e, x),
    "leaky_relu": _leaky,
}


def curve(name: str) -> Callable[[ir.Module, int], ir.Function]:
    """Return what writes the operator that applies the activation ``name`` to every active plane."""

    def write(module: ir.Module, lanes: int) -> ir.Function:
        e = Emit(module, name, [PTR, PTR], lanes)
        desc, ws = e.function.args
        f = {field: e.field(desc, number) for number, field in enumerate(CURVE)}
        slope = e.splat(e.b.bitcast(e.b.trunc(f["slope"], I32), F32))
        _planes(e, ws, f, lambda channel: lambda x: CURVES[name](e, x, slope))
        return e.function

    return write


def times(module: ir.Module, lanes: int) -> ir.Function:
    """Write every active plane times the number of its channel."""
    e = Emit(module, "times", [PTR, PTR], lanes)
    desc, ws = e.function.args
    f = {field: e.field(desc, number) for number, field in enumerate(TIMES)}

    def scaling(channel: Value) -> Callable[[Value], Value]:
        place = e.at(ws, e.b.add(f["by"], e.b.mul(channel, f["by_plane"])))
        factor = e.splat(e.get(place, I64(0), F32))
        return lambda x: e.b.fmul(x, factor)

    _planes(e, ws, f, scaling)
    return e.function


def _planes(e: Emit, ws: Value, f: Mapping[str, Value], made: Callable[[Value], Callable[[Value], Value]]) -> None:
    """Write what ``made`` of a channel makes of its pixels, for every active plane."""
    data, ids, out = (e.at(ws, f[n]) for n in ("data", "ids", "out_data"))
    masks = e.b.inttoptr(f["masks_at"], PTR)
    with e.loop(I64(0), e.get(e.at(ws, f["count"]), I64(0), I64), 1) as (a, _):
        channel = e.b.sext(e.get(ids, a, I32), I64)
        plane, to = e.at(data, e.b.mul(channel, f["plane"])), e.at(out, e.b.mul(channel, f["out_plane"]))
        change = made(channel)
        with e.loop(I64(0), f["vectors"], 1) as (v, _):
            lane = e.b.mul(v, I64(e.lanes))
            e.masked(change(e.vload(plane, lane)), to, lane, e.get(masks, v, I16))
    e.b.ret_void()
