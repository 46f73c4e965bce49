"""Record one run of a model at the level of ATen operators.

The model runs for real, in eval mode and without gradients, under two modes: a dispatch mode sees every ATen
operator (with attention forced to its maths form and the fused fast paths off), a function mode sees the Python
calls whose integer arguments are sizes.  Only shapes are kept, never activations.  In-place writes need no
functionalization: a write ties the units of source and destination, and ties are symmetric.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.graph.calls import CALLS, counted_as
from secateur.graph.siblings import companions, idle_siblings
from secateur.graph.state import caches_empty, eval_mode, quiet_backends, state_kept
from secateur.types import TraceError

TAG = "_secateur_value"


@dataclass(frozen=True)
class Ref:
    """A tensor argument: the index of a value."""

    value: int


@dataclass(eq=False, slots=True)
class Value:
    """What is kept of a tensor: shape, dtype, and the parameter or buffer name if it is one."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    name: str | None = None
    origin: str = "constant"


@dataclass(eq=False, slots=True)
class Op:
    """One ATen operator: arguments with tensors replaced by ``Ref``, the values it made, the module it ran in."""

    target: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: list[int | None]
    module: str
    pointwise: bool = False


@dataclass(eq=False, slots=True)
class Call:
    """One Python-level call whose integers may be sizes.

    ``owners``: for each module that was running, its path and how many calls of this name its forward had made.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: list[int | None]
    module: str
    owners: tuple[tuple[str, int], ...]


@dataclass(eq=False)
class Recording:
    """Everything one run left behind."""

    values: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    inputs: dict[str, list[list[int | None]]] = field(default_factory=dict)
    outputs: list[int] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    caches: list[tuple[str, str]] = field(default_factory=list)
    read: set[int] = field(default_factory=set)
    eval_ops: int = 0  # operators after these ran in train mode, for branches that eval mode skips
    eval_outputs: int = 0  # outputs after these are of that run


class _Recorder(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Spare the import of torch._dynamo, which takes seconds; nothing is compiled under this mode."""
        return False

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.rec = Recording()
        self.stack: list[str] = [""]
        self.counters: list[Counter[str]] = [Counter()]
        self.marked: list[weakref.ref[torch.Tensor]] = []
        self.storage: dict[tuple[Any, ...], int] = {}
        self.paused = False
        for name, tensor in [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]:
            if tensor is None:
                continue
            old = self.known(tensor)
            if old is not None:
                self.rec.aliases[name] = str(self.rec.values[old].name)
                continue
            if is_lazy(tensor):
                raise TraceError(f"{name} has no shape yet: run the model once on real inputs, then trace it.")
            index = self.value(tensor, name=name, origin="parameter")
            if tensor.numel() and tensor.layout == torch.strided:
                self.storage.setdefault(_where(tensor), index)

    def value(self, tensor: torch.Tensor, name: str | None = None, origin: str = "constant") -> int:
        self.rec.values.append(Value(tuple(tensor.shape), tensor.dtype, name, origin))
        self.tag(tensor, len(self.rec.values) - 1)
        return len(self.rec.values) - 1

    def tag(self, tensor: torch.Tensor, index: int) -> None:
        setattr(tensor, TAG, (self.rec, index))
        self.marked.append(weakref.ref(tensor))

    def known(self, tensor: torch.Tensor) -> int | None:
        """Value index of a tensor of this run (a cached tensor may carry the tag of an earlier one)."""
        rec, index = getattr(tensor, TAG, (None, None))
        return index if rec is self.rec else None

    def look(self, tensor: torch.Tensor) -> int:
        index = self.known(tensor)
        if index is None:
            # .data and similar give a new object on the storage of a parameter, without an operator
            if tensor.numel() and tensor.layout == torch.strided and type(tensor) in (torch.Tensor, nn.Parameter):
                known = self.storage.get(_where(tensor))
                if known is not None:
                    self.tag(tensor, known)
                    self.rec.read.add(known)
                    return known
            index = self.value(tensor)
        self.rec.read.add(index)
        return index

    def index(self, tensor: torch.Tensor) -> int:
        """Value index of a result; unlike ``look`` it does not count as reading it."""
        known = self.known(tensor)
        return self.look(tensor) if known is None else known

    def refs(self, tree: Any) -> Any:
        return pytree.tree_map(lambda x: Ref(self.look(x)) if isinstance(x, torch.Tensor) else x, tree)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        record_args, record_kwargs = self.refs(args), self.refs(kwargs)
        out = func(*args, **kwargs)
        schema = func._schema
        outs: list[int | None] = []
        leaves = out if isinstance(out, list | tuple) else [out]
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                outs.append(self.value(leaf, origin="op"))
            elif isinstance(leaf, list | tuple):
                outs += [self.value(x, origin="op") if isinstance(x, torch.Tensor) else None for x in leaf]
            else:
                outs.append(None)
        if schema.is_mutable and not leaves:
            outs = []
        pointwise = torch.Tag.pointwise in func.tags
        self.rec.ops.append(Op(str(func.name()), tuple(record_args), record_kwargs, outs, self.stack[-1], pointwise))
        return out


