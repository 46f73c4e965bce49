"""The controller of runtime neural pruning in native code: the recurrent cell, and the choice of a prefix."""

from __future__ import annotations

import math

from llvmlite import ir

from secateur.runtime.engine.emit import F32, I32, I64, PTR, Emit, Value

GRU = ("inputs", "states", "hidden", "state", "first")  # first: 1 where no layer has been decided about yet
DECIDE = ("values", "groups", "sizes_at", "out_count")
LIMIT = 87.0  # exp of more, or of less than its negative, is no normal float32


def gru(module: ir.Module, lanes: int) -> ir.Function:
    """Write h = (1 - z) n + z h, with r, z = sigmoid(i + s), n = tanh(i_n + r s_n) from products i and s (3 H each)."""
    e = Emit(module, "gru", [PTR, PTR], lanes)
    desc, ws = e.function.args
    f = {name: e.field(desc, number) for number, name in enumerate(GRU)}
    state, size = e.at(ws, f["state"]), f["hidden"]
    one = e.floats(1.0)
    fresh = e.b.icmp_signed("!=", f["first"], I64(0))
    with e.loop(I64(0), size, lanes) as (j, _):
        i, s = ([e.vload(e.at(ws, f[n]), e.b.add(j, e.b.mul(size, I64(part)))) for part in range(3)]
                for n in ("inputs", "states"))  # fmt: skip
        r, z = (sigmoid(e, e.b.fadd(i[part], s[part])) for part in range(2))
        twice = e.b.fmul(e.floats(2.0), e.fma(r, s[2], i[2]))
        n = e.b.fsub(e.b.fmul(e.floats(2.0), sigmoid(e, twice)), one)  # tanh
        before = e.b.select(fresh, e.floats(0.0), e.vload(state, j))
        e.vstore(e.fma(z, before, e.b.fmul(e.b.fsub(one, z), n)), state, j)
    e.b.ret_void()
    return e.function


def sigmoid(e: Emit, x: Value) -> Value:
    """Return 1 / (1 + exp(-x)); NaN stays NaN."""
    one = e.floats(1.0)
    return e.b.fdiv(one, e.b.fadd(one, _exp(e, e.b.fneg(x))))


def _exp(e: Emit, x: Value) -> Value:
    """Return exp(x), x cut to +- ``LIMIT``: 2^k from the exponent bits, the rest from its series; off by 2e-7."""
    for limit, way in ((LIMIT, ">"), (-LIMIT, "<")):
        x = e.b.select(e.b.fcmp_ordered(way, x, e.floats(limit)), e.floats(limit), x)
    known = f"llvm.rint.v{e.lanes}f32"
    k = e.intrinsic(known, e.vector, [e.b.fmul(x, e.floats(math.log2(math.e)))])
    high = 0.693359375  # ln 2 in two parts: products of this one are exact
    rest = e.fma(k, e.floats(-high), x)
    rest = e.fma(k, e.floats(high - math.log(2)), rest)
    value = e.floats(1 / math.factorial(7))
    for power in range(6, -1, -1):
        value = e.fma(value, rest, e.floats(1 / math.factorial(power)))
    ints = ir.VectorType(I32, e.lanes)
    whole = e.b.fptosi(e.b.select(e.b.fcmp_unordered("uno", x, x), e.floats(0.0), k), ints)
    bits = e.b.shl(e.b.add(whole, e.splat(I32(127))), e.splat(I32(23)))
    return e.b.fmul(value, e.b.bitcast(bits, e.vector))


def decide(module: ir.Module, lanes: int) -> ir.Function:
    """Write the number of channels of the best action: the largest value, of equal ones the lower action."""
    e = Emit(module, "decide", [PTR, PTR], lanes)
    desc, ws = e.function.args
    f = {name: e.field(desc, number) for number, name in enumerate(DECIDE)}
    values = e.at(ws, f["values"])
    first = e.get(values, I64(0), F32)
    with e.loop(I64(1), f["groups"], 1, I64(0), first) as (i, best):
        value = e.get(values, i, F32)
        better = e.b.fcmp_ordered(">", value, best[1])
        best[:] = [e.b.select(better, i, best[0]), e.b.select(better, value, best[1])]
    size = e.get(e.b.inttoptr(f["sizes_at"], PTR), best[0], I64)
    e.put(size, e.at(ws, f["out_count"]), I64(0))
    e.b.ret_void()
    return e.function
