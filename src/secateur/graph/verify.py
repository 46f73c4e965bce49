"""Proofs: permuting the units of a group changes nothing; the masked and the compact model agree."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.graph.state import eval_mode, quiet_backends, state_kept
from secateur.graph.trace import culprit, tensors_in
from secateur.types import Check, Graph, Group, Plan, Proof, VerificationError

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}

SMALL = 8  # units


def outputs(model: nn.Module, graph: Graph) -> list[torch.Tensor]:
    """Run the example inputs in eval mode without gradients; return all floating-point outputs."""
    state = torch.random.get_rng_state()
    with state_kept(model), eval_mode(model), torch.no_grad(), quiet_backends():
        out = model(*graph.args, **graph.kwargs)
    torch.random.set_rng_state(state)
    return [t.detach() for t in tensors_in(out) if t.is_floating_point()]


def distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Largest absolute difference over the largest absolute value, per output; inf when shapes differ."""
    if len(a) != len(b):
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape:
            return float("inf")
        if not x.numel():
            continue
        x, y = x.double(), y.double()
        same = torch.isfinite(x) & torch.isfinite(y)
        if not torch.equal(torch.nan_to_num(x)[~same], torch.nan_to_num(y)[~same]):
            return float("inf")
        if same.any():
            gap = (x[same] - y[same]).abs().max()
            worst = max(worst, float(gap / x[same].abs().max().clamp_min(1e-30)))
    return worst


def tolerance(model: nn.Module) -> float:
    """The tolerance of the model's floating-point type."""
    for p in model.parameters():
        if p.is_floating_point():
            return TOLERANCE.get(p.dtype, 1e-5)
    return 1e-5


def verify(graph: Graph, groups: Iterable[str] | None = None, *, joint: bool = False) -> Proof:
    """Permutation proof: permute the units of each prunable group in all its members; outputs must not change.

    It holds through norms and attention and so proves the grouping of any model.  Tensors with equal values
    (fresh norms, zero biases, layer scales) are randomised for the proof, or it could not fail.  ``joint`` permutes
    all groups in one run: one forward instead of one per group, every row then carries the joint error.  A group
    that misses the float32 tolerance is judged again in float64, and where whole units have no common order of
    their positions (a flipped axis tied to itself) by cutting half of them: such rows are of kind ``compact``.

    The model is unchanged afterwards.  Returns a ``Proof`` with one row per group (see ``Proof.ok``).
    """
    chosen = [g for g in graph.groups if g.prunable and (groups is None or g.name in set(groups))]
    rows: list[Check] = []
    with _randomised(graph.model):
        base, limit = outputs(graph.model, graph), tolerance(graph.model)
        wide: _Wide | None = None
        if joint:
            error, bound = _permuted_error(graph, chosen, base), limit
            if error > limit:
                wide = _in_double(graph)
                error, bound = _permuted_error(wide.graph, chosen, wide.base), wide.bound
            if error <= bound:
                return Proof(tuple(Check(g.name, "permutation", error, bound, True) for g in chosen))
        for item in chosen:
            error, bound, kind = _permuted_error(graph, [item], base), limit, "permutation"
            if error > limit:
                wide = wide or _in_double(graph)
                error, bound = _permuted_error(wide.graph, [item], wide.base), wide.bound
                if error > bound and item.exact and any(m.index.shape[1] > 1 for m in item.members):
                    error, kind = _cut_error(wide.graph, item), "compact"
            rows.append(Check(item.name, kind, error, bound, error <= bound))
    return Proof(tuple(rows))


def _cut_error(graph: Graph, item: Group) -> float:
    """Cut every other unit and compare with the masked model.

    Where an axis is flipped or rolled onto itself, the positions of a unit stand in another order in each tensor:
    then there is no order in which whole units could be exchanged, but cutting them is still right or wrong.
    """
    from secateur.compact import compact
    from secateur.mask import masked

    plan = Plan(graph.fingerprint, ((item.name, item.units, tuple(range(1, item.units, 2))),))
    try:
        small = compact(graph, plan, verify=False)
        narrow = outputs(small, graph)
    except (VerificationError, RuntimeError):  # it cannot be built, or not run
        return float("inf")
    with masked(graph, plan):
        return distance(outputs(graph.model, graph), narrow)


