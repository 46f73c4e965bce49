"""A network as a short list of layers: what the engine executes, and what becomes ONNX and Triton."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

OPEN = ("sigmoid", "hardsigmoid")  # what is skipped is 0, and they make more of 0


@dataclass(frozen=True, eq=False)
class Node:
    """One layer: ``kind`` is conv, pool, mean, linear, add, relu, clamp, curve, times or cat.

    ``weight`` (out, in / groups, kh, kw) or (out, in); y = scale * (weight * x) + shift, then the gate's pi, then the
    addition of value ``residual``, then ReLU if ``relu``.  A clamp, ReLU6 say, gives what lies in ``low`` to ``high``;
    ``curve`` names another activation (``low``: the slope of a leaky ReLU).  ``times`` multiplies the first of ``ins``
    by the second, which has one number per channel.
    """

    kind: str
    path: str
    ins: tuple[int, ...]
    out: int
    relu: bool = False
    weight: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    gate: nn.Module | None = None
    residual: int | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    kernel: tuple[int, int] = (1, 1)
    groups: int = 1
    pooling: str = ""
    low: float = 0.0
    high: float = 0.0
    curve: str = ""


@dataclass(frozen=True, eq=False)
class Program:
    """The layers in the order they run; ``shapes`` (C, H, W) of each value without the batch (H = W = 1: a vector)."""

    nodes: tuple[Node, ...]
    shapes: Mapping[int, tuple[int, int, int]]
    source: int
    result: int
    result_shape: tuple[int, ...]

    def readers(self, value: int) -> list[int]:
        """Return the numbers of the nodes that read ``value``; the end of the program counts as a reader."""
        found = [n for n, node in enumerate(self.nodes) if value in (*node.ins, node.residual)]
        return [*found, len(self.nodes)] if value == self.result else found
