"""From the layers of a program to ONNX operators that compute what the gates choose."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from secateur.runtime.gates import FBS, Prefix
from secateur.runtime.nodes import OPEN, Node, Program
from secateur.runtime.portable.gates import Policy, array, saliency, winners
from secateur.runtime.portable.graph import Graph
from secateur.runtime.portable.maps import Map, added, joined, whole
from secateur.types import EngineError

PAIR = 320  # multiply-accumulates in the time that picking one kernel of an input and an output takes


@dataclass(eq=False)
class Lowering:
    """The graph in the making, and the map that stands for each value of the program."""

    program: Program
    policy: Policy
    graph: Graph = field(default_factory=Graph)
    maps: dict[int, Map] = field(default_factory=dict)

    def side(self, node: Node) -> tuple[int, int]:
        """Height and width of what ``node`` gives."""
        return self.program.shapes[node.out][1:]

    def made(self, node: Node, name: str) -> None:
        """Let ``name``, after ReLU if the node has one, stand for what ``node`` gives, all channels of it."""
        name = self.graph.op("Relu", name) if node.relu else name
        self.maps[node.out] = Map(name, self.program.shapes[node.out][0], self.side(node), node.relu)


def lower(program: Program, policy: Policy) -> tuple[Graph, str]:
    """Return the graph of ``program``, which reads ``image``, and the name of its result."""
    low = Lowering(program, policy)
    low.maps[program.source] = Map("image", program.shapes[program.source][0], program.shapes[program.source][1:])
    for node in program.nodes:
        RULES[node.kind](low, node)
    return low.graph, whole(low.graph, low.maps[program.result]).name


def _conv(low: Lowering, node: Node) -> None:
    if node.weight is None or node.scale is None or node.shift is None:
        raise EngineError(f"the convolution {node.path!r} has no weights.")
    scale, shift = node.scale, node.shift
    if isinstance(node.gate, Prefix):
        gain = node.gate.gain.detach().cpu().double()
        scale, shift = scale.cpu() * gain, shift.cpu() * gain
    weight = array(node.weight.detach().double() * scale[:, None, None, None])
    x = low.maps[node.ins[0]]
    if x.flat:  # a gated linear layer is a convolution on a map of one pixel
        x = replace(x, name=low.graph.op("Reshape", x.name, low.graph.constant([0, -1, 1, 1], np.int64)), flat=False)
    if isinstance(node.gate, FBS):
        _boosted(low, node, node.gate, weight, array(shift), x)
    elif x.action or (isinstance(node.gate, Prefix) and _acted(low, node)):
        _prefixed(low, node, weight, array(shift), x)
    else:
        low.made(node, _plain(low, node, weight, array(shift), x))


def _acted(low: Lowering, node: Node) -> bool:
    """Is there an action for this layer?"""
    return low.policy.controller is None or node.path in low.policy.paths


def _run(graph: Graph, node: Node, x: str, weight: str, shift: str, groups: int = 1) -> str:
    """Add a convolution with the geometry of ``node``."""
    pads = [*node.padding, *node.padding]
    geometry = {"kernel_shape": node.kernel, "strides": node.stride, "dilations": node.dilation, "pads": pads}
    return graph.op("Conv", x, weight, shift, group=groups, **geometry)


def _plain(low: Lowering, node: Node, weight: np.ndarray, shift: np.ndarray, x: Map) -> str:
    """Compute all outputs, from the inputs that ``x`` holds where these are known as numbers."""
    graph = low.graph
    if not _worthwhile(low, node, x) or node.groups > 1:
        return _run(graph, node, whole(graph, x).name, graph.constant(weight), graph.constant(shift), node.groups)
    return _run(graph, node, x.name, graph.op("Gather", graph.constant(weight), x.ids, axis=1), graph.constant(shift))


def _worthwhile(low: Lowering, node: Node, x: Map) -> bool:
    """Is it faster to pick the weights of the inputs that ``x`` holds than to compute with zeros for the others?"""
    if not x.ids:
        return False
    return (x.units - x.held) / x.held * math.prod(low.side(node)) * math.prod(node.kernel) > PAIR


def _boosted(low: Lowering, node: Node, gate: FBS, weight: np.ndarray, shift: np.ndarray, x: Map) -> None:
    """FBS: pool, predict, select; then the chosen filters over the channels that are there, times the saliency.

    In a grouped layer that is not depthwise, channels are chosen after all were computed.
    """
    graph, units, k = low.graph, len(weight), gate.k
    pi = saliency(graph, x, gate)
    ids = ""
    if k < units:
        pi, ids = winners(graph, pi, k)
    depthwise = node.groups == units == x.units and node.groups > 1
    if not ids or (node.groups > 1 and not depthwise):
        y = _plain(low, node, weight, shift, x)
        y = graph.op("Gather", y, ids, axis=1) if ids else y
    elif depthwise:
        x = whole(graph, x)
        filters = graph.op("Gather", graph.constant(weight), ids)
        y = _run(graph, node, graph.op("Gather", x.name, ids, axis=1), filters, _picked(graph, shift, ids), k)
    else:
        picked = _worthwhile(low, node, x)
        x = x if picked else whole(graph, x)
        filters = graph.op("Gather", graph.constant(weight), ids)
        filters = graph.op("Gather", filters, x.ids, axis=1) if picked else filters
        y = _run(graph, node, x.name, filters, _picked(graph, shift, ids))
    y = graph.op("Relu", y) if node.relu else y  # pi is not negative, so ReLU may come first, fused with Conv
    y = graph.op("Mul", y, graph.op("Reshape", pi, graph.constant([1, -1, 1, 1], np.int64)))
    low.maps[node.out] = Map(y, units, low.side(node), node.relu, ids=ids, held=k if ids else 0)


def _picked(graph: Graph, values: np.ndarray, ids: str) -> str:
    return graph.op("Gather", graph.constant(values), ids)


def _prefixed(low: Lowering, node: Node, weight: np.ndarray, shift: np.ndarray, x: Map) -> None:
    """RNP: the prefix of the filters, over the prefix of the channels that are there, cut from one copy of the weights.

    A grouped layer is computed whole and its prefix taken.
    """
    graph, gate, action = low.graph, node.gate, ""
    x = x if x.action or x.all else whole(graph, x)
    after: tuple[int, ...] = (len(weight),)
    if isinstance(gate, Prefix) and _acted(low, node):
        after, action = tuple(gate.sizes), low.policy.action(graph, node.path, x)
    out = _ends(graph, action, after)
    if node.groups > 1:
        y = _plain(low, node, weight, shift, x)
        y = graph.op("Slice", y, *out, graph.constant([1], np.int64)) if action else y
    else:
        ends = graph.op("Concat", out[1], _ends(graph, x.action, x.sizes or (x.units,))[1], axis=0)
        both = graph.constant([0, 0], np.int64), ends, graph.constant([0, 1], np.int64)
        filters = graph.op("Slice", graph.constant(weight), *both)
        y = _run(graph, node, x.name, filters, graph.op("Slice", graph.constant(shift), *out))
    y = graph.op("Relu", y) if node.relu else y
    sizes = after if action else ()
    low.maps[node.out] = Map(y, len(weight), low.side(node), node.relu, action=action, sizes=sizes)


def _ends(graph: Graph, action: str, sizes: tuple[int, ...]) -> tuple[str, str]:
    """Return 0 and the size of the prefix that ``action`` takes, for ``Slice``."""
    end = graph.constant(sizes, np.int64)
    if action:
        end = graph.op("Gather", end, graph.op("Reshape", action, graph.constant([1], np.int64)))
    return graph.constant([0], np.int64), end


def _linear(low: Lowering, node: Node) -> None:
    if node.weight is None or node.shift is None:
        raise EngineError(f"the linear layer {node.path!r} has no weights.")
    graph = low.graph
    x = graph.op("Flatten", whole(graph, low.maps[node.ins[0]]).name)
    weight, shift = graph.constant(array(node.weight)), graph.constant(array(node.shift))
    low.made(node, graph.op("Gemm", x, weight, shift, transB=1))
    low.maps[node.out] = replace(low.maps[node.out], flat=True)


def _mean(low: Lowering, node: Node) -> None:
    x = low.maps[node.ins[0]]
    low.maps[node.out] = x.now(low.graph.op("GlobalAveragePool", x.name), (1, 1))


def _pool(low: Lowering, node: Node) -> None:
    x, side = low.maps[node.ins[0]], low.side(node)
    pads = [*node.padding, *node.padding]
    for axis in range(2):  # windows that hang over the end (ceil mode)
        reach = (side[axis] - 1) * node.stride[axis] + node.dilation[axis] * (node.kernel[axis] - 1) + 1
        pads[2 + axis] = max(0, reach - x.side[axis] - node.padding[axis])
    geometry: dict[str, Any] = {"kernel_shape": node.kernel, "strides": node.stride, "pads": pads}
    if node.pooling == "max":
        y = low.graph.op("MaxPool", x.name, dilations=node.dilation, **geometry)
    else:
        y = low.graph.op("AveragePool", x.name, count_include_pad=1, **geometry)
    y = low.graph.op("Relu", y) if node.relu else y
    low.maps[node.out] = x.now(y, side, x.positive or node.relu)


def _relu(low: Lowering, node: Node) -> None:
    x = low.maps[node.ins[0]]
    low.maps[node.out] = x.now(low.graph.op("Relu", x.name), positive=True)


def _clamp(low: Lowering, node: Node) -> None:
    x, ends = low.maps[node.ins[0]], [low.graph.constant(np.float32(end)) for end in (node.low, node.high)]
    low.maps[node.out] = x.now(low.graph.op("Clip", x.name, *ends), positive=node.low >= 0)


def _curve(low: Lowering, node: Node) -> None:
    graph, x = low.graph, low.maps[node.ins[0]]
    x = whole(graph, x) if node.curve in OPEN else x
    if node.curve == "silu":
        y = graph.op("Mul", x.name, graph.op("Sigmoid", x.name))
    elif node.curve == "leaky_relu":
        y = graph.op("LeakyRelu", x.name, alpha=node.low)
    elif node.curve == "hardsigmoid":
        y = graph.op("HardSigmoid", x.name, alpha=1 / 6, beta=0.5)
    else:
        y = graph.op({"sigmoid": "Sigmoid", "hardswish": "HardSwish", "tanh": "Tanh"}[node.curve], x.name)
    low.maps[node.out] = x.now(y, positive=node.curve in OPEN)


def _times(low: Lowering, node: Node) -> None:
    graph, x, by = low.graph, low.maps[node.ins[0]], whole(low.graph, low.maps[node.ins[1]])
    x = whole(graph, x) if x.action else x
    factors = graph.op("Reshape", by.name, graph.constant([0, -1, 1, 1], np.int64)) if by.flat else by.name
    factors = graph.op("Gather", factors, x.ids, axis=1) if x.ids else factors
    low.maps[node.out] = x.now(graph.op("Mul", x.name, factors), positive=x.positive and by.positive)


def _add(low: Lowering, node: Node) -> None:
    y = added(low.graph, low.maps[node.ins[0]], low.maps[node.ins[1]])
    low.maps[node.out] = y.now(low.graph.op("Relu", y.name), positive=True) if node.relu else y


def _cat(low: Lowering, node: Node) -> None:
    low.maps[node.out] = joined(low.graph, [low.maps[value] for value in node.ins])


RULES: dict[str, Callable[[Lowering, Node], None]] = {
    "conv": _conv,
    "linear": _linear,
    "mean": _mean,
    "pool": _pool,
    "relu": _relu,
    "clamp": _clamp,
    "curve": _curve,
    "times": _times,
    "add": _add,
    "cat": _cat,
}
