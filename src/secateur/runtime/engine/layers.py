"""How each kind of layer becomes operators of the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from secateur.runtime.engine.lower import FLOORS, NO_CEILING, LooseError, Lowering, Number, bits
from secateur.runtime.engine.planes import KINDS
from secateur.runtime.engine.product import packed, padded, product
from secateur.runtime.engine.steering import Steering
from secateur.runtime.engine.stores import Store
from secateur.runtime.engine.tile import KINDS as TILES
from secateur.runtime.gates import FBS, Prefix
from secateur.runtime.nodes import OPEN, Node, Program
from secateur.types import EngineError

LIMIT = 1.25  # a pitch this much wider than needed is worth a copy
MARGIN = 16  # floats behind each row of weights
SMALL = {(2, 2): "corner", (4, 4): "quad"}  # tiles for 3 x 3 kernels on these maps


def lowered(program: Program, lanes: int, steering: Steering | None = None) -> tuple[Lowering, np.ndarray, np.ndarray]:
    """Return ``program`` as operators for vectors of ``lanes`` floats, their table, and the image of a workspace.

    ``steering`` decides in the place of the caller's actions.
    """
    try:
        low = lower(program, lanes, True, steering)
        return low, *low.finish()
    except LooseError:
        low = lower(program, lanes, False, steering)
        return low, *low.finish()


def lower(program: Program, lanes: int, tight: bool, steering: Steering | None) -> Lowering:
    """Return ``program`` as operators, with rows that touch where vectors hold whole rows if ``tight``."""
    program = joined(program)
    low = Lowering(program, lanes, may_be_tight=tight, steering=steering)
    for node in program.nodes:
        RULES[node.kind](low, node)
    value = program.result
    source, (ids, count) = low.value(value), low.list(value)
    units, height, width = program.shapes[value]
    low.step(
        "store", data=lambda: source.data, plane=lambda: source.plane, pitch=lambda: source.pitch,
        height=height, width=width, ids=ids, count=count, units=units, offset=0,
    )  # fmt: skip
    return low


def joined(program: Program) -> Program:
    """Join sums with the convolution before them: it adds onto the planes of the other branch, in their place.

    The other branch must exist by then, and nothing may read it later.
    """
    nodes: list[Node | None] = list(program.nodes)
    makers = {node.out: number for number, node in enumerate(program.nodes)}
    for number, node in enumerate(program.nodes):
        if node.kind != "add":
            continue
        for branch, other in (node.ins, node.ins[::-1]):
            maker = makers.get(branch, -1)
            conv = nodes[maker] if maker >= 0 else None
            free = conv is not None and conv.kind == "conv" and not conv.relu and conv.residual is None
            early = 0 <= makers.get(other, -1) < maker and other not in program.nodes[maker].ins
            alone = program.readers(branch) == [number]
            last = all(reader == number or reader < maker for reader in program.readers(other))
            if free and early and alone and last and conv is not None:
                nodes[maker] = replace(conv, residual=other, relu=node.relu, out=node.out)
                nodes[number] = None
                makers[node.out] = maker
                break
    return replace(program, nodes=tuple(node for node in nodes if node is not None))


def _taps(node: Node, source: Store, size: tuple[int, int], tight: bool = False) -> Callable[[], list[int]]:
    """Make the border of ``source`` wide enough for the kernel of ``node``; return its byte offsets, for later.

    ``tight`` needs no border at the sides.
    """
    places = []
    for axis in range(2):
        reach = np.arange(node.kernel[axis]) * node.dilation[axis] - node.padding[axis]
        places.append((reach % node.stride[axis], reach // node.stride[axis]))
    (phase_y, row), (phase_x, column) = places
    source.need((
        max(0, -int(row.min())), max(0, int(row.max()) + size[0] - source.height),
        0 if tight else max(0, -int(column.min())), 0 if tight else max(0, int(column.max()) + size[1] - source.width),
    ))  # fmt: skip

    def offsets() -> list[int]:
        phase = phase_y[:, None] * node.stride[1] + phase_x[None]
        return (phase * source.phase + row[:, None] * source.pitch + column[None] * 4).ravel().tolist()

    return offsets


def _kind(low: Lowering, node: Node, source: Store, size: tuple[int, int]) -> str:
    """Return the kind of tiles for a convolution from ``source`` to maps of ``size``."""
    if not low.may_be_tight or node.kernel[1] == 1 or source.width != size[1] or low.lanes % size[1]:
        return "wide"
    plain = node.stride == node.dilation == node.padding == (1, 1) and node.kernel == (3, 3)
    return SMALL.get(size, "tight") if plain and low.lanes == 16 else "tight"


def _inside(low: Lowering, node: Node, width: int) -> list[int]:
    """Return for each tap the bits of the lanes that it leaves inside their row of ``width`` pixels."""
    reach = (np.arange(node.kernel[1]) * node.dilation[1] - node.padding[1]) // node.stride[1]
    at = np.arange(low.lanes) % width + reach[:, None]
    row = ((at >= 0) & (at < width)) @ (1 << np.arange(low.lanes))
    return np.tile(row, node.kernel[0]).tolist()


def _conv(low: Lowering, node: Node) -> None:
    value = node.ins[0]
    units, height, width = low.program.shapes[node.out]
    inputs = low.program.shapes[value][0]
    source = low.phases(value, node.stride, 0.0, False)
    if low.widest(source) > LIMIT * (source.width + node.padding[1]):
        source = low.phases(value, node.stride, 0.0, True)
    kind = _kind(low, node, source, (height, width))
    taps = _taps(node, source, (height, width), kind != "wide")
    low.tight += [source] * (kind != "wide")
    dst = low.store(units, height, width) if node.residual is None else low.value(node.residual)
    low.plain[node.out] = dst
    dst.join(source)
    count, whole = node.kernel[0] * node.kernel[1], kind in SMALL.values()
    low.longest = max(low.longest, inputs * count)
    ids, length = low.list(value)
    lists = _outputs(low, node, dst)
    out = lists["out_ids"], lists["out_count"]
    if node.residual is None:
        res = low.after(8 * (units + 1), lambda: np.full(units + 1, low.zero, dtype=np.int64))
        low.lists[node.out] = only = out
    else:
        res, only = _union(low, node, out, dst)
    low.step(
        "convolve", **lists, **low.lanes_of(dst),
        in_data=lambda: source.data, in_plane=lambda: source.plane, in_ids=ids, in_count=length,
        taps_at=lambda: low.arena.constant([0] if whole else taps(), np.int32), tap_count=1 if whole else count,
        weight_step=4 * count, entries=lambda: low.entries, res=res, floor=FLOORS[node.relu], groups=node.groups,
        in_per_group=inputs // node.groups, out_per_group=units // node.groups, kind=TILES.index(kind),
        tap_masks_at=low.arena.constant(_inside(low, node, width) if kind == "tight" else [0] * count, np.int32),
    )  # fmt: skip
    if node.residual is not None and node.relu and not _positive(low.program, node.residual):
        _rectify(low, dst, only)


def _positive(program: Program, value: int) -> bool:
    """Is ``value`` never below zero?"""
    maker = next((node for node in program.nodes if node.out == value), None)
    if maker is None:
        return False
    if maker.kind == "clamp":
        return maker.low >= 0
    if maker.kind == "curve":
        return maker.curve in OPEN
    return maker.relu or (maker.kind in ("pool", "mean", "cat") and all(_positive(program, v) for v in maker.ins))


def _rectify(low: Lowering, store: Store, ids: tuple[int, int]) -> None:
    """Apply ReLU in place to the planes of the residual that no winner was added to."""
    low.step(
        "window", data=lambda: store.data, plane=lambda: store.plane, ids=ids[0], count=ids[1],
        taps_at=low.arena.constant([0], np.int32), tap_count=1, **low.lanes_of(store),
        out_data=lambda: store.data, out_plane=lambda: store.plane, maximum=1, scale=bits(1.0), floor=FLOORS[True],
        ceiling=NO_CEILING,
    )  # fmt: skip


def _union(low: Lowering, node: Node, out: tuple[int, int], dst: Store) -> tuple[int, tuple[int, int]]:
    """Add the step that finds the union of winners and residual.

    Returns where it writes the residual planes, and its list of channels that only the residual has.
    """
    units = low.program.shapes[node.out][0]
    a_ids, a_count = low.list(node.residual if node.residual is not None else -1)
    ids, count = low.arena.empty(units)
    res, only = low.arena.place(8 * (units + 1)), low.arena.empty(units)
    low.step(
        "union", a_ids=a_ids, a_count=a_count, a_data=lambda: dst.data, a_plane=lambda: dst.plane,
        b_ids=out[0], b_count=out[1], units=units, flags=low.arena.place(units), zero=lambda: low.zero,
        ids=ids, count=count, res=res, only_ids=only[0], only_count=only[1],
    )  # fmt: skip
    low.lists[node.out] = ids, count
    return res, only


def _outputs(low: Lowering, node: Node, dst: Store) -> dict[str, int]:
    """Return the lists of the outputs to compute: fixed, or written per sample by the gate's steps."""
    if node.weight is None or node.scale is None or node.shift is None:
        raise EngineError(f"the convolution {node.path!r} has no weights.")
    units = len(node.weight)
    rows = torch.nn.functional.pad(node.weight.detach().float().flatten(1), (0, MARGIN)).contiguous().numpy()
    address, step = low.arena.constant(rows, np.float32), rows.strides[0]
    scale, shift = node.scale.float().numpy(), node.shift.float().numpy()
    if isinstance(node.gate, FBS):
        return _winners(low, node, node.gate, dst, (address, step, scale, shift))
    ids, count = low.arena.full(units)
    if isinstance(node.gate, Prefix):
        gain = node.gate.gain.detach().float().numpy()
        scale, shift = scale * gain, shift * gain
        count = low.arena.array(np.array([units], dtype=np.int64))
        _prefix(low, node, node.gate, count)
    return {
        "out_ids": ids,
        "out_count": count,
        "scales": low.arena.array(scale.astype(np.float32)),
        "shifts": low.arena.array(shift.astype(np.float32)),
        "rows": low.arena.array(address + step * np.arange(units, dtype=np.int64)),
        "dst": low.after(8 * units, lambda: dst.data + dst.plane * np.arange(units, dtype=np.int64)),
    }


