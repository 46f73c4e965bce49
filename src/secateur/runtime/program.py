"""A recorded network as a short list of layers: what the engine executes and what the MAC counter walks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from secateur.graph.trace import Op, Recording, Ref, inputs_of, record
from secateur.runtime.gates import FBS, Follower, Gated
from secateur.runtime.gates.passing import limits
from secateur.types import EngineError


@dataclass(frozen=True, eq=False)
class Node:
    """One layer: ``kind`` is conv, pool, mean, linear, add, relu, clamp or cat.

    ``weight`` (out, in / groups, kh, kw) or (out, in); y = scale * (weight * x) + shift, then the gate's pi, then the
    addition of value ``residual``, then ReLU if ``relu``.  A clamp, ReLU6 say, gives what lies in ``low`` to ``high``.
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


@dataclass(eq=False)
class _Reading:
    """The state while a recording is read: the nodes so far, and which value stands for which."""

    model: nn.Module
    rec: Recording
    nodes: list[Node] = field(default_factory=list)
    same: dict[int, int] = field(default_factory=dict)
    transposed: dict[int, torch.Tensor] = field(default_factory=dict)

    def value(self, ref: Any) -> int:
        """The value that a tensor argument stands for."""
        if not isinstance(ref, Ref):
            raise EngineError(f"a layer reads {ref!r}, which is not a tensor of the network.")
        return self.same.get(ref.value, ref.value)

    def tensor(self, ref: Any) -> torch.Tensor | None:
        """The parameter or buffer behind an argument."""
        if ref is None:
            return None
        name = self.rec.values[ref.value].name if isinstance(ref, Ref) else None
        if name is None:
            raise EngineError("a layer's weight is computed by the network itself.")
        owner, _, last = name.rpartition(".")
        return getattr(self.model.get_submodule(owner), last).detach()

    def shape(self, value: int) -> tuple[int, ...]:
        return self.rec.values[value].shape


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
    reading = _Reading(model, rec)
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
    shapes = {value: _chw(reading, value) for node in nodes for value in (*node.ins, node.out)}
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


def _chw(reading: _Reading, value: int) -> tuple[int, int, int]:
    shape = reading.shape(value)[1:]
    return (shape[0], 1, 1) if len(shape) == 1 else (shape[0], shape[1], shape[2])


def _pair(given: Any) -> tuple[int, int]:
    return (int(given[0]), int(given[-1]))


def _norm(conv_bias: torch.Tensor | None, stats: Any, eps: float, like: torch.Tensor) -> tuple[Any, Any]:
    """Return scale and shift, float64, of batch norm (weight, bias, mean, var) on top of a bias."""
    weight, bias, mean, var = (None if s is None else s.double() for s in stats)
    scale = torch.rsqrt(var + eps) if var is not None else torch.ones_like(like.flatten(1)[:, 0], dtype=torch.float64)
    scale = scale if weight is None else scale * weight
    shift = torch.zeros_like(scale) if bias is None else bias
    center = torch.zeros_like(scale) if mean is None else -mean
    center = center if conv_bias is None else center + conv_bias.double()
    return scale.detach(), (center * scale + shift).detach()


def _gated(reading: _Reading, path: str, layer: Gated, last: Op) -> None:
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
    scale, shift = _norm(conv.bias, stats, getattr(norm, "eps", 0.0), conv.weight)
    geometry = {"stride": _pair(conv.stride), "dilation": _pair(conv.dilation), "groups": conv.groups}
    return Node(
        "conv", path, (source,), out, weight=conv.weight.detach(), scale=scale,
        shift=shift + layer.shift.detach().double(), gate=layer.gate, padding=_explicit(conv),
        kernel=_pair(conv.kernel_size), **geometry,
    )  # fmt: skip


