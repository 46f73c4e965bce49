"""One pass over the data: what probes and the weight identity show of every group, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from secateur.criteria.evidence import BACKWARD, STREAMED, unit_slices
from secateur.criteria.probes import Probes
from secateur.criteria.shares import Shares
from secateur.types import Graph, Group, Member, PlanError

Loss = Callable[[nn.Module, Any], Tensor]
Rows = dict[str, Tensor]  # evidence name -> (samples, units); "positions" -> (samples,), of STREAMED -> (units,)

# how a scalar loss joins its n samples -> the factor that turns its gradient into those of the samples
REDUCTIONS: dict[str, Callable[[int], int]] = {"mean": lambda n: n, "sum": lambda n: 1}


@dataclass(frozen=True)
class Pass:
    """``loss(model, batch)``: a scalar, joined by ``reduction``, or one per sample.  Stop after ``samples``."""

    loss: Loss
    reduction: str = "mean"
    samples: int | None = None


@dataclass(frozen=True, eq=False)
class _Batch:
    """``samples``, what turns dL/da into dL_n/da, and w * dL/dw of the parameters without a probe."""

    samples: int
    scale: int
    products: dict[str, Tensor]


def gather(graph: Graph, names: frozenset[str], batches: Iterable[Any], how: Pass) -> dict[str, Rows]:
    """Return group -> evidence of ``names``, for the prunable groups of which all were seen.

    Raises ``PlanError`` when there is no batch, or a loss is not finite.
    """
    groups = [group for group in graph.groups if group.prunable]
    device = next((p.device for p in graph.model.parameters()), torch.device("cpu"))
    members = {group.name: unwatched(graph, group) if names & BACKWARD else [] for group in groups}
    parts: dict[str, list[Rows]] = {group.name: [] for group in groups}
    shown: dict[str, set[str]] = {group.name: set() for group in groups}
    samples = 0
    tensors = {member.tensor for found in members.values() for member in found}
    rowed = names - STREAMED
    with (
        _undisturbed(graph.model, tensors) as leaves,
        Probes(graph.model, groups, rowed, device) as probes,
        Shares(graph, groups, names) as shares,
    ):
        for number, batch in enumerate(batches):
            done = _run(graph.model, probes, leaves, _moved(batch, device), (how, number))
            for group in groups:
                rows, seen = _rows(group, members[group.name], probes, done)
                parts[group.name].append(rows)
                shown[group.name] |= seen
            samples += done.samples
            if how.samples is not None and samples >= how.samples:
                break
    if not samples:
        raise PlanError("batches is empty; scores need at least one sample.")
    streamed = {group.name: shares.read(group) for group in groups}
    whole = [name for name, seen in shown.items() if seen | streamed[name].keys() == names]
    joined = {name: {k: torch.cat([part[k] for part in parts[name]]) for k in parts[name][0]} for name in whole}
    return {name: rows | streamed[name] for name, rows in joined.items()}


def unwatched(graph: Graph, group: Group) -> list[Member]:
    """Return the parameters that consume the units where no site shows it.

    For these, the sum of w * dL/dw over the slice of a unit equals the sum of a * g over its values, for the
    batch as a whole.  Where nothing at all consumes the units through a parameter, their producers stand in.
    """
    parameters = {name for name, p in graph.model.named_parameters() if p.is_floating_point()}
    present = [member for member in group.members if member.tensor in parameters]
    consumers = [member for member in present if member.role == "in"]
    if not consumers and not group.sites:
        return [member for member in present if member.role == "out"]
    names: dict[str, list[str]] = {}
    for alias, first in graph.aliases.items():
        names.setdefault(first, []).append(alias)
    seen = tuple(site.module + "." for site in group.sites)
    return [m for m in consumers if not any(n.startswith(seen) for n in (m.tensor, *names.get(m.tensor, ())))]


def _run(model: nn.Module, probes: Probes, leaves: dict[str, Tensor], batch: Any, how: tuple[Pass, int]) -> _Batch:
    """Run one batch forward, and backward to the probes and ``leaves``."""
    one, number = how
    n = _batch_size(batch)
    probes.start(n)
    backward = bool(probes.names & BACKWARD)
    with torch.set_grad_enabled(backward):
        loss = one.loss(model, batch)
    scale = 1 if loss.dim() else REDUCTIONS[one.reduction](n)
    loss = loss.sum()
    if not torch.isfinite(loss):
        raise PlanError(f"the loss of batch {number} is {loss.item()}; scores need finite losses.")
    if not backward:
        return _Batch(n, scale, {})
    _, *grads = torch.autograd.grad(loss, [probes.pulse, *leaves.values()], allow_unused=True)
    pairs = zip(leaves.items(), grads, strict=True)
    return _Batch(n, scale, {k: w.detach().float() * g.float() for (k, w), g in pairs if g is not None})


def _rows(group: Group, members: list[Member], probes: Probes, batch: _Batch) -> tuple[Rows, set[str]]:
    """Return the evidence of one batch, and the names of which there was any; what did not run has zeros."""
    count = probes.positions(group)
    zeros = probes.pulse.new_zeros(batch.samples, group.units).detach()
    rows: Rows = {"positions": zeros.new_full((batch.samples,), float(count))}
    seen = set()
    for name in probes.names:
        values = probes.read(group, name)
        total = zeros if values is None else values * batch.scale if name in BACKWARD else values / count
        products = [(m, batch.products[m.tensor]) for m in members if m.tensor in batch.products]
        for member, product in products if name in BACKWARD else ():
            slices = unit_slices(member, product)
            sums = (slices.abs() if name == "unit_grads_abs" else slices).sum(1)
            total = total + sums * (batch.scale / batch.samples)  # one mean for every sample
        rows[name] = total
        if values is not None or (products and name in BACKWARD):
            seen.add(name)
    return rows, seen


@contextmanager
def _undisturbed(model: nn.Module, tensors: set[str]) -> Iterator[dict[str, Tensor]]:
    """Put the model in eval mode, let the parameters named ``tensors`` have gradients; undo it all."""
    leaves: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if name in tensors}
    frozen = [p for p in leaves.values() if not p.requires_grad]
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        model.eval()
        for parameter in frozen:
            parameter.requires_grad_(True)
        with (
            torch.random.fork_rng(devices),
            torch.inference_mode(False),
            # cuDNN has no backward pass for recurrent layers in eval mode
            torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled and not recurrent),
        ):
            yield leaves
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Mapping) and hasattr(batch, "to"):  # e.g. the batches of transformers' tokenizers
        return batch.to(device)
    return _pytree.tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), batch)


def _batch_size(batch: Any) -> int:
    """Return the length of the first axis of the first tensor in ``batch``."""
    leaves = _pytree.tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    first = next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), None)
    if first is None or not len(first):
        raise PlanError("a batch holds no tensor with samples along its first axis; check the batches.")
    return len(first)
