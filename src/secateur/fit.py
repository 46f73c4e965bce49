"""Make a class's own forward run with the new widths: attributes first, size patches where that is not enough.

The small model runs once beside the calls recorded on the dense one.  Every size-taking call says what Python
computed; what it should be is known from the unit ids.  Where they differ, the right value is put in on the spot
and noted.  A noted module first gets its own integer attributes corrected (``num_heads``, ``dim``, tuples); if all
its calls then come out right the attributes stay, otherwise they are restored and the module is patched.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Set
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from secateur.compact import Surgery
from secateur.graph.calls import CALLS, SCALARS, SHAPES, SLICES, SPLITS, BoundCall, counted_as
from secateur.graph.expected import changes, fetch, unitless
from secateur.graph.state import eval_mode, quiet_backends
from secateur.graph.trace import culprit
from secateur.graph.verify import refused
from secateur.mask import zeroed
from secateur.patch import Patch, SizedForward, call_with, install, installed
from secateur.types import Graph

Found = dict[str, dict[tuple[str, int], Patch]]
Numbers = Set[BoundCall]


class _Fitting(TorchFunctionMode):
    """Corrects each call as it comes and notes the correction per module."""

    def __init__(self, graph: Graph, kept: np.ndarray, moving: Numbers = frozenset()) -> None:
        super().__init__()
        self.kept = kept
        self.moving = moving
        self.numbers: set[BoundCall] = set()  # calls with a number that differs
        self.stack: list[str] = [""]
        self.counters: list[Counter[str]] = [Counter()]
        self.skipped: list[Counter[str]] = [Counter()]
        self.found: Found = defaultdict(dict)
        self.dense: dict[str, dict[int, int]] = defaultdict(dict)
        self.queue: dict[tuple[str, str, int], list[BoundCall]] = defaultdict(list)
        for call in graph.calls:
            path, index = call.owners[-1]
            self.queue[path, counted_as(call.name), index].append(call)
        self.earlier = {(p.module, p.name, p.index): p for p in installed(graph.model)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in CALLS:
            return func(*args, **kwargs)
        name = counted_as(name)
        path, index = self.stack[-1], self.counters[-1][name]
        for seen in self.counters:
            seen[name] += 1
        waiting = self.queue.get((path, name, index - self.skipped[-1][name]))
        if waiting and not _alike(waiting[0], args, kwargs):  # a branch that the dense sizes do not take
            self.skipped[-1][name] += 1
            return func(*args, **kwargs)
        earlier = self.earlier.get((path, name, index))
        if not waiting:  # no units here (any more): what an earlier cut put right stays so
            if earlier is None:
                return func(*args, **kwargs)
            self.found[path][name, index] = earlier
            return call_with(func, args, kwargs, earlier.changes)
        call = waiting.pop(0) if len(waiting) > 1 else waiting[0]
        wrong = [] if call in self.moving else changes(call, self.kept, args, kwargs)
        if earlier is not None:
            covered = {p for p, _ in wrong}
            wrong += [(p, v) for p, v in earlier.changes if p not in covered and unitless(call, p)]
        if not wrong:
            return func(*args, **kwargs)
        if name in SCALARS:
            self.numbers.add(call)
        self.found[path][name, index] = Patch(path, index, name, tuple((tuple(p), v) for p, v in wrong))
        for at, value in wrong:
            self._note(path, call, at, value)
        return call_with(func, args, kwargs, wrong)

    def _note(self, module: str, call: BoundCall, path: Any, value: Any) -> None:
        """Remember dense size -> new size, the lead to an attribute."""
        if path == ("sizes",):
            how = call.args[1] if len(call.args) > 1 else None
            pairs = zip(how, value, strict=False) if isinstance(how, list | tuple) else ()
        else:
            try:
                old = fetch(call.args, call.kwargs, path)
            except (LookupError, TypeError, AttributeError):
                return
            pairs = zip(old, value, strict=False) if isinstance(old, list | tuple) else [(old, value)]
        for old, new in pairs:
            if isinstance(old, int) and isinstance(new, int) and new > 0 and old != new:
                self.dense[module][old] = new

    def run(self, model: nn.Module, graph: Graph) -> None:
        handles = []
        paths: dict[int, str] = {}
        for path, module in model.named_modules():
            paths.setdefault(id(module), path)

        def enter(module: nn.Module, args: Any) -> None:
            self.stack.append(paths[id(module)])
            self.counters.append(Counter())
            self.skipped.append(Counter())

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            if len(self.stack) > 1:
                self.stack.pop()
                self.counters.pop()
                self.skipped.pop()

        state = torch.random.get_rng_state()
        try:
            for module in model.modules():
                if not isinstance(module, torch.jit.ScriptModule):
                    handles.append(module.register_forward_pre_hook(enter, prepend=True))
                    handles.append(module.register_forward_hook(leave, always_call=True))
            with eval_mode(model), torch.no_grad(), quiet_backends(), self:
                model(*graph.args, **graph.kwargs)
        finally:
            for handle in handles:
                handle.remove()
            torch.random.set_rng_state(state)


def fit(graph: Graph, kept: np.ndarray, small: nn.Module, surgery: Surgery) -> Surgery:
    """Correct attributes of ``small`` and patch its modules where needed; return the surgery that says so.

    Raises ``VerificationError`` naming the module when the forward still cannot run.
    """
    if not _suspicious(graph, kept):
        return surgery
    for module in small.modules():  # patches of an earlier cut: what they put right is found again, from the raw sizes
        if isinstance(vars(module).get("forward"), SizedForward):
            del module.__dict__["forward"]
    first, named = _first(graph, kept, small)
    moving = _moving(graph, kept) if first.numbers else frozenset()
    if moving:
        first = _attempt(graph, kept, small, moving)
    surgery = replace(surgery, attributes=surgery.attributes + named)
    if not first.found:
        return surgery
    tried = _attributes(small, first)
    if not tried:
        return _patched(small, surgery, first.found)
    old = _assign(small, tried)
    second = _attempt(graph, kept, small, moving, strict=False)
    bad = {path for path, _, _ in tried if second is None or not _better(second.found, first.found, path)}
    _assign(small, (row for row in old if row[0] in bad))
    good = tuple(row for row in tried if row[0] not in bad)
    surgery = replace(surgery, attributes=surgery.attributes + good)
    last = _attempt(graph, kept, small, moving) if bad or second is None else second
    return _patched(small, surgery, last.found)


def _suspicious(graph: Graph, kept: np.ndarray) -> bool:
    """Could any Python-level size or number differ in the small model?"""
    for call in graph.calls:
        if call.suspect or changes(call, kept, call.args, call.kwargs):
            return True
        if call.name in SHAPES | SPLITS | SLICES:  # a number beside a cut axis may have been derived from it: C // 4
            ids = [a for axes in (*call.inputs, *call.results) for a in axes if a is not None]
            if not all(kept[a].all() for a in ids):
                return True
    return False


def _alike(call: BoundCall, args: Any, kwargs: Any) -> bool:
    """Is this the recorded call: tensors of the same ranks, as many arguments?"""
    ranks = [x.dim() for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    return ranks == [len(shape) for shape in call.shapes] and len(args) == len(call.args)


def _first(graph: Graph, kept: np.ndarray, small: nn.Module) -> tuple[Any, tuple[tuple[str, str, Any], ...]]:
    """First run; modules of a class that refuses the new widths get their attributes of dense sizes corrected."""
    named: list[tuple[str, str, Any]] = []
    rows: list[tuple[str, str, Any]] = []
    for _ in range(32):
        mode = _Fitting(graph, kept)
        try:
            mode.run(small, graph)
            return mode, tuple(named)
        except Exception as error:
            kind = type(small.get_submodule(culprit(error, small)))
            paths = [path for path, module in small.named_modules() if type(module) is kind]
            more = [row for path in paths for row in _owned_sizes(graph, kept, small, path) if row not in named]
            if not more:
                rows = [row for path in paths for row in _owned_sizes(graph, kept, small, path, sure=False)]
                break
            _assign(small, more)
            named += more
    for attribute in dict.fromkeys(name for _, name, _ in rows):
        more = [row for row in rows if row[1] == attribute]
        before = _assign(small, more)
        mode = _attempt(graph, kept, small, strict=False)
        if mode is not None:
            return mode, (*named, *more)
        _assign(small, before)
    return _attempt(graph, kept, small), tuple(named)


def _assign(model: nn.Module, rows: Iterable[tuple[str, str, Any]]) -> list[tuple[str, str, Any]]:
    """Set attributes; return the rows that undo it."""
    before = []
    for path, name, value in rows:
        module = model.get_submodule(path)
        before.append((path, name, getattr(module, name)))
        setattr(module, name, value)
    return before


def _owned_sizes(
    graph: Graph, kept: np.ndarray, small: nn.Module, path: str, sure: bool = True
) -> list[tuple[str, str, Any]]:
    """Attributes of the module at ``path`` that equal a size which every tensor inside it cuts alike.

    When not ``sure``: the new size that most tensors have.
    """
    new: dict[int, Counter[int]] = defaultdict(Counter)
    for name, axes in graph.axes.items():
        if name.startswith(f"{path}." if path else ""):
            for ids in axes:
                if ids is not None:
                    new[len(ids)][int(kept[ids].sum())] += 1
    for item in graph.groups:
        own = sum(m.tensor.startswith(f"{path}." if path else "") for m in item.members)
        new[item.units][int(kept[item.offset : item.offset + item.units].sum())] += own
    sizes = {}
    for old, found in new.items():
        changed = [n for n, times in found.most_common() if times and n != old]
        if changed and (len(+found) == 1 or not sure):
            sizes[old] = changed[0]
    held = vars(small.get_submodule(path))
    return [(path, name, sizes[v]) for name, v in held.items() if type(v) is int and v in sizes]


def _better(new: Found, old: Found, path: str) -> bool:
    """Fewer calls of the module are wrong, and none that was right before."""
    return len(new.get(path, {})) < len(old[path]) and new.get(path, {}).keys() <= old[path].keys()


def _moving(graph: Graph, kept: np.ndarray) -> Numbers:
    """Calls with a number that depends on the data: it differs on the masked model, whose sizes are dense."""
    mode = _Fitting(graph, np.ones_like(kept))
    mode.earlier = {}  # in place on this model
    with zeroed(graph, kept):
        mode.run(graph.model, graph)
    return mode.numbers


def _attempt(
    graph: Graph, kept: np.ndarray, small: nn.Module, moving: Numbers = frozenset(), strict: bool = True
) -> Any:
    mode = _Fitting(graph, kept, moving)
    try:
        mode.run(small, graph)
    except Exception as error:
        if not strict:
            return None
        raise refused(small, error) from error
    return mode


def _attributes(model: nn.Module, mode: _Fitting) -> list[tuple[str, str, Any]]:
    """Integer (or tuple of integer) attributes of the noted modules that hold a dense size."""
    out: list[tuple[str, str, Any]] = []
    for path in mode.found:
        module, sizes = model.get_submodule(path), mode.dense[path]
        for name, value in vars(module).items():
            if type(value) is int and value in sizes:
                out.append((path, name, sizes[value]))
            elif type(value) in (tuple, list) and any(type(v) is int and v in sizes for v in value):
                out.append((path, name, type(value)(sizes.get(v, v) if type(v) is int else v for v in value)))
    return out


def _patched(small: nn.Module, surgery: Surgery, found: Found) -> Surgery:
    patches = tuple(patch for calls in found.values() for patch in calls.values())
    install(small, patches)
    return replace(surgery, patches=surgery.patches + patches)
