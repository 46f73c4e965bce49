"""An ONNX graph in the making: nodes and constants."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET, IR = 17, 8  # what ONNX Runtime reads since 1.12


@dataclass(eq=False)
class Graph:
    """Nodes and constants so far."""

    names: Iterator[int] = field(default_factory=itertools.count)
    nodes: list[Any] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)

    def op(self, kind: str, *ins: str, **attributes: Any) -> str:
        """Add an operator; return the name of what it gives."""
        return self.ops(kind, *ins, outs=1, **attributes)[0]

    def ops(self, kind: str, *ins: str, outs: int, **attributes: Any) -> list[str]:
        """Add an operator of ``outs`` outputs; return their names."""
        given = [f"{kind}{next(self.names)}" for _ in range(outs)]
        self.nodes.append(helper.make_node(kind, list(ins), given, name=given[0], **attributes))
        return given

    def constant(self, values: Any, kind: Any = np.float32) -> str:
        """Return the name of a constant tensor."""
        name = f"c{next(self.names)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(values, dtype=kind), name))
        return name

    def model(self, ins: dict[str, tuple[Any, Sequence[int | str]]], result: str) -> bytes:
        """Return the file of a model with inputs ``ins`` (name -> numpy type and shape) and one output."""
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(kind)), shape)
            for name, (kind, shape) in ins.items()
        ]
        output = helper.make_tensor_value_info(result, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "secateur", inputs, [output], self.constants)
        model: onnx.ModelProto = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR, producer_name="secateur"
        )
        return model.SerializeToString()