def _prefix(low: Lowering, node: Node, gate: Prefix, count: int) -> None:
    """Add the step that says how many channels run: the caller's action, or the controller's (none for the first)."""
    if low.steering is None:
        sizes = low.arena.constant(gate.sizes, np.int64)
        low.step("prefix", layer=low.actions, sizes_at=sizes, out_count=count, groups=gate.groups)
        low.actions += 1
    elif node.path in low.steering.paths:
        low.steering.step(low, node, gate, count)


def _winners(low: Lowering, node: Node, gate: FBS, dst: Store, rows: tuple[int, int, np.ndarray, np.ndarray]) -> dict:
    """Add the steps of an FBS gate: pool, predict, select."""
    value = node.ins[0]
    units = gate.predictor.out_features
    source, (ids, count) = low.phases(value, (1, 1), 0.0, False), low.list(value)  # planes, also of a vector
    pooled = low.arena.place(4 * (low.program.shapes[value][0] + low.lanes))
    low.step(
        "stats", data=lambda: source.data, plane=lambda: source.plane, ids=ids, count=count, **low.lanes_of(source),
        kind=KINDS.index(gate.pooling), pixels=source.height * source.width, out=pooled, compact=1,
    )  # fmt: skip
    weight, bias = gate.predictor.weight.detach().float().numpy(), gate.predictor.bias.detach().float().numpy()
    saliency = low.arena.place(4 * padded(low, units))
    product(low, weight.T, bias, True, saliency, **packed(pooled, ids, count))
    out_ids, out_count = low.arena.empty(units)
    address, step, scale, shift = rows
    lists = {"out_ids": out_ids, "out_count": out_count}
    lists |= {name: low.arena.place(size * (units + 1)) for name, size in SIZES.items()}
    low.step(
        "win", **lists, saliency=saliency, padded=padded(low, units), units=units, k=gate.k,
        scale_at=low.arena.constant(scale, np.float32), shift_at=low.arena.constant(shift, np.float32),
        weights_at=address, row_bytes=step, dst_data=lambda: dst.data, dst_plane=lambda: dst.plane,
    )  # fmt: skip
    return lists