def _explicit(conv: nn.Conv2d) -> tuple[int, int]:
    """Return the padding as numbers; raises for ``same`` where it is not equal on both sides."""
    if isinstance(conv.padding, str):
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        if conv.padding == "same" and any(t % 2 for t in total):
            raise EngineError("padding 'same' of an even kernel is not equal on both sides.")
        return _pair([t // 2 for t in total]) if conv.padding == "same" else (0, 0)
    return _pair(conv.padding)


def _convolution(reading: _Reading, op: Op) -> None:
    x, weight, bias, stride, padding, dilation, transposed, _, groups = op.args
    kernel = reading.tensor(weight)
    if transposed or kernel is None or kernel.dim() != 4:
        raise EngineError(f"the convolution {op.module!r} is transposed or not two-dimensional.")
    scale, shift = _norm(reading.tensor(bias), (None,) * 4, 0.0, kernel)
    reading.nodes.append(
        Node(
            "conv", op.module, (reading.value(x),), _out(op), weight=kernel, scale=scale, shift=shift,
            stride=_pair(stride), padding=_pair(padding), dilation=_pair(dilation), groups=int(groups),
            kernel=_pair(kernel.shape[2:]),
        )
    )  # fmt: skip


def _out(op: Op) -> int:
    if op.outs[0] is None:
        raise EngineError(f"{op.target} in {op.module!r} gives no tensor.")
    return op.outs[0]


def _batch_norm(reading: _Reading, op: Op) -> None:
    """A batch norm joins the convolution before it, or becomes a depthwise 1x1 convolution."""
    stats = [reading.tensor(ref) for ref in op.args[1:5]]
    if op.args[5] or stats[3] is None or len(reading.shape(_out(op))) != 4:
        raise EngineError(f"the batch norm {op.module!r} has no running statistics, or no map to work on.")
    value, last = reading.value(op.args[0]), reading.nodes[-1] if reading.nodes else None
    scale, shift = _norm(None, stats, op.args[7], stats[3])
    alone = sum(isinstance(a, Ref) and reading.value(a) == value for o in reading.rec.ops for a in o.args) == 1
    if last is not None and last.kind == "conv" and last.out == value and alone and last.gate is None:
        joined = replace(last, scale=last.scale * scale, shift=last.shift * scale + shift, out=_out(op))
        reading.nodes[-1] = joined
        return
    channels = len(scale)
    ones = torch.ones(channels, 1, 1, 1)
    reading.nodes.append(
        Node("conv", op.module, (value,), _out(op), weight=ones, scale=scale, shift=shift, groups=channels)
    )


def _relu(reading: _Reading, op: Op) -> None:
    reading.nodes.append(Node("relu", op.module, (reading.value(op.args[0]),), _out(op), relu=True))


def _clamp(reading: _Reading, op: Op) -> None:
    low, high = limits(op)
    if low > 0 or high < 0:
        raise EngineError(f"{op.target} in {op.module!r} gives {low} to {high}, which leaves no 0 for what is skipped.")
    node = Node("clamp", op.module, (reading.value(op.args[0]),), _out(op), low=low, high=high)
    reading.nodes.append(node)


def _alias(reading: _Reading, op: Op) -> None:
    reading.same[_out(op)] = reading.value(op.args[0])


def _view(reading: _Reading, op: Op) -> None:
    value, before, after = reading.value(op.args[0]), reading.shape(op.args[0].value), reading.shape(_out(op))
    if len(after) not in (2, 4) or after[0] != before[0] or (len(after) == 4 and after != before):
        raise EngineError(f"{op.target} in {op.module!r} from {before} to {after} is no flattening.")
    reading.same[_out(op)] = value


def _mean(reading: _Reading, op: Op) -> None:
    dims = sorted(d % 4 for d in op.args[1]) if len(op.args) > 1 and op.args[1] else []
    if len(reading.shape(op.args[0].value)) != 4 or dims != [2, 3]:
        raise EngineError(f"the mean in {op.module!r} is not over the pixels of a map.")
    reading.nodes.append(Node("mean", op.module, (reading.value(op.args[0]),), _out(op)))


def _max_pool(reading: _Reading, op: Op) -> None:
    args = [*op.args, *[None] * 5][:5]
    kernel, stride, padding, dilation = args[1], args[2] or args[1], args[3] or [0, 0], args[4] or [1, 1]
    node = Node("pool", op.module, (reading.value(args[0]),), _out(op), pooling="max", kernel=_pair(kernel))
    reading.nodes.append(replace(node, stride=_pair(stride), padding=_pair(padding), dilation=_pair(dilation)))


def _avg_pool(reading: _Reading, op: Op) -> None:
    args = [*op.args, *[None] * 7][:7]
    padding = args[3] or [0, 0]
    counted = args[5] is None or args[5]
    if args[4] or args[6] or (any(padding) and not counted):
        raise EngineError(f"the average pool {op.module!r} divides by more than one number.")
    node = Node("pool", op.module, (reading.value(args[0]),), _out(op), pooling="avg", kernel=_pair(args[1]))
    reading.nodes.append(replace(node, stride=_pair(args[2] or args[1]), padding=_pair(padding)))


def _adaptive_pool(reading: _Reading, op: Op) -> None:
    """An average pool to a given size: nothing where maps have it, windows where it divides theirs."""
    sides, wanted = reading.shape(op.args[0].value)[2:], _pair(op.args[1])
    if len(sides) != 2 or any(side % size for side, size in zip(sides, wanted, strict=True)):
        raise EngineError(f"the average pool {op.module!r} from {tuple(sides)} to {wanted} has windows of many sizes.")
    if tuple(sides) == wanted:
        _alias(reading, op)
        return
    window = (sides[0] // wanted[0], sides[1] // wanted[1])
    source, more = (reading.value(op.args[0]),), {"pooling": "avg", "kernel": window, "stride": window}
    reading.nodes.append(Node("pool", op.module, source, _out(op), **more))


def _transpose(reading: _Reading, op: Op) -> None:
    weight = reading.tensor(op.args[0])
    if weight is not None:
        reading.transposed[_out(op)] = weight


def _addmm(reading: _Reading, op: Op) -> None:
    bias, x, weight = op.args[:3] if "addmm" in op.target else (None, *op.args[:2])
    matrix = reading.transposed.get(weight.value) if isinstance(weight, Ref) else None
    if matrix is None or any(op.kwargs.get(k, 1) != 1 for k in ("alpha", "beta")):
        raise EngineError(f"{op.target} in {op.module!r} is not a linear layer.")
    shift = reading.tensor(bias)
    shift = torch.zeros(len(matrix)) if shift is None else shift
    reading.nodes.append(Node("linear", op.module, (reading.value(x),), _out(op), weight=matrix, shift=shift))


def _add(reading: _Reading, op: Op) -> None:
    a, b = op.args[:2]
    known = isinstance(a, Ref) and isinstance(b, Ref) and op.kwargs.get("alpha", 1) == 1
    if not known or reading.shape(a.value) != reading.shape(b.value) or len(reading.shape(a.value)) != 4:
        raise EngineError(f"the addition in {op.module or 'the network'!r} is not of two maps of one shape.")
    reading.nodes.append(Node("add", op.module, (reading.value(a), reading.value(b)), _out(op)))


def _cat(reading: _Reading, op: Op) -> None:
    axis = op.args[1] if len(op.args) > 1 else 0
    if axis % 4 != 1 or len(reading.shape(_out(op))) != 4:
        raise EngineError(f"the concatenation in {op.module or 'the network'!r} is not over channels of maps.")
    reading.nodes.append(Node("cat", op.module, tuple(reading.value(r) for r in op.args[0]), _out(op)))


RULES: dict[str, Callable[[_Reading, Op], None]] = {
    "aten::convolution": _convolution,
    "aten::native_batch_norm": _batch_norm,
    "aten::relu": _relu,
    "aten::relu_": _relu,
    "aten::hardtanh": _clamp,
    "aten::hardtanh_": _clamp,
    "aten::view": _view,
    "aten::_unsafe_view": _view,
    "aten::reshape": _view,
    "aten::clone": _alias,
    "aten::detach": _alias,
    "aten::alias": _alias,
    "aten::mean.dim": _mean,
    "aten::max_pool2d_with_indices": _max_pool,
    "aten::avg_pool2d": _avg_pool,
    "aten::_adaptive_avg_pool2d": _adaptive_pool,
    "aten::t": _transpose,
    "aten::addmm": _addmm,
    "aten::mm": _addmm,
    "aten::add.Tensor": _add,
    "aten::add_.Tensor": _add,
    "aten::cat": _cat,
}


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