def _where(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


class _Calls(TorchFunctionMode):
    """Notes calls whose integers may be sizes, in the order each surrounding module sees them."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is F.batch_norm and not args[0].numel():
            return self._empty_norm(*inspect.signature(func).bind(*args, **kwargs).args)
        if name not in CALLS:
            return func(*args, **kwargs)
        recorder = self.recorder
        key = counted_as(name)
        owners = tuple((path, seen[key]) for path, seen in zip(recorder.stack, recorder.counters, strict=True))
        for seen in recorder.counters:
            seen[key] += 1
        before = recorder.refs(args), recorder.refs(kwargs)
        out = func(*args, **kwargs)
        leaves = pytree.tree_leaves(out)
        outs = [recorder.index(x) if isinstance(x, torch.Tensor) else None for x in leaves]
        recorder.rec.calls.append(Call(name, before[0], before[1], outs, recorder.stack[-1], owners))
        return out

    def _empty_norm(self, x: Any, mean: Any, var: Any, weight: Any = None, bias: Any = None, *rest: Any) -> Any:
        """A batch norm of nothing (a detector without boxes) never reads its statistics: record what it stands for."""
        recorder = self.recorder
        before = recorder.refs((x, weight, bias, mean, var, False))
        recorder.paused = True
        try:
            out = F.batch_norm(x, mean, var, weight, bias, *rest)
        finally:
            recorder.paused = False
        index = recorder.value(out, origin="op")
        recorder.rec.ops.append(Op("aten::batch_norm", before, {}, [index], recorder.stack[-1]))
        return out


@contextlib.contextmanager
def module_stack(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Keep the path of the module that is running, by hooks on every module of ``model``."""
    handles = []
    paths: dict[int, str] = {}
    for path, module in model.named_modules():
        paths.setdefault(id(module), path)

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        path = paths[id(module)]
        recorder.stack.append(path)
        recorder.counters.append(Counter())
        refs = [recorder.known(a) if isinstance(a, torch.Tensor) else None for a in args]
        recorder.rec.inputs.setdefault(path, []).append(refs)

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        if len(recorder.stack) > 1:
            recorder.stack.pop()
            recorder.counters.pop()

    try:
        for _, module in model.named_modules():
            if module is model or not isinstance(module, torch.jit.ScriptModule):
                handles.append(module.register_forward_pre_hook(enter, prepend=True))
                handles.append(module.register_forward_hook(leave, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def inputs_of(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return (args, kwargs): a tensor is one argument, a tuple positional, a dict keywords."""
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    if isinstance(example_inputs, dict):
        return (), dict(example_inputs)
    if (
        hasattr(example_inputs, "data")
        and hasattr(example_inputs, "keys")
        and not isinstance(example_inputs, torch.Tensor)
    ):
        return (), {key: example_inputs[key] for key in example_inputs}
    return (example_inputs,), {}


def record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recording:
    """Run ``model(*args, **kwargs)`` once and return what it did; the model's state is as before.

    A model that builds tensors for later calls on its first run (relative positions, rotary tables) is run a second
    time, so that what is recorded is what every later call does.  Raises ``TraceError`` when the model fails.
    """
    with caches_empty(model, args, kwargs):
        lazy = _attributes(model)
        recording = _record(model, args, kwargs)
        return recording if _attributes(model) == lazy else _record(model, args, kwargs)


def _attributes(model: nn.Module) -> list[tuple[int, str, int]]:
    """Identity of every tensor that hangs on a module."""
    found = []
    for module in model.modules():
        for held in (vars(module), module._buffers):
            found += [(id(module), name, id(x)) for name, x in held.items() if isinstance(x, torch.Tensor)]
    return found


def _record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recording:
    recorder = _Recorder(model)
    for tensor in pytree.tree_leaves((args, kwargs)):
        if isinstance(tensor, torch.Tensor) and recorder.known(tensor) is None:
            recorder.value(tensor, origin="input")
    state = torch.random.get_rng_state()
    try:
        with state_kept(model, recorder.rec.caches):
            modes = eval_mode(model), torch.no_grad(), quiet_backends()
            with modes[0], modes[1], modes[2], module_stack(model, recorder), recorder, _Calls(recorder):
                out = model(*args, **kwargs)
            recorder.rec.outputs = [i for i in map(recorder.known, tensors_in(out)) if i is not None]
            recorder.rec.eval_ops, recorder.rec.eval_outputs = len(recorder.rec.ops), len(recorder.rec.outputs)
            if unused(recorder.rec):
                _record_again(model, recorder, args, kwargs, idle_siblings(model, recorder.rec.inputs))
            if unused(recorder.rec):
                _record_again(model, recorder, args, kwargs)
    except Exception as error:
        raise TraceError(
            f"the model failed on the example inputs in module {culprit(error, model) or type(model).__name__!r}: "
            f"{type(error).__name__}: {error}. Check that model(*example_inputs) runs in eval mode with these inputs."
        ) from error
    finally:
        torch.random.set_rng_state(state)
        for mark in recorder.marked:
            if (tensor := mark()) is not None:
                tensor.__dict__.pop(TAG, None)
    return recorder.rec


def unused(rec: Recording) -> list[int]:
    """Weights that no recorded call or operator read, as value indices."""
    weights = ((i, v) for i, v in enumerate(rec.values) if v.origin == "parameter" and len(v.shape) > 1)
    return [i for i, v in weights if i not in rec.read and v.dtype.is_floating_point]


def _record_again(
    model: nn.Module,
    recorder: _Recorder,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    idle: dict[str, list[str]] | None = None,
) -> None:
    """Run once more to reach weights that did not take part, with ``idle`` experts or else in train mode.

    Auxiliary heads run in train mode only, and their inputs must be cut with the rest.  A model that cannot train
    on these inputs (a batch of one) is left with what eval mode showed.
    """
    if idle is not None and not idle:
        return
    before = len(recorder.rec.ops), len(recorder.rec.calls)
    training = [module.training for module in model.modules()]
    handles: list[Any] = []
    try:
        model.train(idle is None)
        with torch.no_grad(), quiet_backends(), module_stack(model, recorder):
            handles = companions(model, idle or {}, tensors_in)
            with recorder, _Calls(recorder):
                out = model(*args, **kwargs)
        recorder.rec.outputs += [i for i in map(recorder.known, tensors_in(out)) if i is not None]
    except Exception:
        del recorder.rec.ops[before[0] :], recorder.rec.calls[before[1] :]
        recorder.stack, recorder.counters = [""], [Counter()]
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in zip(model.modules(), training, strict=True):
            module.training = mode


def culprit(error: BaseException, model: nn.Module) -> str:
    """Path of the innermost module whose forward raised ``error`` ("" for the model itself)."""
    paths = {id(module): path for path, module in model.named_modules()}
    found, frame = "", error.__traceback__
    while frame is not None:
        found = paths.get(id(frame.tb_frame.f_locals.get("self")), found) or found
        frame = frame.tb_next
    return found


def tensors_in(tree: Any, depth: int = 0) -> list[torch.Tensor]:
    """Return all tensors in nested containers, mappings, dataclasses and plain objects of a model's output."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if depth > 8 or tree is None or isinstance(tree, str | bytes | int | float | bool):
        return []
    if hasattr(tree, "get_seq_length"):  # a key-value cache is state between calls, it follows the cut
        return []
    if isinstance(tree, dict) or hasattr(tree, "items"):
        parts = list(tree.values())
    elif isinstance(tree, list | tuple | set):
        parts = list(tree)
    elif hasattr(tree, "__dict__"):
        parts = list(vars(tree).values())
    else:
        parts = []
    return [tensor for part in parts for tensor in tensors_in(part, depth + 1)]