SIZES = {"scales": 4, "shifts": 4, "rows": 8, "dst": 8}


def _linear(low: Lowering, node: Node) -> None:
    if node.weight is None or node.shift is None:
        raise EngineError(f"the linear layer {node.path!r} has no weights.")
    source, (ids, count) = low.value(node.ins[0]), low.list(node.ins[0])
    units = len(node.weight)
    out = low.store(padded(low, units), 1, 1, vector=True)
    low.plain[node.out] = out
    weight, bias = node.weight.detach().float().numpy(), node.shift.detach().float().numpy()
    product(
        low, weight.T, bias, node.relu, lambda: out.data, in_data=lambda: source.data, in_plane=lambda: source.plane,
        pitch=lambda: source.pitch, height=source.height, width=source.width, in_ids=ids, in_count=count, compact=0,
    )  # fmt: skip


def _mean(low: Lowering, node: Node) -> None:
    source, (ids, count) = low.value(node.ins[0]), low.list(node.ins[0])
    out = low.store(source.units, 1, 1, vector=True)
    low.plain[node.out], low.lists[node.out] = out, (ids, count)
    low.step(
        "stats", data=lambda: source.data, plane=lambda: source.plane, ids=ids, count=count, **low.lanes_of(source),
        kind=KINDS.index("avg"), pixels=source.height * source.width, out=lambda: out.data, compact=0,
    )  # fmt: skip


