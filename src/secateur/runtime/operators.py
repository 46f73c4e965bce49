"""How each recorded operator becomes a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from secateur.graph.trace import Op, Recording, Ref
from secateur.runtime.gates.passing import limits
from secateur.runtime.nodes import OPEN, Node
from secateur.types import EngineError


@dataclass(eq=False)
class Reading:
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
        """The shape of a value, with the batch."""
        return self.rec.values[value].shape


def pair(given: Any) -> tuple[int, int]:
    """Return the two numbers of a size; torch records one where both are equal."""
    return (int(given[0]), int(given[-1]))


def norm_of(conv_bias: torch.Tensor | None, stats: Any, eps: float, like: torch.Tensor) -> tuple[Any, Any]:
    """Return scale and shift, float64, of batch norm (weight, bias, mean, var) on top of a bias."""
    weight, bias, mean, var = (None if s is None else s.double() for s in stats)
    scale = torch.rsqrt(var + eps) if var is not None else torch.ones_like(like.flatten(1)[:, 0], dtype=torch.float64)
    scale = scale if weight is None else scale * weight
    shift = torch.zeros_like(scale) if bias is None else bias
    center = torch.zeros_like(scale) if mean is None else -mean
    center = center if conv_bias is None else center + conv_bias.double()
    return scale.detach(), (center * scale + shift).detach()


def _convolution(reading: Reading, op: Op) -> None:
    x, weight, bias, stride, padding, dilation, transposed, _, groups = op.args
    kernel = reading.tensor(weight)
    if transposed or kernel is None or kernel.dim() != 4:
        raise EngineError(f"the convolution {op.module!r} is transposed or not two-dimensional.")
    scale, shift = norm_of(reading.tensor(bias), (None,) * 4, 0.0, kernel)
    reading.nodes.append(
        Node(
            "conv", op.module, (reading.value(x),), _out(op), weight=kernel, scale=scale, shift=shift,
            stride=pair(stride), padding=pair(padding), dilation=pair(dilation), groups=int(groups),
            kernel=pair(kernel.shape[2:]),
        )
    )  # fmt: skip


def _out(op: Op) -> int:
    if op.outs[0] is None:
        raise EngineError(f"{op.target} in {op.module!r} gives no tensor.")
    return op.outs[0]


def _batch_norm(reading: Reading, op: Op) -> None:
    """A batch norm joins the convolution before it, or becomes a depthwise 1x1 convolution."""
    stats = [reading.tensor(ref) for ref in op.args[1:5]]
    if op.args[5] or stats[3] is None or len(reading.shape(_out(op))) != 4:
        raise EngineError(f"the batch norm {op.module!r} has no running statistics, or no map to work on.")
    value, last = reading.value(op.args[0]), reading.nodes[-1] if reading.nodes else None
    scale, shift = norm_of(None, stats, op.args[7], stats[3])
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


def _relu(reading: Reading, op: Op) -> None:
    reading.nodes.append(Node("relu", op.module, (reading.value(op.args[0]),), _out(op), relu=True))


def _clamp(reading: Reading, op: Op) -> None:
    low, high = limits(op)
    if low > 0 or high < 0:
        raise EngineError(f"{op.target} in {op.module!r} gives {low} to {high}, which leaves no 0 for what is skipped.")
    node = Node("clamp", op.module, (reading.value(op.args[0]),), _out(op), low=low, high=high)
    reading.nodes.append(node)


def _curve(reading: Reading, op: Op) -> None:
    name = op.target.removeprefix("aten::").rstrip("_")
    slope = float(op.args[1]) if len(op.args) > 1 else 0.01  # torch's default, of leaky_relu alone
    reading.nodes.append(Node("curve", op.module, (reading.value(op.args[0]),), _out(op), curve=name, low=slope))


def _times(reading: Reading, op: Op) -> None:
    """Maps times one number per channel, in either order."""
    if not all(isinstance(arg, Ref) and reading.rec.values[arg.value].name is None for arg in op.args[:2]):
        raise EngineError(f"the product in {op.module or 'the network'!r} is not of two values of the network.")
    sides = sorted(op.args[:2], key=lambda arg: -torch.Size(reading.shape(arg.value)).numel())
    wide, narrow = (reading.shape(arg.value) for arg in sides)
    if len(wide) != 4 or tuple(narrow) != (*wide[:2], 1, 1):
        raise EngineError(f"the product in {op.module or 'the network'!r} is not of maps and one number per channel.")
    reading.nodes.append(Node("times", op.module, tuple(reading.value(arg) for arg in sides), _out(op)))


def _alias(reading: Reading, op: Op) -> None:
    reading.same[_out(op)] = reading.value(op.args[0])


def _view(reading: Reading, op: Op) -> None:
    value, before, after = reading.value(op.args[0]), reading.shape(op.args[0].value), reading.shape(_out(op))
    same = after == before or after == (*before, 1, 1)
    if len(after) not in (2, 4) or after[0] != before[0] or (len(after) == 4 and not same):
        raise EngineError(f"{op.target} in {op.module!r} from {before} to {after} is no flattening.")
    reading.same[_out(op)] = value


def _mean(reading: Reading, op: Op) -> None:
    dims = sorted(d % 4 for d in op.args[1]) if len(op.args) > 1 and op.args[1] else []
    if len(reading.shape(op.args[0].value)) != 4 or dims != [2, 3]:
        raise EngineError(f"the mean in {op.module!r} is not over the pixels of a map.")
    reading.nodes.append(Node("mean", op.module, (reading.value(op.args[0]),), _out(op)))


def _max_pool(reading: Reading, op: Op) -> None:
    args = [*op.args, *[None] * 5][:5]
    kernel, stride, padding, dilation = args[1], args[2] or args[1], args[3] or [0, 0], args[4] or [1, 1]
    node = Node("pool", op.module, (reading.value(args[0]),), _out(op), pooling="max", kernel=pair(kernel))
    reading.nodes.append(replace(node, stride=pair(stride), padding=pair(padding), dilation=pair(dilation)))


def _avg_pool(reading: Reading, op: Op) -> None:
    args = [*op.args, *[None] * 7][:7]
    padding = args[3] or [0, 0]
    counted = args[5] is None or args[5]
    if args[4] or args[6] or (any(padding) and not counted):
        raise EngineError(f"the average pool {op.module!r} divides by more than one number.")
    node = Node("pool", op.module, (reading.value(args[0]),), _out(op), pooling="avg", kernel=pair(args[1]))
    reading.nodes.append(replace(node, stride=pair(args[2] or args[1]), padding=pair(padding)))


def _adaptive_pool(reading: Reading, op: Op) -> None:
    """An average pool to a given size: nothing where maps have it, windows where it divides theirs."""
    sides, wanted = reading.shape(op.args[0].value)[2:], pair(op.args[1])
    if len(sides) != 2 or any(side % size for side, size in zip(sides, wanted, strict=True)):
        raise EngineError(f"the average pool {op.module!r} from {tuple(sides)} to {wanted} has windows of many sizes.")
    if tuple(sides) == wanted:
        _alias(reading, op)
        return
    window = (sides[0] // wanted[0], sides[1] // wanted[1])
    source, more = (reading.value(op.args[0]),), {"pooling": "avg", "kernel": window, "stride": window}
    reading.nodes.append(Node("pool", op.module, source, _out(op), **more))


def _transpose(reading: Reading, op: Op) -> None:
    weight = reading.tensor(op.args[0])
    if weight is not None:
        reading.transposed[_out(op)] = weight


def _addmm(reading: Reading, op: Op) -> None:
    bias, x, weight = op.args[:3] if "addmm" in op.target else (None, *op.args[:2])
    matrix = reading.transposed.get(weight.value) if isinstance(weight, Ref) else None
    if matrix is None or any(op.kwargs.get(k, 1) != 1 for k in ("alpha", "beta")):
        raise EngineError(f"{op.target} in {op.module!r} is not a linear layer.")
    shift = reading.tensor(bias)
    shift = torch.zeros(len(matrix)) if shift is None else shift
    reading.nodes.append(Node("linear", op.module, (reading.value(x),), _out(op), weight=matrix, shift=shift))


def _add(reading: Reading, op: Op) -> None:
    a, b = op.args[:2]
    known = isinstance(a, Ref) and isinstance(b, Ref) and op.kwargs.get("alpha", 1) == 1
    if not known or reading.shape(a.value) != reading.shape(b.value) or len(reading.shape(a.value)) != 4:
        raise EngineError(f"the addition in {op.module or 'the network'!r} is not of two maps of one shape.")
    reading.nodes.append(Node("add", op.module, (reading.value(a), reading.value(b)), _out(op)))


def _cat(reading: Reading, op: Op) -> None:
    axis = op.args[1] if len(op.args) > 1 else 0
    if axis % 4 != 1 or len(reading.shape(_out(op))) != 4:
        raise EngineError(f"the concatenation in {op.module or 'the network'!r} is not over channels of maps.")
    reading.nodes.append(Node("cat", op.module, tuple(reading.value(r) for r in op.args[0]), _out(op)))


CURVES = (*OPEN, "silu", "hardswish", "tanh", "leaky_relu")
RULES: dict[str, Callable[[Reading, Op], None]] = {
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
    "aten::mul.Tensor": _times,
    "aten::mul_.Tensor": _times,
    **{f"aten::{name}{end}": _curve for name in CURVES for end in ("", "_")},
}
