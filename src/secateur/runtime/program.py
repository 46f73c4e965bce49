"""Read a network with gates as a list of layers, from a recorded run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from secateur.graph.trace import Op, Ref, inputs_of, record
from secateur.runtime.gates import FBS, Follower, Gated
from secateur.runtime.nodes import Node, Program
from secateur.runtime.operators import RULES, Reading, norm_of, pair
from secateur.types import EngineError


def read(model: nn.Module, example: Any) -> Program:
    """Return the layers of ``model`` as one run on ``example`` (one tensor, (B, C, H, W)) shows them.

    Raises ``EngineError`` that names the first layer the engine does not know.
    """
    args, kwargs = inputs_of(example)
    if len(args) != 1 or kwargs or not isinstance(args[0], torch.Tensor) or args[0].dim() != 4:
        raise EngineError("the network must take one tensor (batch, channels, height, width).")
    off = [path for path, module in model.named_modules() if isinstance(module, FBS) and not module.enabled]
    if off:
        raise EngineError(f"the gate {off[0]!r} is switched off; set enabled = True, with density 1 to compute all.")
    rec = record(model, args, kwargs)
    ops = rec.ops[: rec.eval_ops]
    source = next(i for i, v in enumerate(rec.values) if v.origin == "input")
    outputs = rec.outputs[: rec.eval_outputs]
    if len(outputs) != 1:
        raise EngineError(f"the network must give one tensor; it gives {len(outputs)}.")
    reading = Reading(model, rec)
    sharing = next((path for path, module in model.named_modules() if isinstance(module, Follower)), None)
    if sharing is not None:
        raise EngineError(f"{sharing!r} shares the mask of gates before it, which the engine does not know.")
    gates = {path: module for path, module in model.named_modules() if isinstance(module, Gated)}
    needed = _needed(outputs, ops)
    for number, op in enumerate(ops):
        owner = next((path for path in gates if _inside(op.module, path)), None)
        if owner is not None:
            last = not any(_inside(later.module, owner) for later in ops[number + 1 : number + 2])
            if last:
                _gated(reading, owner, gates[owner], op)
        elif number in needed:
            rule = RULES.get(op.target)
            if rule is None:
                where = op.module or type(model).__name__
                raise EngineError(f"{op.target} in {where!r} is not known to the engine.")
            rule(reading, op)
    result = reading.same.get(outputs[0], outputs[0])
    nodes = tuple(_fused(reading.nodes, result))
    shapes = {value: _chw(reading, value) for value in {source, *(v for node in nodes for v in (*node.ins, node.out))}}
    return Program(nodes, shapes, source, result, reading.shape(outputs[0])[1:])


def _inside(module: str, path: str) -> bool:
    return module == path or module.startswith(path + ".")


def _needed(outputs: list[int], ops: list[Op]) -> set[int]:
    """Return the numbers of the operators that the outputs depend on."""
    wanted, found = set(outputs), set()
    for number in range(len(ops) - 1, -1, -1):
        if wanted & {out for out in ops[number].outs if out is not None}:
            found.add(number)
            flat = torch.utils._pytree.tree_leaves((ops[number].args, ops[number].kwargs))
            wanted |= {ref.value for ref in flat if isinstance(ref, Ref)}
    return found


def _chw(reading: Reading, value: int) -> tuple[int, int, int]:
    shape = reading.shape(value)[1:]
    return (shape[0], 1, 1) if len(shape) == 1 else (shape[0], shape[1], shape[2])


def _gated(reading: Reading, path: str, layer: Gated, last: Op) -> None:
    source = reading.rec.inputs[path][0][0]
    if source is None or last.outs[0] is None:
        raise EngineError(f"the input of {path!r} was not recorded.")
    value = reading.same.get(source, source)
    if isinstance(layer.conv, nn.Linear):
        reading.nodes.append(_gated_linear(path, layer, value, last.outs[0], reading.shape(value)))
    else:
        reading.nodes.append(gated_node(path, layer, value, last.outs[0]))


def _gated_linear(path: str, layer: Gated, source: int, out: int, shape: tuple[int, ...]) -> Node:
    """Return a gated linear layer as the convolution of 1 x 1 that it is on a map of one pixel."""
    if len(shape) not in (2, 4) or any(side != 1 for side in shape[2:]):
        raise EngineError(f"the gate at {path!r} is on a linear layer that reads {shape}; the engine runs (B, C) only.")
    linear: Any = layer.conv
    conv = nn.Conv2d(linear.in_features, linear.out_features, 1, bias=linear.bias is not None, device="meta")
    conv.weight = nn.Parameter(linear.weight.detach()[:, :, None, None])
    conv.bias = linear.bias
    turned = Gated(conv, layer.norm, layer.shift.detach(), layer.gate)
    turned.board = layer.board
    return gated_node(path, turned, source, out)


def gated_node(path: str, layer: Gated, source: int, out: int) -> Node:
    """Return a gated layer as a node; raises ``EngineError`` for padding that differs by side and for other gates."""
    conv: Any = layer.conv
    norm = layer.norm
    if not isinstance(conv, nn.Conv2d):
        raise EngineError(f"the gate at {path!r} is on a {type(conv).__name__}; the engine runs gates on nn.Conv2d.")
    if isinstance(layer.gate, FBS) and layer.gate.threshold != "online":
        raise EngineError(f"the gate at {path!r} has a running threshold; the engine selects exactly k winners.")
    if layer.board is not None:
        raise EngineError(f"other layers share the mask of the gate at {path!r}, which the engine does not know.")
    known = isinstance(norm, nn.BatchNorm2d | nn.BatchNorm1d)
    stats = (norm.weight, norm.bias, norm.running_mean, norm.running_var) if known else (None,) * 4
    scale, shift = norm_of(conv.bias, stats, getattr(norm, "eps", 0.0), conv.weight)
    geometry = {"stride": pair(conv.stride), "dilation": pair(conv.dilation), "groups": conv.groups}
    return Node(
        "conv", path, (source,), out, weight=conv.weight.detach(), scale=scale,
        shift=shift + layer.shift.detach().double(), gate=layer.gate, padding=_explicit(conv),
        kernel=pair(conv.kernel_size), **geometry,
    )  # fmt: skip


def _explicit(conv: nn.Conv2d) -> tuple[int, int]:
    """Return the padding as numbers; raises for ``same`` where it is not equal on both sides."""
    if isinstance(conv.padding, str):
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        if conv.padding == "same" and any(t % 2 for t in total):
            raise EngineError("padding 'same' of an even kernel is not equal on both sides.")
        return pair([t // 2 for t in total]) if conv.padding == "same" else (0, 0)
    return pair(conv.padding)


def _fused(nodes: list[Node], result: int) -> list[Node]:
    """Join a ReLU with the layer before it when nothing else reads in between."""
    reads: dict[int, int] = {result: 1}
    for node in nodes:
        for value in node.ins:
            reads[value] = reads.get(value, 0) + 1
    done: list[Node] = []
    makers: dict[int, int] = {}
    for node in nodes:
        maker = makers.get(node.ins[0])
        before = done[maker] if maker is not None else None
        if node.kind == "relu" and before is not None and reads[node.ins[0]] == 1 and before.kind in FUSING:
            done[makers.pop(node.ins[0])] = replace(before, relu=True, out=node.out)
            makers[node.out] = maker  # type: ignore[assignment]
            continue
        makers[node.out] = len(done)
        done.append(node)
    return done


FUSING = ("conv", "linear", "add", "pool", "relu")