def _pool(low: Lowering, node: Node) -> None:
    maximum, clamps = node.pooling != "avg", node.kind == "clamp"
    copied = node.kind == "pool"
    source = low.phases(node.ins[0], node.stride, float("-inf") if maximum and copied else 0.0, copied)
    units, height, width = low.program.shapes[node.out]
    taps = _taps(node, source, (height, width))
    out = low.store(units, height, width)
    out.join(source)
    ids, count = low.list(node.ins[0])
    low.plain[node.out], low.lists[node.out] = out, (ids, count)
    size = node.kernel[0] * node.kernel[1]
    low.step(
        "window", data=lambda: source.data, plane=lambda: source.plane, ids=ids, count=count,
        taps_at=lambda: low.arena.constant(taps(), np.int32), tap_count=size, **low.lanes_of(out),
        out_data=lambda: out.data, out_plane=lambda: out.plane, maximum=int(maximum),
        scale=bits(1.0 if maximum else 1.0 / size), floor=bits(node.low) if clamps else FLOORS[node.relu],
        ceiling=bits(node.high) if clamps else NO_CEILING,
    )  # fmt: skip


def _curve(low: Lowering, node: Node) -> None:
    if node.curve in OPEN:
        _whole(low, node, node.ins[0])
    source, (ids, count) = low.phases(node.ins[0], (1, 1), 0.0, False), low.list(node.ins[0])
    out = low.store(*low.program.shapes[node.out])
    out.join(source)
    low.plain[node.out], low.lists[node.out] = out, (ids, count)
    low.step(
        node.curve, data=lambda: source.data, plane=lambda: source.plane, ids=ids, count=count, **low.lanes_of(out),
        out_data=lambda: out.data, out_plane=lambda: out.plane, slope=bits(node.low),
    )  # fmt: skip


def _times(low: Lowering, node: Node) -> None:
    _whole(low, node, node.ins[1])
    source, by = low.phases(node.ins[0], (1, 1), 0.0, False), low.value(node.ins[1])
    ids, count = low.list(node.ins[0])
    out = low.store(*low.program.shapes[node.out])
    out.join(source)
    low.plain[node.out], low.lists[node.out] = out, (ids, count)
    low.step(
        "times", data=lambda: source.data, plane=lambda: source.plane, ids=ids, count=count, **low.lanes_of(out),
        by=lambda: by.data, by_plane=lambda: by.plane, out_data=lambda: out.data, out_plane=lambda: out.plane,
    )  # fmt: skip


def _whole(low: Lowering, node: Node, value: int) -> None:
    """Raise ``EngineError`` when gates decide which channels of ``value`` there are."""
    if low.list(value) != low.arena.full(low.program.shapes[value][0]):
        raise EngineError(f"{node.curve or 'a product'} at {node.path!r} needs all channels, and a gate skips some.")


def _add(low: Lowering, node: Node) -> None:
    a, b = (low.phases(value, (1, 1), 0.0, False) for value in node.ins)
    units, height, width = low.program.shapes[node.out]
    out = low.store(units, height, width)
    out.join(a)
    b.join(a)
    given: dict[str, Number] = {}
    for name, value, store in (("a", node.ins[0], a), ("b", node.ins[1], b)):
        ids, count = low.list(value)
        given |= {f"{name}_ids": ids, f"{name}_count": count}
        given |= {f"{name}_data": lambda s=store: s.data, f"{name}_plane": lambda s=store: s.plane}
    ids, count = low.arena.empty(units)
    low.plain[node.out], low.lists[node.out] = out, (ids, count)
    low.step(
        "add", **given, **low.lanes_of(out), units=units, flags=low.arena.place(units), zero=lambda: low.zero,
        ids=ids, count=count, data=lambda: out.data, plane=lambda: out.plane, floor=FLOORS[node.relu],
    )  # fmt: skip


def _cat(low: Lowering, node: Node) -> None:
    out = low.store(*low.program.shapes[node.out])
    ids, count = low.arena.empty(out.units)
    low.plain[node.out], low.lists[node.out] = out, (ids, count)
    begin = 0
    for number, value in enumerate(node.ins):
        source, (src_ids, src_count) = low.value(value), low.list(value)
        low.copy(value, source, out, first=begin)
        low.step("ids", src_ids=src_ids, src_count=src_count, shift=begin, append=int(number > 0), ids=ids, count=count)
        begin += source.units


RULES: dict[str, Callable[[Lowering, Node], None]] = {
    "conv": _conv,
    "linear": _linear,
    "mean": _mean,
    "pool": _pool,
    "relu": _pool,
    "clamp": _pool,
    "curve": _curve,
    "times": _times,
    "add": _add,
    "cat": _cat,
}
