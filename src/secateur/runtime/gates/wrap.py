"""Put gates on a model: which layers can have one is read from a recorded run."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.graph.trace import Op, Recording, Ref, inputs_of, record
from secateur.runtime.gates.fbs import FBS
from secateur.runtime.gates.gated import Gated, gated
from secateur.runtime.gates.prefix import Prefix
from secateur.types import PlanError

RELU = ("aten::relu", "aten::relu_")
ADD = ("aten::add.Tensor", "aten::add_.Tensor")
PASSING = ("aten::max_pool2d_with_indices", "aten::avg_pool2d", "aten::dropout", "aten::mean.dim")


@dataclass(frozen=True)
class Gating:
    """A gated copy of a model, the paths of its gated layers, and why each other convolution is left dense."""

    model: nn.Module
    gated: tuple[str, ...]
    dense: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Chain:
    """A convolution that can be gated, and its batch norm ("" without one)."""

    conv: str
    norm: str


def gate(
    model: nn.Module,
    density: float | Mapping[str, float] | None,
    example: Any,
    *,
    pooling: str = "l1",
    groups: int = 4,
) -> Gating:
    """Return a copy of ``model`` with a gate on every convolution (and batch norm) that a ReLU follows.

    ``density`` in (0, 1] makes FBS gates, one number for all or one per path of a convolution (others stay dense);
    None makes prefix gates of ``groups`` nested groups (RNP).  The copy equals the model as long as its gates
    compute everything (methods of the FBS paper: rho = gamma, phi = 0, shift beta / gamma).  The saving of a layer
    in a residual sum is smaller: its consumers compute the union of the branches.

    Raises ``PlanError`` when nothing can be gated, or a path of ``density`` cannot.

    >>> import torch
    >>> chain = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    >>> gate(chain, 0.5, torch.rand(1, 3, 8, 8)).gated
    ('0',)
    """
    args, kwargs = inputs_of(example)
    found, dense = chains(model, record(model, args, kwargs))
    if isinstance(density, Mapping):
        strangers = sorted(set(density) - {chain.conv for chain in found})
        if strangers:
            why = dict(dense).get(strangers[0], "there is no such convolution")
            raise PlanError(f"{strangers[0]!r} cannot be gated: {why}. Gateable: {[c.conv for c in found]}.")
        dense = (*dense, *((c.conv, "no density given") for c in found if c.conv not in density))
        found = tuple(chain for chain in found if chain.conv in density)
    if not found:
        raise PlanError(f"no convolution can be gated: {'; '.join(f'{p}: {w}' for p, w in dense) or 'there is none'}.")
    model = copy.deepcopy(model)
    for chain in found:
        one = density[chain.conv] if isinstance(density, Mapping) else density
        put_(model, Layer(chain.conv, chain.norm, one, pooling, groups))
    return Gating(model, tuple(chain.conv for chain in found), dense)


@dataclass(frozen=True)
class Layer:
    """A gate as a value: where it sits, the batch norm it took over ("": none), and its kind.

    ``density`` None stands for a prefix gate of ``groups``, a number for an FBS gate with ``pooling``.
    """

    conv: str
    norm: str
    density: float | None
    pooling: str = "l1"
    groups: int = 4

    @classmethod
    def of(cls, row: Any) -> Layer:
        """Return the layer of a JSON object that somebody wrote; raises ``PlanError`` for anything else."""
        kinds = {"conv": str, "norm": str, "density": (float, int, type(None)), "pooling": str, "groups": int}
        if not isinstance(row, dict) or row.keys() != kinds.keys():
            raise PlanError(f"a gate has {', '.join(kinds)}; got {row!r}.")
        wrong = [key for key, kind in kinds.items() if isinstance(row[key], bool) or not isinstance(row[key], kind)]
        if wrong:
            raise PlanError(f"{wrong[0]} of a gate is {row[wrong[0]]!r}.")
        return cls(**row)


def put_(model: nn.Module, layer: Layer) -> None:
    """Put a gate on ``model`` in place; raises ``PlanError`` when ``layer`` does not fit it."""
    conv: Any = _submodule(model, layer.conv)
    norm: Any = _submodule(model, layer.norm) if layer.norm else None
    if type(conv) is not nn.Conv2d or not (norm is None or isinstance(norm, nn.BatchNorm2d)):
        found = type(conv).__name__ if norm is None else f"{type(conv).__name__} and {type(norm).__name__}"
        raise PlanError(f"a gate at {layer.conv!r} takes a Conv2d and its BatchNorm2d; found {found}.")
    if norm is not None and (norm.num_features != conv.out_channels or not norm.affine or norm.running_mean is None):
        raise PlanError(f"the batch norm {layer.norm!r} does not fit the convolution {layer.conv!r}.")
    made = gated(conv, norm, layer.density, layer.pooling, layer.groups)
    made.took = layer.norm
    model.set_submodule(layer.conv, made)
    if layer.norm:
        model.set_submodule(layer.norm, nn.Identity())


def layers(model: nn.Module) -> tuple[Layer, ...]:
    """Return the gates of ``model``, in the order of its modules.

    >>> import torch
    >>> chain = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    >>> layers(gate(chain, 0.5, torch.rand(1, 3, 8, 8)).model)
    (Layer(conv='0', norm='1', density=0.5, pooling='l1', groups=4),)
    """
    found = []
    for path, module in model.named_modules():
        if isinstance(module, Gated) and isinstance(module.gate, FBS):
            found.append(Layer(path, module.took, module.gate.density, module.gate.pooling))
        elif isinstance(module, Gated) and isinstance(module.gate, Prefix):
            found.append(Layer(path, module.took, None, groups=module.gate.groups))
    return tuple(found)


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    return dict(model.named_modules()).get(path)


def chains(model: nn.Module, rec: Recording) -> tuple[tuple[Chain, ...], tuple[tuple[str, str], ...]]:
    """Return the convolutions that can be gated, and (path, reason) of the others, in the order they run."""
    readers: dict[int, list[Op]] = {}
    for op in rec.ops:
        for ref in {arg.value for arg in op.args if isinstance(arg, Ref)}:
            readers.setdefault(ref, []).append(op)
    found: list[Chain] = []
    dense: list[tuple[str, str]] = []
    runs = [op.module for op in rec.ops if op.target == "aten::convolution"]
    for op in rec.ops:
        if op.target == "aten::convolution" and not any(op.module == path for path, _ in dense):
            chain = _chain(model, rec, op, readers, runs.count(op.module))
            if isinstance(chain, Chain):
                found.append(chain)
            else:
                dense.append((op.module, chain))
    return tuple(found), tuple(dense)


def _chain(model: nn.Module, rec: Recording, op: Op, readers: dict[int, list[Op]], runs: int) -> Chain | str:
    """Return the chain that starts at convolution ``op``, or why it cannot be gated."""
    conv = model.get_submodule(op.module)
    if type(conv) is not nn.Conv2d:
        return f"a gate takes the place of a plain nn.Conv2d, this is {type(conv).__name__}"
    if runs != 1:
        return f"it runs {runs} times in one forward pass"
    if conv.padding_mode != "zeros":
        return f"padding mode {conv.padding_mode!r} is not zeros"
    value, norm = op.outs[0], ""
    following = readers.get(_index(value), [])
    if len(following) == 1 and following[0].target == "aten::native_batch_norm":
        norm = following[0].module
        module = model.get_submodule(norm)
        if not isinstance(module, nn.BatchNorm2d) or not module.affine or not module.track_running_stats:
            return "its batch norm has no scale or no running statistics"
        if sum(other.module == norm and other.target == "aten::native_batch_norm" for other in rec.ops) != 1:
            return "its batch norm runs several times in one forward pass"
        value = following[0].outs[0]
    why = _rectified(rec, _index(value), readers)
    return why or Chain(op.module, norm)


def _index(value: int | None) -> int:
    return -1 if value is None else value


def _rectified(rec: Recording, value: int, readers: dict[int, list[Op]]) -> str:
    """Return "" when every way on from ``value`` meets a ReLU, through additions and pooling, else why not."""
    if value in rec.outputs:
        return "its values are an output of the model"
    following = readers.get(value, [])
    if not following:
        return "nothing reads it"
    for op in following:
        if op.target in RELU:
            continue
        if op.target not in ADD + PASSING:
            return f"{op.target} in {op.module or 'the model'} follows, not a ReLU"
        if why := _rectified(rec, _index(op.outs[0]), readers):
            return why
    return ""
