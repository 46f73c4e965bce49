"""What the judge measures: outputs, distances, gradients and coverage, independent of the code under test."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

TOLERANCE = 1e-5  # relative to the largest absolute value of each output
OUTPUT = "output of the model"


def leaves(tree: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    """Yield every tensor in nested containers, dataclasses and plain objects.

    Key-value caches are state of the decoder and no output: their widths follow the cut.
    """
    if type(tree).__name__.endswith("Cache"):
        return
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for part in tree.values():
            yield from leaves(part, depth)
    elif isinstance(tree, list | tuple):
        for part in tree:
            yield from leaves(part, depth)
    elif depth < 5 and hasattr(tree, "__dict__") and not isinstance(tree, nn.Module):
        yield from leaves(vars(tree), depth + 1)


def outputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Run in eval mode without gradients; return copies of all output tensors."""
    model.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        return [t.detach().clone() for t in leaves(model(*args, **kwargs))]


def distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Largest absolute difference relative to the largest absolute value, per output; inf when shapes differ."""
    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        x, y = x.double(), y.double()
        fine = torch.isfinite(x)
        if not torch.equal(fine, torch.isfinite(y)):
            return float("inf")
        if fine.any():
            worst = max(worst, float((x[fine] - y[fine]).abs().max() / x[fine].abs().max().clamp_min(1e-30)))
    return worst


def widen(tree: Any) -> Any:
    """Return the tree with every floating-point tensor in float64 (complex in complex128)."""

    def one(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return x.to(torch.complex128) if x.is_complex() else x.double() if x.is_floating_point() else x

    return pytree.tree_map(one, tree)


def wide(model: nn.Module) -> nn.Module:
    """Return a copy of the model in float64."""
    return copy.deepcopy(model).double()


def gradients(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, bool]:
    """Run backward of the sum of all floating outputs in train mode; parameter -> gradient is finite.

    Parameters without a gradient are absent.  The model is used up: pass a copy.
    """
    model.train()
    torch.manual_seed(0)
    parts = [t for t in leaves(model(*args, **kwargs)) if t.requires_grad]
    total = sum((t.abs() if t.is_complex() else t).float().sum() for t in parts)
    if not isinstance(total, torch.Tensor):
        raise RuntimeError("no output needs a gradient")
    total.backward()
    return {n: bool(torch.isfinite(p.grad).all()) for n, p in model.named_parameters() if p.grad is not None}


def differences(dense: nn.Module, small: nn.Module) -> list[str]:
    """Return what the small model did not keep: names, modes, requires_grad, dtype, tied tensors, hooks."""
    lost = []
    a, b = (dict(m.named_parameters(remove_duplicate=False)) for m in (dense, small))
    if set(a) != set(b):
        lost.append(f"parameters differ: {', '.join(sorted(set(a) ^ set(b))[:4])}")
    same = [n for n in a if n in b]
    changed = [n for n in same if (a[n].requires_grad, a[n].dtype) != (b[n].requires_grad, b[n].dtype)]
    if changed:
        lost.append(f"requires_grad or dtype changed: {', '.join(changed[:4])}")
    if _ties(a) != _ties(b):
        lost.append(f"ties changed: {_ties(a)} {_ties(b)}"[:200])
    if dense.state_dict().keys() != small.state_dict().keys():
        lost.append("state_dict has other keys")
    modules = dict(small.named_modules())
    pairs = [(m, modules.get(n)) for n, m in dense.named_modules()]
    if any(m is not None and n is not None and m.training != n.training for m, n in pairs):
        lost.append("train / eval modes changed")
    if any(n is not None and len(m._forward_hooks) > len(n._forward_hooks) for m, n in pairs):
        lost.append("forward hooks were lost")
    if any(
        p.dim() == 4
        and p.is_contiguous(memory_format=torch.channels_last)
        and not p.is_contiguous()
        and b[n].shape[1] > 1
        and b[n].shape[2:].numel() > 1
        and b[n].is_contiguous()
        for n, p in a.items()
        if n in b
    ):
        lost.append("channels-last memory was lost")
    return lost


def _ties(named: dict[str, nn.Parameter]) -> list[list[str]]:
    by_tensor: dict[int, list[str]] = {}
    for name, tensor in named.items():
        by_tensor.setdefault(id(tensor), []).append(name)
    return sorted(sorted(names) for names in by_tensor.values() if len(names) > 1)


@dataclass(frozen=True)
class Coverage:
    """How much of a model a graph can cut.

    A *layer* is a module that owns a floating parameter of two or more dimensions.  It is *tied to the outputs*
    when the whole output axis of such a parameter (role ``out``) lies in groups frozen because they are outputs of
    the model.  ``fraction``: of the parameters in the layers that are not, how many have a prunable unit on an axis.
    ``unexplained``: layers without any unit that is prunable or frozen with a reason.
    """

    layers: int
    cut: int
    tied: int
    fraction: float
    unexplained: tuple[str, ...]
    frozen: tuple[str, ...]


def coverage(graph: Any, used: set[str]) -> Coverage:
    """Return the coverage of ``graph``; ``used`` names the parameters that take part in the forward pass."""
    prunable, tied, reasons = _unit_states(graph)
    out_axes = {(m.tensor, m.axis) for g in graph.groups for m in g.members if m.role == "out"}
    found: list[tuple[str, int, int, bool, bool]] = []
    frozen_why: list[str] = []
    for path, module in graph.model.named_modules():
        own = [
            (f"{path}.{name}" if path else name, p)
            for name, p in module.named_parameters(recurse=False)
            if p.is_floating_point() and p.dim() >= 2
        ]
        own = [(n, p) for n, p in own if n in used or graph.aliases.get(n) in used]
        if not own:
            continue
        total = inside = 0
        explained, is_tied = False, False
        for name, parameter in own:
            first = graph.aliases.get(name, name)
            axes = graph.axes.get(first, ())
            keepable = np.ones((1,) * parameter.dim(), dtype=bool)
            for k, ids in enumerate(axes):
                if ids is None:
                    continue
                held = ids >= 0
                shape = [1] * parameter.dim()
                shape[k] = -1
                keepable = keepable & ~np.where(held, prunable[ids], False).reshape(shape)
                explained |= bool(np.where(held, prunable[ids] | (reasons[ids] != ""), False).any())
                is_tied |= (first, k) in out_axes and bool(np.where(held, tied[ids], False).all())
            stays = keepable.sum() * (parameter.numel() // keepable.size) if keepable.size else 0
            total += parameter.numel()
            inside += parameter.numel() - int(stays)
        if not inside:
            whys = {
                str(w)
                for n, _ in own
                for ids in graph.axes.get(graph.aliases.get(n, n), ())
                if ids is not None
                for w in reasons[ids[ids >= 0]]
            }
            frozen_why += sorted(w for w in whys if w)[:1]
        noted = any(path in note for note in graph.notes)
        found.append((path, total, inside, is_tied and not inside, explained or noted))
    free = [row for row in found if not row[3]]
    whole = sum(row[1] for row in free)
    return Coverage(
        layers=len(found),
        cut=sum(row[2] > 0 for row in found),
        tied=sum(row[3] for row in found),
        fraction=sum(row[2] for row in free) / whole if whole else 1.0,
        unexplained=tuple(row[0] for row in found if not row[4]),
        frozen=tuple(sorted(set(frozen_why))),
    )


def _unit_states(graph: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    prunable, tied = np.zeros(graph.units + 1, dtype=bool), np.zeros(graph.units + 1, dtype=bool)
    reasons = np.full(graph.units + 1, "", dtype=object)
    for g in graph.groups:
        span = slice(g.offset, g.offset + g.units)
        prunable[span] = g.prunable
        tied[span] = bool(g.frozen) and OUTPUT in g.frozen
        reasons[span] = g.frozen or ""
    return prunable, tied, reasons
