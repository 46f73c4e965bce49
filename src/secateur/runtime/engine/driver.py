"""The whole network in one call: a loop over samples, a loop over a table of descriptors, a switch."""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from secateur.runtime.engine import choose, control, convolve, move, planes, pointwise
from secateur.runtime.engine.emit import I64, PTR, Emit
from secateur.runtime.engine.tile import sizes as tile_sizes
from secateur.runtime.engine.tile import tile

WORDS = 24  # int64 per descriptor: the number of the operator, then its fields
OPERATORS: dict[str, tuple[str, ...]] = {
    "convolve": convolve.FIELDS,
    "linear": choose.LINEAR,
    "win": choose.WIN,
    "prefix": choose.PREFIX,
    "gru": control.GRU,
    "decide": control.DECIDE,
    "stats": planes.STATS,
    "window": planes.WINDOW,
    "union": planes.UNION,
    "add": planes.ADD,
    "ids": planes.IDS,
    "times": pointwise.TIMES,
    **dict.fromkeys(pointwise.CURVES, pointwise.CURVE),
    "layout": move.LAYOUT,
    "store": move.STORE,
}
SIMPLE: dict[str, Callable[[ir.Module, int], ir.Function]] = {
    "linear": choose.linear,
    "win": choose.win,
    "prefix": choose.prefix,
    "gru": control.gru,
    "decide": control.decide,
    "stats": planes.stats,
    "window": planes.window,
    "union": planes.union,
    "add": planes.add,
    "ids": planes.ids,
    "times": pointwise.times,
    **{name: pointwise.curve(name) for name in pointwise.CURVES},
    "layout": move.layout,
    "store": move.store,
}


def source(lanes: int, triple: str) -> str:
    """Return the engine as LLVM text: ``run(table, length, workspace, image, result, actions, sizes, samples)``.

    ``sizes`` are three int64: bytes from image to image, result to result, actions to actions.
    """
    module = ir.Module("secateur")
    module.triple = triple
    tiles = {size: tile(module, lanes, *size) for size in tile_sizes(lanes)}
    functions = {"convolve": convolve.convolve(module, lanes, tiles)}
    functions |= {name: write(module, lanes) for name, write in SIMPLE.items()}
    e = Emit(module, "run", [PTR, I64, PTR, PTR, PTR, PTR, PTR, I64], lanes)
    e.function.linkage = "external"
    table, length, ws, image, result, actions, sizes, samples = e.function.args
    given = e.b.icmp_signed("!=", e.b.ptrtoint(actions, I64), I64(0))
    steps = [e.field(sizes, number) for number in range(3)]
    with e.loop(I64(0), samples, 1) as (n, _):
        for word, (base, step) in enumerate(zip((image, result, actions), steps, strict=True)):
            address = e.b.add(e.b.ptrtoint(base, I64), e.b.mul(n, step))
            e.put(e.b.select(given, address, I64(0)) if word == 2 else address, ws, I64(word))
        with e.loop(I64(0), length, 1) as (i, _):
            desc = e.at(table, e.b.mul(i, I64(8 * WORDS)))
            fields = e.at(desc, I64(8))
            done = e.function.append_basic_block("next")
            cases = e.b.switch(e.field(desc, 0), done)
            for number, name in enumerate(OPERATORS):
                block = e.function.append_basic_block(name)
                cases.add_case(I64(number), block)
                e.b.position_at_end(block)
                e.b.call(functions[name], [fields, ws])
                e.b.branch(done)
            e.b.position_at_end(done)
    e.b.ret_void()
    return str(module)
