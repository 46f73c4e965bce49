"""The promises that hold for every network and every plan, checked on one random network at a time.

``check(seed)`` returns what failed, as (kind, message); ``benchmarks/properties.py`` counts them over thousands.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import secateur as sc
from benchmarks.proving.random_nets import random_network
from secateur.compact import take
from secateur.graph.trace import TAG, tensors_in
from secateur.mask import tensors_of
from secateur.types import Graph, Plan

LIMIT = 1e-10
KINDS = (
    "trace", "permutation", "masked", "batch", "train", "gradient", "json", "empty", "inexact", "twice", "unmask",
    "copy",
)  # fmt: skip


def blocks(model: nn.Module) -> list[str]:
    """Names of the constructs of a random network."""
    return [m.run.__qualname__.split(".")[0] for m in model.modules() if hasattr(m, "run")]


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    return [t for t in tensors_in(model(x)) if t.is_floating_point()]


def gap(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference relative to the largest value of each output; inf for other shapes or no number."""
    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf")
    pairs = [(x.detach(), y.detach()) for x, y in zip(a, b, strict=True)]
    worst = [float((x - y).abs().max() / x.abs().max().clamp_min(1e-12)) for x, y in pairs]
    return max((float("inf") if np.isnan(w) else w for w in worst), default=float("inf"))


def random_plan(graph: Graph, rng: np.random.Generator, exact: bool = True, share: float = 0.7) -> Plan:
    """Each prunable group is cut with probability ``share``, to a random set of at least one unit."""
    rows = []
    for group in graph.groups:
        if group.prunable and (group.exact or not exact) and rng.random() < share:
            kept = rng.permutation(group.units)[: rng.integers(1, group.units)]
            rows.append((group.name, group.units, tuple(sorted(kept.tolist()))))
    return Plan(graph.fingerprint, tuple(rows))


def wider(plan: Plan, rng: np.random.Generator) -> Plan:
    """A plan that keeps all that ``plan`` keeps and, in each group, some of the rest."""
    rows = []
    for name, units, kept in plan.keep:
        rest = np.setdiff1d(np.arange(units), kept)
        more = rest[rng.random(len(rest)) < 0.5]
        if len(kept) + len(more) < units:
            rows.append((name, units, tuple(sorted([*kept, *more.tolist()]))))
    return replace(plan, keep=tuple(rows))


def rest_of(graph: Graph, first: Plan, final: Plan, small: Graph) -> Plan | None:
    """``final`` in the words of the graph of the small model that ``first`` gave; None when it can't say it.

    Positions that stayed carry the dense unit's id and the small unit's id at once: that is the translation.
    """
    kept, wanted = first.kept(graph), final.kept(graph)
    stays, goes = np.zeros(small.units, dtype=bool), np.zeros(small.units, dtype=bool)
    said = np.zeros(graph.units + 1, dtype=bool)
    for name, axes in graph.axes.items():
        for ids, own in zip(axes, small.axes[name], strict=True):
            if ids is None or own is None:
                continue
            left = ids[kept[ids]]
            both = own >= 0
            stays[own[both & wanted[left]]] = True
            goes[own[both & ~wanted[left]]] = True
            said[left[both]] = True
    if not said[:-1][kept[:-1] & ~wanted[:-1]].all() or (stays & goes).any():
        return None
    rows = []
    for group in small.groups:
        keep = ~goes[group.offset : group.offset + group.units]
        if not keep.all():
            if not group.prunable or not keep.any():
                return None
            rows.append((group.name, group.units, tuple(np.flatnonzero(keep).tolist())))
    return Plan(small.fingerprint, tuple(rows))


