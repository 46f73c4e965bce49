"""The decisions of a ``Steered`` model as operators: pooled input, encoder, recurrent cell, decoder, prefix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from secateur.runtime.engine.lower import Lowering
from secateur.runtime.engine.planes import KINDS
from secateur.runtime.engine.product import packed, padded, product
from secateur.runtime.gates import Controller, Prefix
from secateur.runtime.gates.rnp import steered
from secateur.runtime.nodes import Node, Program
from secateur.types import EngineError


@dataclass(frozen=True, eq=False)
class Steering:
    """A controller, its bias for each further group, and the paths that it decides about, in their order."""

    controller: Controller
    bias: float
    paths: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module, controller: Controller, bias: float, program: Program) -> Steering:
        """Return the steering of ``model``; raises ``EngineError`` when its gates run in another order."""
        paths = tuple(steered(model))
        order = [node.path for node in program.nodes if isinstance(node.gate, Prefix) and node.path in paths]
        if len(paths) != len(controller.encoders):
            raise EngineError(f"the controller decides about {len(controller.encoders)} layers, not {len(paths)}.")
        if list(paths) != order:
            raise EngineError(f"the controller decides about {list(paths)}, but the network runs {order}.")
        return cls(controller, bias, paths)

    def step(self, low: Lowering, node: Node, gate: Prefix, count: int) -> None:
        """Add the decision about ``node``, whose number of channels goes to ``count``."""
        layer, cell = self.paths.index(node.path), self.controller.cell
        units, hidden = low.program.shapes[node.ins[0]][0], cell.hidden_size
        source, (ids, length) = low.value(node.ins[0]), low.list(node.ins[0])
        at = self._place(low)
        pooled = low.arena.place(4 * (units + low.lanes))
        low.step(
            "stats", data=lambda: source.data, plane=lambda: source.plane, ids=ids, count=length,
            **low.lanes_of(source), kind=KINDS.index("avg"), pixels=source.height * source.width, out=pooled, compact=1,
        )  # fmt: skip
        encoder: Any = self.controller.encoders[layer]
        decoder = self.controller.decoder
        product(low, _turned(encoder.weight), _flat(encoder.bias), False, at["code"], **packed(pooled, ids, length))
        code = packed(at["code"], *low.arena.full(cell.input_size))
        product(low, _turned(cell.weight_ih), _flat(cell.bias_ih), False, at["inputs"], **code)
        state = packed(at["state"], *low.arena.full(hidden))
        if layer == 0:
            state["in_count"] = low.arena.array(np.zeros(1, dtype=np.int64))  # nothing has been seen yet
        product(low, _turned(cell.weight_hh), _flat(cell.bias_hh), False, at["states"], **state)
        low.step(
            "gru", inputs=at["inputs"], states=at["states"], hidden=hidden, state=at["state"], first=int(layer == 0)
        )
        shift = _flat(decoder.bias) + self.bias * np.arange(gate.groups)
        state = packed(at["state"], *low.arena.full(hidden))
        product(low, _turned(decoder.weight), shift.astype(np.float32), False, at["values"], **state)
        low.step(
            "decide", values=at["values"], groups=gate.groups, out_count=count,
            sizes_at=low.arena.constant(gate.sizes, np.int64),
        )  # fmt: skip

    def _place(self, low: Lowering) -> dict[str, int]:
        """Return where code, products, state and values lie: the same for all layers."""
        if not low.control:
            cell, groups = self.controller.cell, self.controller.decoder.out_features
            sizes = {"code": cell.input_size, "inputs": 3 * cell.hidden_size, "states": 3 * cell.hidden_size}
            for name, size in {**sizes, "state": cell.hidden_size, "values": groups}.items():
                low.control[name] = low.arena.place(4 * (padded(low, size) + low.lanes))
        return low.control


def _flat(values: Tensor) -> np.ndarray:
    return np.asarray(values.detach().float().numpy())


def _turned(weight: Tensor) -> np.ndarray:
    return _flat(weight).T
