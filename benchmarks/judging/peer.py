"""The same judgement for Torch-Pruning in plain use: what a reader of its README would write.

``MagnitudePruner(model, example_inputs, importance=MagnitudeImportance(p=2), pruning_ratio=0.5)`` with the layers
that make the outputs left alone; no hints for single models.  Every group is first zeroed in place and then cut:
the two must agree (models with a norm over a cut axis are exempt, as for secateur).
"""

from __future__ import annotations

import copy
import inspect
import time
from typing import Any

import torch
from torch import nn

import secateur as sc
from benchmarks.judging.checks import distance, gradients, leaves, outputs, wide, widen
from benchmarks.suites.case import Case

MIXING = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
TOLERANCE = 1e-4


def judge_peer(case: Case) -> dict[str, Any]:
    """Return a row like ``judge``: ``right``, ``frozen`` (nothing was cut), ``wrong`` or ``error``."""
    row: dict[str, Any] = {"status": "right", "reason": ""}
    begin = time.perf_counter()
    try:
        _judge(case, row)
    except Exception as error:
        row.update(status="error", reason=" ".join(f"{type(error).__name__}: {error}".split())[:400])
    row["seconds"] = round(time.perf_counter() - begin, 2)
    return row


def _judge(case: Case, row: dict[str, Any]) -> None:
    import torch_pruning as tp

    model, args, kwargs = case.build()
    row["dense"] = sum(p.numel() for p in model.parameters())
    shapes = {b: [t.shape for t in outputs(model, *case.feed(b))] for b in case.batches}
    pruner = tp.pruner.MagnitudePruner(
        model,
        example_inputs=kwargs if kwargs else (args if len(args) > 1 else args[0]),
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=_output_layers(model, args, kwargs),
    )
    exact = all(g.exact for g in sc.trace(copy.deepcopy(model), _inputs(args, kwargs, model)).groups)
    wrong: list[str] = []
    for group in pruner.step(interactive=True):
        before = None if _mixes(group) or not exact else _zeroed(pruner, group, model, args, kwargs)
        group.prune()
        if before is not None:
            gap = distance(before, outputs(wide(model), *widen((args, kwargs))))
            if gap > TOLERANCE:
                wrong.append(f"{group[0].dep.target.name}: {gap:.1e}")
    row["kept"] = sum(p.numel() for p in model.parameters())
    if row["kept"] == row["dense"]:
        row.update(status="frozen", reason="nothing was cut")
        return
    for batch, want in shapes.items():
        if case.suite != "detection" and [t.shape for t in outputs(model, *case.feed(batch))] != want:
            wrong.append(f"output shapes differ at batch {batch}")
    gradients(copy.deepcopy(model), *case.feed(case.batches[1], train=True))
    if wrong:
        row.update(status="wrong", reason="; ".join(wrong)[:400])


def _output_layers(model: nn.Module, args: Any, kwargs: Any) -> list[nn.Module]:
    """Return the layers nearest to the outputs: found backwards along the autograd graph."""
    owner = {id(p): m for m in model.modules() for p in m.parameters(recurse=False)}
    found: dict[int, nn.Module] = {}
    frozen = [p for p in model.parameters() if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(p.is_floating_point())
    todo = [t.grad_fn for t in leaves(model(*args, **kwargs)) if t.grad_fn is not None]
    for p in frozen:
        p.requires_grad_(False)
    seen = set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        following = [f for f, _ in node.next_functions if f is not None]
        near = [_layer(f, owner) for f in following]
        layers = [m for m in near if isinstance(m, nn.Linear | nn.Embedding | nn.modules.conv._ConvNd)]
        found.update({id(m): m for m in layers})
        if not layers:
            todo += following
    return list(found.values())


def _layer(node: Any, owner: dict[int, nn.Module]) -> nn.Module | None:
    """Return the module whose weight enters at ``node`` (directly, or transposed as in a linear layer)."""
    for _ in range(2):
        if hasattr(node, "variable"):
            return owner.get(id(node.variable))
        if type(node).__name__ != "TBackward0":
            return None
        node = node.next_functions[0][0]
    return None


def _inputs(args: Any, kwargs: Any, model: nn.Module) -> Any:
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments) if kwargs else args


def _mixes(group: Any) -> bool:
    return any(isinstance(item.dep.target.module, MIXING) for item in group)


def _zeroed(pruner: Any, group: Any, model: nn.Module, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Return the outputs with the units of ``group`` zeroed in place."""
    with torch.no_grad():
        for item in group:
            module, out = item.dep.target.module, pruner.DG.is_out_channel_pruning_fn(item.dep.handler)
            if isinstance(module, nn.Parameter):
                continue
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if tensor.dim() == 0 or not tensor.is_floating_point():
                    continue
                axis = _axis(module, name, tensor, out)
                if axis is not None and max(item.idxs, default=0) < tensor.shape[axis]:
                    tensor.index_fill_(axis, torch.tensor(item.idxs), 0)
    return outputs(wide(model), *widen((args, kwargs)))


def _axis(module: nn.Module, name: str, tensor: torch.Tensor, out: bool) -> int | None:
    if tensor.dim() == 1:
        return 0 if out or isinstance(module, nn.modules.batchnorm._BatchNorm) else None
    if isinstance(module, nn.Embedding):
        return 1
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    if getattr(module, "groups", 1) > 1:
        return 0 if out or module.groups == module.in_channels else None
    return int(not out) if not transposed else int(out)
