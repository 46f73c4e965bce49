"""Build the smaller model that a plan describes: same class, same code, smaller tensors."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.attention import swap
from secateur.graph.state import plain_dicts
from secateur.graph.verify import check_compact
from secateur.hollow import hollow
from secateur.mask import masked, tensors_of, unmasked
from secateur.patch import Patch, install, installed
from secateur.sizes import attention_swaps, library_attributes
from secateur.types import CheckpointError, Graph, Plan, PlanError

LINEAGE = "_secateur"


@dataclass(frozen=True)
class Surgery:
    """Everything that turns a dense model's structure into the small one's, as data.

    ``shapes``: new shape of each changed tensor; ``attributes``: (module, attribute, value); ``patches``: size
    patches; ``swaps``: attention modules with free sizes; ``caches``: (module, attribute) of plain dicts that a run
    fills, and that start empty.  ``slices`` (kept positions per tensor axis) is known in
    the process that made the cut and is not saved.
    """

    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    attributes: tuple[tuple[str, str, Any], ...] = ()
    patches: tuple[Patch, ...] = ()
    swaps: tuple[tuple[str, str], ...] = ()
    caches: tuple[tuple[str, str], ...] = ()
    slices: dict[str, tuple[tuple[int, np.ndarray], ...]] = field(default_factory=dict, compare=False, repr=False)

    def to_json(self) -> str:
        """Return JSON text of all but ``slices``."""
        return json.dumps(
            {
                "shapes": [[n, list(s)] for n, s in self.shapes],
                "attributes": [
                    [p, a, list(v) if isinstance(v, tuple) else v, isinstance(v, tuple)] for p, a, v in self.attributes
                ],
                "patches": [
                    [p.module, p.index, p.name, [[list(path), v] for path, v in p.changes]] for p in self.patches
                ],
                "swaps": [list(s) for s in self.swaps],
                "caches": [list(c) for c in self.caches],
            }
        )

    @staticmethod
    def from_json(text: str) -> Surgery:
        """Return the surgery written by ``to_json``; raises ``CheckpointError`` on anything else."""
        try:
            data = json.loads(text)
            shapes = tuple((str(n), tuple(int(x) for x in s)) for n, s in data["shapes"])
            attributes = tuple(
                (str(p), str(a), tuple(v) if is_tuple else v) for p, a, v, is_tuple in data["attributes"]
            )
            patches = tuple(
                Patch(str(m), int(i), str(n), tuple((tuple(path), v) for path, v in rows))
                for m, i, n, rows in data["patches"]
            )
            swaps = tuple((str(p), str(v)) for p, v in data["swaps"])
            caches = tuple((str(p), str(v)) for p, v in data["caches"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the surgery of this file is not one written by secateur ({error!r}).") from error
        return Surgery(shapes, attributes, patches, swaps, caches)


def compact(graph: Graph, plan: Plan, *, verify: bool = True) -> nn.Module:
    """Return a new, smaller model of the same class; ``graph.model`` stays as it is.

    Parameters, buffers and size attributes follow the plan; train / eval state, requires_grad, tied weights, dtype,
    device, memory format and hooks are kept.  Where the class's own forward fixes sizes in its code, the module
    gets a size patch (``patch.SizedForward``).  With ``verify`` the masked and the small model are compared on the
    example inputs (exact groups only: a norm over fewer units is another function by definition).  A mask in place
    is taken off for the time.

    Raises ``PlanError`` for a plan of another graph or of kernels and weights (masks only), ``VerificationError``
    when masked and compact disagree.

    >>> import torch, secateur as sc
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> graph = sc.trace(net, torch.rand(1, 4))
    >>> plan = sc.allocate(sc.score(graph, sc.criteria.Magnitude()), sc.Budget(units=0.5), round_to=None)
    >>> sc.compact(graph, plan)[0]
    Linear(in_features=4, out_features=4, bias=True)
    """
    if plan.granularity in ("kernel", "weight"):
        raise PlanError(f"single {plan.granularity}s can be masked, not cut out; use sc.mask_, or prune channels.")
    with unmasked(graph.model):
        small = _cut(graph, plan.kept(graph))
        if verify:
            with masked(graph, plan):
                check_compact(graph, plan, small)
    return small


def _cut(graph: Graph, kept: np.ndarray) -> nn.Module:
    slices, tensors = _slice(graph, kept)
    shapes = {name: tuple(tensors[name].shape) for name in slices}
    swaps = attention_swaps(graph, shapes, kept)
    swapped = {path for path, _ in swaps}
    attributes = tuple(
        (path, name, value) for path, name, value in library_attributes(graph, kept, shapes) if path not in swapped
    )
    small = copy_model(graph.model, tensors)
    surgery = Surgery(
        shapes=tuple(sorted(shapes.items())),
        attributes=attributes,
        swaps=tuple((p, json.dumps(a)) for p, a in swaps),
        caches=graph.caches,
        slices=slices,
    )
    _restructure(small, surgery)
    from secateur.fit import fit

    surgery = fit(graph, kept, small, surgery)
    small.__dict__[LINEAGE] = _after(graph.model.__dict__.get(LINEAGE), surgery, small)
    return small


def _after(before: Any, surgery: Surgery, small: nn.Module) -> Surgery:
    """The surgery that leads from the first dense model to ``small`` when its parent was compacted already."""
    if not isinstance(before, Surgery):
        return surgery
    shapes = {**dict(before.shapes), **dict(surgery.shapes)}
    rows = {(path, name): value for path, name, value in (*before.attributes, *surgery.attributes)}
    attributes = tuple((path, name, value) for (path, name), value in rows.items())
    swaps = {**dict(before.swaps), **dict(surgery.swaps)}
    return replace(
        surgery,
        shapes=tuple(sorted(shapes.items())),
        attributes=attributes,
        patches=installed(small),
        swaps=tuple(swaps.items()),
    )


def _slice(
    graph: Graph, kept: np.ndarray
) -> tuple[dict[str, tuple[tuple[int, np.ndarray], ...]], dict[str, torch.Tensor]]:
    """Return the kept positions of every tensor that shrinks, and the small tensors."""
    dense = tensors_of(graph.model)
    slices, tensors = {}, {}
    for name, axes in graph.axes.items():
        parts = tuple(
            (axis, np.flatnonzero(kept[ids]))
            for axis, ids in enumerate(axes)
            if ids is not None and not kept[ids].all()
        )
        if not parts:
            continue
        old = dense[name]
        slices[name] = parts
        tensors[name] = _like(old, take(old.detach(), parts))
    for alias, name in graph.aliases.items():
        if name in tensors:
            tensors[alias] = tensors[name]
    return slices, tensors


def take(tensor: torch.Tensor, parts: tuple[tuple[int, np.ndarray], ...]) -> torch.Tensor:
    """Return the kept positions of ``tensor`` along each axis, in its memory format."""
    out = tensor
    for axis, positions in sorted(parts, key=lambda part: len(part[1]) / max(out.shape[part[0]], 1)):
        out = out.index_select(axis, torch.from_numpy(positions).to(tensor.device))
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
        out = out.contiguous(memory_format=torch.channels_last)
    return out


def _like(old: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    if isinstance(old, nn.Parameter):
        return nn.Parameter(data, requires_grad=old.requires_grad)
    return data


def copy_model(model: nn.Module, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """Deep copy in which the named tensors are already the small ones: the dense ones are never copied."""
    memo: dict[int, Any] = {}
    for name, old in tensors_of(model).items():
        if name in tensors:
            memo[id(old)] = tensors[name]
    for module in model.modules():  # tensors computed by hooks (weight_norm) are not leaves: deepcopy refuses them
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    lineage = model.__dict__.pop(LINEAGE, None)
    try:
        return copy.deepcopy(model, memo)
    finally:
        if lineage is not None:
            model.__dict__[LINEAGE] = lineage


def reshape(model: nn.Module, surgery: Surgery) -> nn.Module:
    """Return a copy of a dense model with the small structure; its tensors hold the first positions of each axis.

    Used by ``load``: the values come from the file afterwards.  Raises ``CheckpointError`` when the model does not
    have the tensors and modules that the surgery names.
    """
    dense = tensors_of(model)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in surgery.shapes:
        old = dense.get(name)
        if old is None or old.dim() != len(shape) or any(b < 0 or b > a for a, b in zip(old.shape, shape, strict=True)):
            found = "no such tensor" if old is None else f"shape {tuple(old.shape)}"
            raise CheckpointError(
                f"the file cuts {name!r} to {shape}, this model has {found}; load it onto its own dense model."
            )
        tensors[name] = _like(old, old.detach()[tuple(slice(0, n) for n in shape)].clone())
    for name, old in dense.items():  # every name of a tied tensor
        for other, new in list(tensors.items()):
            if dense[other] is old:
                tensors[name] = new
    small = copy_model(model, tensors)
    _restructure(small, surgery)
    small.__dict__[LINEAGE] = surgery
    return small


def _restructure(model: nn.Module, surgery: Surgery) -> None:
    modules = dict(model.named_modules())
    for path, name, value in surgery.attributes:
        module = modules.get(path)
        if module is None or type(getattr(module, name, None)) not in (int, tuple, list) or name not in vars(module):
            raise CheckpointError(f"the surgery sets {path}.{name}, which this model does not have.")
        setattr(module, name, value)
    for path, attributes in surgery.swaps:
        if not isinstance(modules.get(path), nn.MultiheadAttention):
            raise CheckpointError(f"the surgery fits attention {path!r}, which this model does not have.")
        swap(model, path, json.loads(attributes))
    for path, name in surgery.caches:  # filled by a run of the dense model: of dense size
        held = dict(plain_dicts(modules[path])).get(name) if path in modules else None
        if held is None:
            raise CheckpointError(f"the surgery empties the cache {path}.{name}, which this model does not have.")
        held.clear()
    missing = {p.module for p in surgery.patches} - set(modules)
    if missing:
        raise CheckpointError(f"the surgery patches {sorted(missing)[0]!r}, which this model does not have.")
    install(model, surgery.patches)
    hollow(model)


def compact_optimizer(optimizer: torch.optim.Optimizer, graph: Graph, small: nn.Module) -> torch.optim.Optimizer:
    """Return a new optimiser over ``small`` with the options of ``optimizer`` and its state cut along.

    Momenta of the units that stay are kept (tensors of a parameter's shape are sliced, others copied).  Raises
    ``PlanError`` when ``small`` was not made from ``graph`` in this process.
    """
    surgery = small.__dict__.get(LINEAGE)
    if not isinstance(surgery, Surgery) or (surgery.shapes and not surgery.slices):
        raise PlanError("this model was not compacted in this process; call sc.compact first and pass its result.")
    new = dict(small.named_parameters(remove_duplicate=False))
    names = {id(p): n for n, p in graph.model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        kept = [new[names[id(p)]] for p in group["params"] if id(p) in names]
        groups.append({**{k: v for k, v in group.items() if k != "params"}, "params": kept})
    result = type(optimizer)(groups, **_defaults(optimizer))
    for group in optimizer.param_groups:
        for p in group["params"]:
            if id(p) in names and p in optimizer.state:
                parts = surgery.slices.get(names[id(p)], ())
                result.state[new[names[id(p)]]] = {
                    k: (
                        take(v, parts).clone()
                        if isinstance(v, torch.Tensor) and v.shape == p.shape
                        else copy.deepcopy(v)
                    )
                    for k, v in optimizer.state[p].items()
                }
    return result


def _defaults(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    import inspect

    allowed = inspect.signature(type(optimizer).__init__).parameters
    return {k: v for k, v in optimizer.defaults.items() if k in allowed}
