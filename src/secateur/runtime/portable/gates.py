"""Gates as ONNX operators: who wins, and the action that a controller takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from secateur.runtime.gates import FBS, Controller
from secateur.runtime.portable.graph import Graph
from secateur.runtime.portable.maps import Map, whole


def array(values: torch.Tensor) -> np.ndarray:
    """Return the float32 values of a tensor."""
    return values.detach().cpu().float().numpy()


def pooled(graph: Graph, x: Map, how: str) -> str:
    """Return one number per channel, (1, C), of map ``x``; ``how`` is that of ``secateur.runtime.gates.fbs.pooled``."""
    if how == "l2":
        norm = graph.op("ReduceL2", x.name, axes=[2, 3])
        name = graph.op("Div", norm, graph.constant(math.sqrt(math.prod(x.side))))
    else:
        signed = how == "l1" and not x.positive
        source = graph.op("Abs", x.name) if signed else x.name
        name = graph.op("GlobalMaxPool" if how == "max" else "GlobalAveragePool", source)
    return graph.op("Flatten", whole(graph, x.now(name, (1, 1))).name)


def product(graph: Graph, x: str, layer: nn.Linear) -> str:
    """Return ``layer`` of the vectors ``x``."""
    return graph.op("Gemm", x, graph.constant(array(layer.weight)), graph.constant(array(layer.bias)), transB=1)


def saliency(graph: Graph, x: Map, gate: FBS) -> str:
    """Return the saliencies (1, C) of an FBS gate."""
    return graph.op("Relu", product(graph, pooled(graph, x, gate.pooling), gate.predictor))


def winners(graph: Graph, saliency: str, k: int) -> tuple[str, str]:
    """Return the ``k`` largest of ``saliency`` (1, C), and their channels (k,); of equal ones the lower index wins.

    That is the rule of TopK in the ONNX standard, too.
    """
    values, ids = graph.ops("TopK", saliency, graph.constant([k], np.int64), outs=2, axis=1, sorted=0)
    return values, graph.op("Reshape", ids, graph.constant([-1], np.int64))


@dataclass(eq=False)
class Policy:
    """Where actions come from: ``controller`` in the graph, for ``paths`` in this order, or the input ``given``."""

    controller: Controller | None
    bias: float
    paths: Sequence[str]
    given: str = "actions"
    weights: list[str] = field(default_factory=list)
    state: str = ""
    asked: list[str] = field(default_factory=list)

    def action(self, graph: Graph, path: str, x: Map) -> str:
        """Return the action, a scalar from 0 on, for the layer ``path`` that reads ``x``."""
        self.asked.append(path)
        if self.controller is None:
            number = graph.constant(len(self.asked) - 1, np.int64)
            return graph.op("Sub", graph.op("Gather", self.given, number), graph.constant(1, np.int64))
        values = self._values(graph, self.controller, self.paths.index(path), pooled(graph, x, "avg"))
        groups = self.controller.decoder.out_features
        biased = graph.op("Add", values, graph.constant(self.bias * np.arange(groups)))
        best = graph.op("ArgMax", biased, axis=1, keepdims=0)
        return graph.op("Reshape", best, graph.constant(np.zeros(0), np.int64))

    def _values(self, graph: Graph, controller: Controller, layer: int, seen: str) -> str:
        """Return the values Q (1, groups); the state goes on to the next layer."""
        encoder: nn.Linear = controller.encoders[layer]  # type: ignore[assignment]
        hidden = controller.cell.hidden_size
        if not self.weights:
            self.weights = [graph.constant(part) for part in _cell(controller.cell)]
        code = graph.op("Reshape", product(graph, seen, encoder), graph.constant([1, 1, -1], np.int64))
        before = ["", self.state] if self.state else []
        ins = (code, *self.weights, *before)
        _, self.state = graph.ops("GRU", *ins, outs=2, hidden_size=hidden, linear_before_reset=1)
        return product(graph, graph.op("Reshape", self.state, graph.constant([1, -1], np.int64)), controller.decoder)


def _cell(cell: nn.GRUCell) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return W, R and B of ONNX, whose gates are update, reset, new; torch has reset before update."""

    def turned(values: torch.Tensor) -> np.ndarray:
        reset, update, new = np.split(array(values), 3)
        return np.concatenate([update, reset, new])[None]

    bias = np.concatenate([turned(cell.bias_ih), turned(cell.bias_hh)], axis=1)
    return turned(cell.weight_ih), turned(cell.weight_hh), bias
