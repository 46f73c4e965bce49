"""Fold: take out units that a model no longer uses, or whose value is a constant that can be added further on.

Masks leave zeros behind.  A unit whose consumers are all zero can go as it is.  A unit whose producers are all zero
has the same value at every position of every input, its bias through norm and activation; what follows gets the
contribution of that value added to its own bias, and then the unit can go too.  Not everywhere: a convolution that
pads with zeros sees another value at the border, so there only a unit whose value is 0 can go.  What stays for such
a reason is listed.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from secateur.compact import compact
from secateur.graph.groups import group as grouped
from secateur.graph.state import eval_mode, state_kept
from secateur.graph.trace import record
from secateur.graph.verify import distance, outputs, tolerance
from secateur.mask import tensors_of
from secateur.types import Graph, Group, Member, Plan, SecateurError

ROUNDS = 64
BORDER = "its constant is another one at the border of a convolution that pads with zeros"
NOWHERE = "the layer behind it has neither a bias nor a batch norm that could take its constant"
UNKNOWN = "where its constant is used cannot be seen"
LAST = "one unit of each group stays"


@dataclass(frozen=True, eq=False)
class Folded:
    """The smaller model, what each round took out (a plan of the graph before it), and what stays and why.

    ``error`` is the largest relative difference of the outputs on the example inputs and on noise; ``stays`` lists
    (group, units, reason) of units that do nothing and could not be taken out.
    """

    model: nn.Module
    plans: tuple[Plan, ...]
    error: float
    stays: tuple[tuple[str, int, str], ...]

    @property
    def removed(self) -> dict[str, int]:
        """Units that went, by group."""
        total: Counter[str] = Counter()
        for name, units, kept in itertools.chain.from_iterable(plan.keep for plan in self.plans):
            total[name] += units - len(kept)
        return dict(total)


def fold(graph: Graph) -> Folded:
    """Return a copy of ``graph.model`` without the units that do nothing, the same function in eval mode.

    Works on the zeros that are there, whoever put them there.  Taking a unit out can leave another one without a
    consumer or with a constant value, so it goes round until nothing changes.  Every round is compared with the
    model as it was given; a group where the outputs would differ by more than the tolerance of the model's type
    (float32: 1e-5 relative) stays whole.

    >>> import secateur as sc
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> _ = net[0].weight.data[:3].zero_(), net[2].weight.data[:, 6:].zero_()
    >>> fold(sc.trace(net, torch.rand(1, 4))).model
    Sequential(
      (0): Linear(in_features=4, out_features=3, bias=True)
      (1): ReLU()
      (2): Linear(in_features=3, out_features=2, bias=True)
    )
    """
    probes = _probes(graph)
    base = [_run(graph, probe) for probe in probes]
    plans: list[Plan] = []
    error, stays = 0.0, ()
    for _ in range(ROUNDS):
        step = _round(graph, probes, base)
        stays = step.stays
        if step.model is None:
            break
        plans.append(step.plan)
        error = step.error
        begin = time.perf_counter()
        recording = record(step.model, graph.args, graph.kwargs)
        graph = grouped(step.model, graph.args, graph.kwargs, recording, begin)
    model = graph.model if plans else copy.deepcopy(graph.model)
    return Folded(model, tuple(plans), error, stays)


@dataclass(frozen=True, eq=False)
class _Step:
    """One round: the smaller model (None: nothing to take out), its plan, its error, and what stays."""

    model: nn.Module | None
    plan: Plan
    error: float
    stays: tuple[tuple[str, int, str], ...]


def _round(graph: Graph, probes: Sequence[Any], base: Sequence[list[torch.Tensor]]) -> _Step:
    idle = _idle(graph)
    silent = {g.name: _silent(graph, g, idle) & ~idle[g.offset : g.offset + g.units] for g in _open(graph)}
    watch = _Watch(graph, {name for name, units in silent.items() if units.any()})
    for probe in probes:
        watch.run(probe)
    refused: list[tuple[str, int, str]] = []
    takes: dict[str, np.ndarray] = {}
    for group in _open(graph):
        units = idle[group.offset : group.offset + group.units].copy()
        if silent[group.name].any():
            for unit in np.flatnonzero(silent[group.name]).tolist():
                reason = watch.refusal(group, unit)
                units[unit] = reason is None
                if reason is not None:
                    refused.append((group.name, 1, reason))
        if units.all():
            units[0] = False
            refused.append((group.name, 1, LAST))
        if units.any():
            takes[group.name] = units
    stays = tuple((name, count, why) for (name, why), count in Counter((n, w) for n, _, w in refused).items())
    chosen = _try(graph, watch, takes, probes, base)
    if chosen is None and len(takes) > 1:  # find the groups that can be done
        sound = {name for name in takes if _try(graph, watch, {name: takes[name]}, probes, base)}
        chosen = _try(graph, watch, {n: u for n, u in takes.items() if n in sound}, probes, base)
    if chosen is None:
        return _Step(None, Plan(graph.fingerprint, ()), 0.0, stays)
    return replace(chosen, stays=stays)


def _try(
    graph: Graph,
    watch: _Watch,
    takes: Mapping[str, np.ndarray],
    probes: Sequence[Any],
    base: Sequence[list[torch.Tensor]],
) -> _Step | None:
    """Take these units out; None when there are none, or when that is not the same function."""
    if not takes:
        return None
    rows = tuple((name, len(gone), tuple(np.flatnonzero(~gone).tolist())) for name, gone in takes.items())
    plan = Plan(graph.fingerprint, rows)
    changed = copy.deepcopy(graph.model)
    for name, gone in takes.items():
        watch.correct(changed, graph.group(name), np.flatnonzero(gone))
    try:
        small = compact(replace(graph, model=changed), plan)
        found = [_run(replace(graph, model=small), probe) for probe in probes]
    except (SecateurError, RuntimeError):
        return None
    error = max(distance(a, b) for a, b in zip(base, found, strict=True))
    return _Step(small, plan, error, ()) if error <= tolerance(graph.model) else None


def _open(graph: Graph) -> list[Group]:
    """Groups in which taking a unit out equals zeroing it."""
    return [group for group in graph.groups if group.prunable and group.exact]


def _idle(graph: Graph) -> np.ndarray:
    """Return a bool per unit id: all its consumers are zero, those of idle units not counted."""
    idle = np.zeros(graph.units + 1, dtype=bool)
    tensors = tensors_of(graph.model)
    nonzero = {m.tensor: _nonzero(tensors[m.tensor]) for g in _open(graph) for m in g.members if m.role == "in"}
    while True:
        before = int(idle.sum())
        for group in _open(graph):
            consumers = [member for member in group.members if member.role == "in"]
            if consumers:
                used = [_used(graph, member, nonzero[member.tensor], idle) for member in consumers]
                idle[group.offset : group.offset + group.units] = ~np.logical_or.reduce(used)
        if int(idle.sum()) == before:
            return idle


def _nonzero(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.detach() != 0).cpu().numpy()


def _used(graph: Graph, member: Member, nonzero: np.ndarray, idle: np.ndarray) -> np.ndarray:
    """Return per unit: does ``member`` hold a weight that is not zero and not only there for idle units?"""
    for axis, ids in enumerate(graph.axes[member.tensor]):
        if ids is not None and axis != member.axis and idle[ids].any():
            keep = np.ones(nonzero.shape[axis], dtype=bool)
            keep[idle[ids]] = False
            nonzero = nonzero & keep.reshape([-1 if k == axis else 1 for k in range(nonzero.ndim)])
    rest = tuple(k for k in range(nonzero.ndim) if k != member.axis)
    positions = np.asarray(nonzero.any(axis=rest))
    return np.asarray(positions[member.index].any(axis=1))


def _silent(graph: Graph, group: Group, idle: np.ndarray) -> np.ndarray:
    """Return a bool per unit: all weights that produce it are zero, those of idle units not counted."""
    tensors = tensors_of(graph.model)
    producers = [member for member in group.members if member.role == "out"]
    if not producers:
        return np.zeros(group.units, dtype=bool)
    return ~np.logical_or.reduce([_used(graph, m, _nonzero(tensors[m.tensor]), idle) for m in producers])


def _probes(graph: Graph) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return the example inputs, and the same with noise of their size and of ten times it for the floating ones."""
    rng = torch.Generator().manual_seed(0)

    def noisy(tree: Any, scale: float) -> Any:
        def one(x: Any) -> Any:
            if not isinstance(x, torch.Tensor) or not x.is_floating_point():
                return x
            noise = torch.randn(x.shape, generator=rng).to(x)
            return noise * (scale * x.abs().max().clamp_min(1e-3))

        return torch.utils._pytree.tree_map(one, tree)

    return [(graph.args, graph.kwargs), *((noisy(graph.args, s), noisy(graph.kwargs, s)) for s in (1.0, 10.0))]