@dataclass(frozen=True)
class _Wide:
    """A float64 copy of a graph's model, its outputs, and the error up to which they are equal."""

    graph: Graph
    base: list[torch.Tensor]
    bound: float


def _in_double(graph: Graph) -> _Wide:
    """Copy the model in float64, with batch norms that fit the example inputs.

    Untrained deep models amplify: efficientnet_v2_l with fresh batch norms turns a relative change of 1e-15 into
    0.4, so that no two orders of summation agree.  With fitted statistics it is 1e-9; what is left is measured by
    changing the last digit of every weight, and the bound is a hundred times that.
    """
    double = _widened(graph)
    _fit_norms(double)
    base = outputs(double.model, double)
    return _Wide(double, base, min(max(TOLERANCE[torch.float64], 100 * _noise(double, base)), TOLERANCE[torch.float32]))


def _noise(double: Graph, base: list[torch.Tensor]) -> float:
    """How far the outputs move when the last digit of every weight of a float64 model changes."""
    model = copy.deepcopy(double.model)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.mul_(1 + 1e-15 * torch.randn(p.shape, generator=rng, dtype=p.dtype).to(p.device))
    return distance(base, outputs(model, double))


def _fit_norms(graph: Graph) -> None:
    """Set the running statistics of batch norms to those of the example inputs."""

    def measure(norm: Any, args: tuple[Any, ...]) -> None:
        x, over = args[0], [0, *range(2, args[0].dim())]
        if x.shape[1] == norm.num_features:
            norm.running_mean.copy_(x.mean(over))
            norm.running_var.copy_(x.var(over, correction=0) + 1e-3 * x.var() + 1e-12)

    handles = [
        m.register_forward_pre_hook(measure)
        for m in graph.model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    ]
    try:
        with eval_mode(graph.model), torch.no_grad(), quiet_backends():
            graph.model(*graph.args, **graph.kwargs)
    finally:
        for handle in handles:
            handle.remove()


def _permuted_error(graph: Graph, groups: list[Group], base: list[torch.Tensor]) -> float:
    """The worst over two orders for groups so small that one order may agree with a wrong grouping by chance."""
    worst = 0.0
    for seed in range(1 + any(g.units <= SMALL for g in groups)):
        with permuted(graph, groups, np.random.default_rng(seed)):
            worst = max(worst, distance(base, outputs(graph.model, graph)))
    return worst


@contextlib.contextmanager
def permuted(graph: Graph, groups: list[Group], rng: np.random.Generator) -> Iterator[None]:
    """Exchange the units of ``groups`` at random in every member; restored on leaving."""
    target = np.arange(graph.units + 1)
    for item in groups:
        target[item.offset : item.offset + item.units] = item.offset + _derangement(item.units, rng)
    from secateur.mask import tensors_of

    tensors = tensors_of(graph.model)
    saved: dict[str, torch.Tensor] = {}
    try:
        with torch.no_grad():
            for name, value in rearranged(graph, target).items():
                saved[name] = tensors[name].detach().clone()
                tensors[name].copy_(value)
        yield
    finally:
        with torch.no_grad():
            for name, value in saved.items():
                tensors[name].copy_(value)


def rearranged(graph: Graph, target: np.ndarray) -> dict[str, torch.Tensor]:
    """Return the tensors in which unit ``target[u]`` stands in the place of each unit u, where that changes them."""
    from secateur.mask import tensors_of

    tensors, found = tensors_of(graph.model), {}
    for name, axes in graph.axes.items():
        orders = [(axis, _order(ids, target)) for axis, ids in enumerate(axes) if ids is not None]
        for axis, order in orders:
            if order is not None:
                old = found.get(name, tensors[name].detach())
                found[name] = old.index_select(axis, torch.from_numpy(order).to(old.device))
    return found


def _derangement(n: int, rng: np.random.Generator) -> np.ndarray:
    """A random cycle through all units: none keeps its place."""
    order, out = rng.permutation(n), np.empty(n, dtype=np.int64)
    out[order] = np.roll(order, 1)
    return out