class Trial:
    """One random network with its graph and a plan over its exact groups."""

    def __init__(self, seed: int) -> None:
        self.model, self.x = random_network(seed)
        self.rng = np.random.default_rng(seed)
        with mock.patch("secateur.trial.foreign", return_value=False):  # a wrong group is to show, not to be frozen
            self.graph = sc.trace(self.model, self.x)
        self.plan = random_plan(self.graph, self.rng)
        self.more = torch.randn(5, *self.x.shape[1:], dtype=self.x.dtype, generator=torch.Generator().manual_seed(seed))
        self.count: Counter[str] = Counter()

    def trace(self) -> Iterator[str]:
        left = [name for name, t in [*tensors_of(self.model).items(), ("input", self.x)] if hasattr(t, TAG)]
        if left:
            yield f"tags left on {left}"
        if any(m._forward_hooks or m._forward_pre_hooks for m in self.model.modules()):
            yield "hooks left"

    def permutation(self) -> Iterator[str]:
        """Every row holds.  One kind of group can't be proved by exchange and, being inexact, not by cutting either."""
        yield from self._proved(self.graph)

    def _proved(self, graph: Graph) -> Iterator[str]:
        twisted = any(name.startswith("flip_roll") for name in blocks(self.model))
        for row in sc.verify(graph).rows:
            self.count["by cutting"] += row.kind == "compact" and row.ok
            group = graph.group(row.group)
            if not row.ok and twisted and not group.exact and any(m.index.shape[1] > 1 for m in group.members):
                self.count["unproved"] += 1
            elif not row.ok:
                yield f"{row.group}: {row.error:.1e}"

    def masked(self) -> Iterator[str]:
        small = sc.compact(self.graph, self.plan, verify=False)
        wide = run(sc.mask_(self.graph, self.plan), self.x)
        sc.unmask_(self.graph)
        if (error := gap(wide, run(small, self.x))) > LIMIT:
            yield f"{error:.1e} with {self.plan.keep}"

    def batch(self) -> Iterator[str]:
        small = sc.compact(self.graph, self.plan, verify=False)
        wide = run(sc.mask_(self.graph, self.plan), self.more)
        sc.unmask_(self.graph)
        if (error := gap(wide, run(small, self.more))) > LIMIT:
            yield f"{error:.1e} with {self.plan.keep}"

    def train(self) -> Iterator[str]:
        dense, small = copy.deepcopy(self.model), sc.compact(self.graph, self.plan, verify=False)
        graph = replace(self.graph, model=dense)
        outs = [run(m.train(), self.more) for m in (sc.mask_(graph, self.plan), small)]
        if (error := gap(*outs)) > LIMIT:
            yield f"outputs in train mode {error:.1e} with {self.plan.keep}"

    def gradient(self) -> Iterator[str]:
        """Where both have a gradient, the small one's is the masked one's at the positions that stay."""
        dense, small = copy.deepcopy(self.model), sc.compact(self.graph, self.plan, verify=False)
        for model in (sc.mask_(replace(self.graph, model=dense), self.plan), small):
            sum(
                (t * torch.cos(torch.arange(t.numel(), dtype=t.dtype)).view_as(t)).sum()
                for t in run(model.train(), self.more)
            ).backward()
        slices = small._secateur.slices
        wide = {n: take(p.grad, slices.get(n, ())) for n, p in dense.named_parameters() if p.grad is not None}
        top = max((float(g.abs().max()) for g in wide.values()), default=1.0)
        for name, p in small.named_parameters():
            if (p.grad is None) != (name not in wide) and float(wide.get(name, p.grad).abs().max()) > 0:
                yield f"{name}: only one has a gradient"
            elif (
                p.grad is not None
                and name in wide
                and not (error := float((p.grad - wide[name]).abs().max())) <= 1e-8 * top
            ):
                yield f"{name}: {error:.1e} of {top:.1e} with {self.plan.keep}"

    def json(self) -> Iterator[str]:
        if Plan.from_json(self.plan.to_json()) != self.plan:
            yield "another plan came back"

    def empty(self) -> Iterator[str]:
        same = sc.compact(self.graph, Plan(self.graph.fingerprint, ()))
        ours, theirs = self.model.state_dict(), same.state_dict()
        if list(ours) != list(theirs) or not all(torch.equal(ours[k], theirs[k]) for k in ours):
            yield "another state"
        if gap(run(self.model, self.more), run(same, self.more)) != 0:
            yield "another function"

    def inexact(self) -> Iterator[str]:
        """Plans over all groups: the small model runs, trains, and its own graph is proved again."""
        plan = random_plan(self.graph, self.rng, exact=False)
        small = sc.compact(self.graph, plan, verify=False)
        if not all(torch.isfinite(t).all() for t in run(small, self.more)):
            yield f"not finite with {plan.keep}"
        with mock.patch("secateur.trial.foreign", return_value=False):
            graph = sc.trace(small, self.x)
        for failed in self._proved(graph):
            yield f"traced again, {failed} with {plan.keep}"
        sum(t.sum() for t in run(small.train(), self.more)).backward()

    def twice(self) -> Iterator[str]:
        first = wider(self.plan, self.rng)
        with mock.patch("secateur.trial.foreign", return_value=False):
            middle = sc.trace(sc.compact(self.graph, first, verify=False), self.x)
        rest = rest_of(self.graph, first, self.plan, middle)
        if rest is None:
            self.count["not said twice"] += 1
            return
        once, twice = sc.compact(self.graph, self.plan, verify=False), sc.compact(middle, rest, verify=False)
        a, b = once.state_dict(), twice.state_dict()
        if list(a) != list(b) or not all(a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a):
            yield f"another state with {first.keep} then {rest.keep}"
        elif (error := gap(run(once, self.more), run(twice, self.more))) > LIMIT:
            yield f"another function, {error:.1e}, with {first.keep} then {rest.keep}"

    def unmask(self) -> Iterator[str]:
        before = {k: v.clone() for k, v in self.model.state_dict().items()}
        plan = random_plan(self.graph, self.rng, exact=False)
        sc.mask_(self.graph, self.plan)
        sc.mask_(self.graph, plan)
        sc.unmask_(self.graph)
        changed = [k for k, v in self.model.state_dict().items() if not torch.equal(v, before[k])]
        if changed:
            yield f"{changed} did not come back"

    def copy(self) -> Iterator[str]:
        small = sc.compact(self.graph, self.plan, verify=False)
        twin = copy.deepcopy(small)
        with torch.no_grad():
            for p in twin.parameters():
                p.zero_()
        twin.load_state_dict(small.state_dict())
        if gap(run(small, self.more), run(twin, self.more)) != 0:
            yield "a deep copy with the same state is another function"


def check(seed: int, kinds: tuple[str, ...] = KINDS) -> tuple[list[tuple[str, str]], Counter[str]]:
    """Return the failures of one seed and counts of what was exercised."""
    counts: Counter[str] = Counter()
    try:
        trial = Trial(seed)
    except Exception as error:
        return [("trace", f"{type(error).__name__}: {error}")], counts
    failed = []
    for kind in kinds:
        try:
            failed += [(kind, message) for message in getattr(trial, kind)()]
        except Exception as error:
            failed.append((kind, f"{type(error).__name__}: {error}"))
    free = [g for g in trial.graph.groups if g.prunable]
    counts.update(
        networks=1,
        groups=len(trial.graph.groups),
        prunable=len(free),
        exact=sum(g.exact for g in free),
        cut=len(trial.plan.keep),
        patched=sum("forward" in vars(m) for m in sc.compact(trial.graph, trial.plan, verify=False).modules())
        if not failed
        else 0,
        **trial.count,
    )
    return failed, counts