def _run(graph: Graph, probe: tuple[tuple[Any, ...], dict[str, Any]]) -> list[torch.Tensor]:
    return outputs(graph.model, replace(graph, args=probe[0], kwargs=probe[1]))


@dataclass(eq=False)
class _Watch:
    """What the consumers of silent units were given in the probes: per module and call, the values it saw.

    ``seen``: (group, place among its sites) -> values (units, positions) and whether they never varied.
    """

    graph: Graph
    names: set[str]
    seen: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    norms: dict[str, str] = field(default_factory=dict)
    runs: int = 0

    def run(self, probe: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        """Run the model once and note what its modules are given."""
        model = self.graph.model
        made: dict[str, torch.Tensor] = {}
        self.runs += 1
        hooks = _hooks(model, self._enter(made), lambda path, out: made.update({path: out}))
        with hooks, state_kept(model), eval_mode(model), torch.no_grad():
            model(*probe[0], **probe[1])

    def _enter(self, made: Mapping[str, torch.Tensor]) -> Any:
        sites: dict[str, list[tuple[str, int, Any]]] = {}
        for group in self.graph.groups:
            for place, site in enumerate(group.sites if group.name in self.names else ()):
                sites.setdefault(site.module, []).append((group.name, place, site))

        def enter(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
            self.calls[path] += 1
            if isinstance(module, _BatchNorm):
                self.norms |= {maker: path for maker, out in made.items() if args and out is args[0]}
            for name, place, site in sites.get(path, ()):
                self._note((name, place), args[site.arg], site)

        return enter

    def _note(self, key: tuple[str, int], tensor: torch.Tensor, site: Any) -> None:
        index = torch.as_tensor(site.index, device=tensor.device)
        values = tensor.detach().movedim(site.axis, 0)[index].flatten(2) if tensor.dim() > 1 else None
        if values is None or not values.shape[2]:
            return
        first = values[:, :, 0]
        same = (values == values[:, :, :1]).all(2)
        if key in self.seen:
            before, steady = self.seen[key]
            first, same = before, steady & same & (first == before)
        self.seen[key] = (first, same)

    def refusal(self, group: Group, unit: int) -> str | None:
        """Return why silent ``unit`` must stay, None when it can go."""
        for member in group.members:
            if member.role != "in":
                continue
            path = member.tensor.rpartition(".")[0]
            found = self._constant(group, path)
            if found is None or not bool(found[1][unit].all()):
                return UNKNOWN
            if not bool(found[0][unit].any()):
                continue
            module = self.graph.model.get_submodule(path)
            if self.calls[path] != self.runs or not member.tensor.endswith("weight"):
                return UNKNOWN
            if not isinstance(module, nn.Linear) and not _seamless(module):
                return BORDER if isinstance(module, _ConvNd) else UNKNOWN
            if self._taker(self.graph.model, path) is None:
                return NOWHERE
        return None

    def _constant(self, group: Group, path: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        for place, site in enumerate(group.sites):
            if site.module == path:
                return self.seen.get((group.name, place))
        return None

    def _taker(self, model: nn.Module, path: str) -> tuple[torch.Tensor, float] | None:
        """Return the tensor that can take a constant added to the output of module ``path``, and its sign."""
        bias = getattr(model.get_submodule(path), "bias", None)
        if isinstance(bias, torch.Tensor):
            return bias, 1.0
        norm: Any = model.get_submodule(self.norms[path]) if path in self.norms else None
        alone = norm is not None and self.calls[self.norms[path]] == self.runs
        return (norm.running_mean, -1.0) if alone and norm.running_mean is not None else None

    @torch.no_grad()
    def correct(self, model: nn.Module, group: Group, units: np.ndarray) -> None:
        """Add to a copy of the model what the constant ``units`` of ``group`` contribute to their consumers."""
        for member in group.members:
            path = member.tensor.rpartition(".")[0]
            found = self._constant(group, path) if member.role == "in" else None
            taker = self._taker(model, path) if found is not None else None
            if found is None or taker is None:
                continue
            rows = torch.from_numpy(units)
            chosen = torch.where(found[1], found[0], 0)[rows.to(found[0].device)].flatten()  # idle units: no matter
            weight = model.get_parameter(member.tensor).movedim(member.axis, -1)
            taken = weight[..., torch.as_tensor(member.index[units].ravel(), device=weight.device)]
            summed = (taken.double() * chosen.double()).flatten(1).sum(1)
            taker[0].add_((taker[1] * summed).to(taker[0].dtype))


def _seamless(module: nn.Module) -> bool:
    """Is the response of ``module`` to a constant input the same at every position?"""
    if not isinstance(module, _ConvNd) or isinstance(module, _ConvTransposeNd) or module.groups != 1:
        return False
    padding = (0,) if module.padding == "valid" else module.padding
    return module.padding_mode != "zeros" or (padding != "same" and not any(padding))


def _hooks(model: nn.Module, enter: Any, leave: Any) -> Any:
    """Call ``enter(path, module, args)`` and ``leave(path, output)`` around every module of a ``with`` block."""

    @contextlib.contextmanager
    def block() -> Iterator[None]:
        handles: list[Any] = []
        try:
            for path, module in model.named_modules():
                handles.append(module.register_forward_pre_hook(lambda m, args, p=path: enter(p, m, args)))
                handles.append(
                    module.register_forward_hook(
                        lambda m, args, out, p=path: leave(p, out) if isinstance(out, torch.Tensor) else None
                    )
                )
            yield
        finally:
            for handle in handles:
                handle.remove()

    return block()
