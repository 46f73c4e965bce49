"""Attributes of library modules that repeat the sizes of their tensors, and their values after a cut."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from secateur.attention import fit_attention
from secateur.graph.calls import BoundCall
from secateur.graph.expected import changes, conv_groups, size
from secateur.types import Graph

Attrs = list[tuple[str, str, Any]]  # (module path, attribute, value)
# modules that hold sizes even where no tensor of theirs changes: what they are called with tells
_BY_CALL = nn.LayerNorm | nn.GroupNorm | nn.modules.instancenorm._InstanceNorm | nn.modules.conv._ConvNd


def library_attributes(graph: Graph, kept: np.ndarray, shapes: dict[str, tuple[int, ...]]) -> Attrs:
    """Return the attributes of torch.nn modules (and their subclasses) that must follow the new shapes.

    ``shapes`` maps the names of changed tensors to their new shapes.
    """
    calls: dict[str, BoundCall] = {}
    for call in graph.calls:
        calls.setdefault(call.module, call)
    out: Attrs = []
    owners = {name.rpartition(".")[0].removesuffix(".parametrizations.weight") for name in shapes}
    for path, module in graph.model.named_modules():
        if path in owners:
            out += [(path, name, value) for name, value in _attributes(path, module, shapes, calls.get(path), kept)]
        elif path in calls and isinstance(module, _BY_CALL):
            out += [(path, name, value) for name, value in _attributes(path, module, shapes, calls[path], kept)]
        if isinstance(module, nn.Transformer):
            width = shapes.get(f"{path}.encoder.layers.0.self_attn.in_proj_weight".lstrip("."))
            out += [(path, "d_model", width[1])] if width else []
    return [(path, name, value) for path, name, value in out if _differs(graph.model, path, name, value)]


def _differs(model: nn.Module, path: str, name: str, value: Any) -> bool:
    old = getattr(model.get_submodule(path), name, None)
    return old is not None and old != value and type(old) in (int, tuple, list, bool)


def _attributes(path: str, module: nn.Module, shapes: dict, call: BoundCall | None, kept: np.ndarray) -> Any:
    def new(name: str) -> tuple[int, ...] | None:
        full = f"{path}.{name}" if path else name
        for candidate in (
            full,
            f"{path}.parametrizations.{name}.original",
            f"{path}.parametrizations.{name}.original1",
        ):
            if candidate in shapes:
                return shapes[candidate]
        tensor = getattr(module, name, None)
        return tuple(tensor.shape) if tensor is not None else None

    weight = new("weight") if hasattr(module, "weight") else None
    if isinstance(module, nn.Linear) and weight:
        return [("out_features", weight[0]), ("in_features", weight[1])]
    if isinstance(module, nn.modules.conv._ConvNd) and weight:
        return _convolution(module, weight, call, kept)
    if isinstance(module, nn.modules.batchnorm._NormBase):
        stat = weight or new("running_mean")
        if stat is None and call is not None and call.name == "instance_norm":
            at = len(call.shapes[0]) - {"1": 2, "2": 3, "3": 4}[type(module).__name__[-2]]
            stat = (size(call.inputs[0][at], kept, call.shapes[0][at]),)
        return [("num_features", stat[0])] if stat else []
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) and isinstance(module.normalized_shape, tuple):
        if call is not None and call.name in ("layer_norm", "rms_norm"):
            rank, have = len(call.shapes[0]), len(module.normalized_shape)
            want = tuple(size(call.inputs[0][k], kept, call.shapes[0][k]) for k in range(rank - have, rank))
            return [("normalized_shape", want)]
        return [("normalized_shape", weight)] if weight else []
    if isinstance(module, nn.GroupNorm):
        out = [("num_channels", weight[0])] if weight else []
        if call is not None and call.name == "group_norm" and call.inputs[0][1] is not None:
            out = [("num_channels", size(call.inputs[0][1], kept, 0))]
            found = changes(call, kept, call.args, call.kwargs)
            out += [("num_groups", found[0][1])] if found else []
        return out
    if isinstance(module, nn.Embedding) and weight:
        return [("embedding_dim", weight[1])]
    if isinstance(module, nn.RNNBase):
        hh, ih = new("weight_hh_l0"), new("weight_ih_l0")
        if not (hh and ih):
            return []
        sizes = [("hidden_size", hh[0] // _gates(module)), ("input_size", ih[1])]
        return [*sizes, ("proj_size", hh[1])] if module.proj_size else sizes
    if isinstance(module, nn.Bilinear) and weight:
        return [("out_features", weight[0]), ("in1_features", weight[1]), ("in2_features", weight[2])]
    if isinstance(module, nn.PReLU) and weight:
        return [("num_parameters", weight[0])]
    return []


def _gates(module: nn.RNNBase) -> int:
    return {"LSTM": 4, "GRU": 3}.get(module.mode, 1)


def _convolution(module: Any, weight: tuple[int, ...], call: BoundCall | None, kept: np.ndarray) -> Any:
    if call is not None and call.name.startswith("conv"):
        groups = conv_groups(call, kept)
    elif module.groups == module.in_channels and weight[1] == 1:
        groups = weight[0] * module.in_channels // module.out_channels
    else:
        groups = module.groups
    outer, inner = (weight[1] * groups, weight[0]) if module.transposed else (weight[0], weight[1] * groups)
    return [("out_channels", outer), ("in_channels", inner), ("groups", groups)]


def attention_swaps(graph: Graph, shapes: dict[str, tuple[int, ...]], kept: np.ndarray) -> Any:
    """Return (module path, attributes) for every nn.MultiheadAttention whose tensors change."""
    out = []
    for path, module in graph.model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            found = fit_attention(path, module, graph, shapes, kept)
            if found:
                out.append((path, found))
    return tuple(out)
