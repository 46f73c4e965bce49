"""The layers of a program as functions of maps on a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.runtime.gates import Gated
from secateur.runtime.gpu.convolve import convolved
from secateur.runtime.gpu.filters import Filters
from secateur.runtime.gpu.maps import Maps, joined
from secateur.runtime.nodes import OPEN, Node, Program
from secateur.types import EngineError

Step = Callable[..., Maps]


class Walk:
    """The layers of ``program`` in their order: ``walk(x)`` for x (B, C, H, W).

    ``model`` has the gates of the program under their paths, on the device; the weights are copied.
    """

    def __init__(self, program: Program, model: nn.Module, device: torch.device) -> None:
        self.program = program
        self.steps = [step(node, program, model, device) for node in program.nodes]
        self._over: list[list[int]] = [[] for _ in program.nodes]
        for value in program.shapes:
            readers = program.readers(value)
            if readers and readers[-1] < len(program.nodes):
                self._over[readers[-1]].append(value)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the output of the network."""
        values = {self.program.source: Maps(x, x.shape[1])}
        for node, run, over in zip(self.program.nodes, self.steps, self._over, strict=True):
            values[node.out] = run(*(values[value] for value in node.ins))
            for value in over:  # its memory serves the next layers
                del values[value]
        return values[self.program.result].whole().reshape(len(x), *self.program.result_shape)


def step(node: Node, program: Program, model: nn.Module, device: torch.device) -> Step:
    """Return the function that computes ``node``; raises ``EngineError`` for a kind that is not known here."""
    if node.kind not in STEPS:
        raise EngineError(f"a layer of kind {node.kind!r} at {node.path!r} is not known on the GPU.")
    return STEPS[node.kind](node, program, model, device)


def _conv(node: Node, program: Program, model: nn.Module, device: torch.device) -> Step:
    layer = model.get_submodule(node.path) if node.gate is not None else None
    gate = layer.gate if isinstance(layer, Gated) else None
    filters = Filters.of(node, gate, device)
    return lambda x: convolved(x, filters, gate)


def _pool(node: Node, program: Program, model: nn.Module, device: torch.device) -> Step:
    """A pool of zeros is zero, so it works on the computed planes alone."""
    sides, wanted = program.shapes[node.ins[0]][1:], program.shapes[node.out][1:]
    span = [side + 2 * p - d * (k - 1) - 1
            for side, p, d, k in zip(sides, node.padding, node.dilation, node.kernel, strict=True)]  # fmt: skip
    up = any(n > s // step + 1 for n, s, step in zip(wanted, span, node.stride, strict=True))
    given: dict[str, Any] = {"kernel_size": node.kernel, "stride": node.stride, "padding": node.padding}

    def run(x: Maps) -> Maps:
        if node.pooling == "max":
            y = F.max_pool2d(x.values, dilation=node.dilation, ceil_mode=up, **given)
        else:
            y = F.avg_pool2d(x.values, **given)
        return x.holding(y.relu() if node.relu else y)

    return run


def _mean(node: Node, *_: Any) -> Step:
    return lambda x: x.holding(x.values.mean((2, 3), keepdim=True))


def _linear(node: Node, program: Program, model: nn.Module, device: torch.device) -> Step:
    assert node.weight is not None
    assert node.shift is not None
    weight, shift = node.weight.float().to(device), node.shift.float().to(device)

    def run(x: Maps) -> Maps:
        y = F.linear(x.whole().flatten(1), weight, shift)
        return Maps((y.relu() if node.relu else y)[:, :, None, None], len(shift))

    return run


def _add(node: Node, *_: Any) -> Step:
    def run(a: Maps, b: Maps) -> Maps:
        total = a.plus(b)
        return total.holding(total.values.relu()) if node.relu else total

    return run


def _relu(node: Node, *_: Any) -> Step:
    return lambda x: x.holding(x.values.relu())


def _clamp(node: Node, *_: Any) -> Step:
    return lambda x: x.holding(x.values.clamp(node.low, node.high))


def _curve(node: Node, *_: Any) -> Step:
    change: Any = getattr(torch, node.curve, None) or getattr(F, node.curve)
    slope = [node.low] if node.curve == "leaky_relu" else []

    def run(x: Maps) -> Maps:
        if node.curve in OPEN:
            return Maps(change(x.whole()), x.channels)
        return x.holding(change(x.values, *slope))

    return run


def _times(node: Node, *_: Any) -> Step:
    return lambda x, by: Maps(x.whole() * by.whole(), x.channels)


def _cat(node: Node, *_: Any) -> Step:
    return lambda *parts: joined(parts)


STEPS: Mapping[str, Callable[[Node, Program, nn.Module, torch.device], Step]] = {
    "conv": _conv,
    "pool": _pool,
    "mean": _mean,
    "linear": _linear,
    "add": _add,
    "relu": _relu,
    "clamp": _clamp,
    "curve": _curve,
    "times": _times,
    "cat": _cat,
}
