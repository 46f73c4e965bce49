"""What flows through the ONNX graph: compact maps, and which channels they hold."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from secateur.runtime.portable.graph import Graph


@dataclass(frozen=True)
class Map:
    """A map (B, channels held, H, W) called ``name`` of a value that has ``units`` channels.

    ``ids`` names the (k,) channels that it holds, for ``held`` = k; or ``action`` names a scalar, 0 for the first,
    whose prefix of ``sizes[action]`` channels it holds; with neither it holds them all.  ``positive``: none is below 0.
    ``flat``: it is a vector (B, C) in fact.
    """

    name: str
    units: int
    side: tuple[int, int]
    positive: bool = False
    ids: str = ""
    held: int = 0
    action: str = ""
    sizes: tuple[int, ...] = ()
    flat: bool = False

    @property
    def all(self) -> bool:
        """Does it hold every channel?"""
        return not self.ids and not self.action

    def now(self, name: str, side: tuple[int, int] | None = None, positive: bool | None = None) -> Map:
        """Return the map after something that works on each channel for itself."""
        return replace(
            self, name=name, side=side or self.side, positive=self.positive if positive is None else positive
        )


def whole(graph: Graph, x: Map) -> Map:
    """Return ``x`` with all its channels, zeros in the place of those that it does not hold."""
    if x.all:
        return x
    full = Map("", x.units, x.side, x.positive)
    if x.ids:
        zeros = graph.constant(np.zeros((1, x.units, *x.side)))
        return full.now(graph.op("ScatterND", zeros, places(graph, x), x.name))
    held = graph.op("Shape", x.name, start=1, end=2)
    missing = graph.op("Sub", graph.constant([x.units], np.int64), held)
    parts = graph.constant(np.zeros(5), np.int64), missing, graph.constant(np.zeros(2), np.int64)
    return full.now(graph.op("Pad", x.name, graph.op("Concat", *parts, axis=0)))


def places(graph: Graph, x: Map) -> str:
    """Return the (1, k, 2) indices, sample and channel, of the channels that ``x`` holds."""
    channels = graph.op("Reshape", x.ids, graph.constant([1, -1, 1], np.int64))
    return graph.op("Concat", graph.constant(np.zeros((1, x.held, 1)), np.int64), channels, axis=2)


def added(graph: Graph, a: Map, b: Map) -> Map:
    """Return the sum of two maps, all channels of it."""
    positive = a.positive and b.positive
    if a.ids and not b.ids:
        a, b = b, a
    a = whole(graph, a)
    if b.ids:
        return a.now(graph.op("ScatterND", a.name, places(graph, b), b.name, reduction="add"), positive=positive)
    return a.now(graph.op("Add", a.name, whole(graph, b).name), positive=positive)


def joined(graph: Graph, parts: list[Map]) -> Map:
    """Return the concatenation of maps over their channels."""
    units, positive = sum(x.units for x in parts), all(x.positive for x in parts)
    if any(x.action for x in parts) or all(x.all for x in parts):
        parts = [whole(graph, x) for x in parts]
        names = [x.name for x in parts]
        return Map(graph.op("Concat", *names, axis=1), units, parts[0].side, positive)
    ids, begin = [], 0
    for x in parts:
        if x.ids:
            ids.append(graph.op("Add", x.ids, graph.constant(begin, np.int64)))
        else:
            ids.append(graph.constant(np.arange(begin, begin + x.units), np.int64))
        begin += x.units
    name = graph.op("Concat", *[x.name for x in parts], axis=1)
    held = sum(x.held if x.ids else x.units for x in parts)
    return Map(name, units, parts[0].side, positive, graph.op("Concat", *ids, axis=0), held)