def _order(ids: np.ndarray, target: np.ndarray) -> np.ndarray | None:
    """Positions to read from: the j-th position of unit u reads the j-th position of the unit that takes its place."""
    moved = np.flatnonzero((ids >= 0) & (target[ids] != ids))
    if not len(moved):
        return None
    order = np.arange(len(ids))
    by_unit = moved[np.argsort(ids[moved], kind="stable")]
    wanted = target[ids[by_unit]]
    starts = {int(u): int(k) for k, u in reversed(list(enumerate(ids[by_unit])))}
    first = np.array([starts[int(u)] for u in ids[by_unit]])
    source = np.array([starts[int(u)] for u in wanted])
    order[by_unit] = by_unit[source + np.arange(len(by_unit)) - first]
    return order


@contextlib.contextmanager
def _randomised(model: nn.Module) -> Iterator[None]:
    """Give tensors whose values are all equal (or tiny) values that a wrong permutation would betray."""
    rng = torch.Generator().manual_seed(0)
    saved: list[tuple[torch.Tensor, torch.Tensor]] = []
    from secateur.mask import tensors_of

    try:
        with torch.no_grad():
            for tensor in {id(t): t for t in tensors_of(model).values()}.values():
                if not tensor.is_floating_point() or tensor.numel() < 2 or tensor.dim() == 0:
                    continue
                low, high = tensor.min(), tensor.max()
                if not bool(torch.isfinite(high - low)) or float(high - low) > 1e-6:
                    continue
                saved.append((tensor, tensor.detach().clone()))
                noise = torch.rand(tensor.shape, generator=rng).to(tensor.device, tensor.dtype)
                level = float(high)
                # small steps: a deep model would amplify large ones until rounding hides everything
                tensor.copy_((level if abs(level) > 0.01 else 0.1 * (level != 0)) + 0.2 * (noise - 0.5))
        yield
    finally:
        with torch.no_grad():
            for tensor, value in saved:
                tensor.copy_(value)


def check_compact(graph: Graph, plan: Plan, small: nn.Module) -> Check:
    """Compare the (already masked) dense model with the small one on the example inputs.

    When an inexact group is cut the two are different functions by definition: then only a finite output of the
    same shapes is asked for.  What differs in float32 is compared in float64 before it counts: near ties decide
    which boxes a detector keeps.  Models that amplify rounding even there (deep and untrained) get a tolerance of
    ten times what the last digit of their weights does.  Raises ``VerificationError`` naming the groups.
    """
    cut = [graph.group(name) for name, _, _ in plan.keep]
    names = ", ".join(g.name for g in cut[:4]) + (" ..." if len(cut) > 4 else "")
    wide = outputs(graph.model, graph)
    try:
        narrow = outputs(small, graph)
    except Exception as error:
        raise refused(small, error) from error
    error, limit = distance(wide, narrow), tolerance(graph.model)
    if error > 10 * limit and all(g.exact for g in cut):
        first = error
        with contextlib.suppress(Exception):  # not every model runs in float64
            double = _widened(graph)
            wide = outputs(double.model, double)
            error = distance(wide, outputs(copy.deepcopy(small).double(), double))
            if 10 * limit < error < float("inf"):
                limit = max(limit, _noise(double, wide))
        if error > 10 * limit:
            what = "outputs of other shapes" if first == float("inf") else f"{first:.1e} relative"
            raise VerificationError(
                f"masked and compact differ by {what} (tolerance {limit:.0e}) after cutting {names}; "
                "freeze the group that is wrong (sc.verify(graph) shows one row per group) and report the model."
            )
    return Check(names, "compact", error, limit, True)


def _widened(graph: Graph) -> Graph:
    """The graph with a float64 copy of its model and inputs."""

    def widen(x: Any) -> Any:
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    args, kwargs = pytree.tree_map(widen, (graph.args, graph.kwargs))
    return replace(graph, model=copy.deepcopy(graph.model).double(), args=args, kwargs=kwargs)


def refused(small: nn.Module, error: Exception) -> VerificationError:
    """What to tell when the forward of a small model fails."""
    return VerificationError(
        f"the forward of {culprit(error, small) or type(small).__name__!r} cannot run with the new widths "
        f"({type(error).__name__}: {error}); freeze its groups in sc.allocate(..., freeze=[...])."
    )
