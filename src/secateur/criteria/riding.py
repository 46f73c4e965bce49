"""Evidence that rides on training steps: no pass of its own, no second backward, no activation kept.

Each watched input of a consumer goes through an identity with a second argument, the slot: a leaf of shape (samples,
units).  The backward of the identity sees the input a and its gradient g and answers the slot with the sums of a * g
over the positions, so that after ``loss.backward()`` the gradient of the slot *is* the evidence.  Nothing is written
on the side, which is why ``torch.compile`` takes the steps in one graph and fuses the sums into it.  Without
``torch.compile`` a hook on a view of the input does the same with less Python.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.criteria.evidence import BACKWARD, PER_SAMPLE, STREAMED, Criterion, Evidence, unit_slices
from secateur.criteria.gather import unwatched
from secateur.criteria.probes import REDUCE, Key, by_sample, key_of
from secateur.graph.state import eval_mode, state_kept
from secateur.types import Graph, Group, Member

Slot = tuple[str, Key]


@dataclass(eq=False)
class Sums:
    """What is kept: per group the sum over ``samples`` of the values whose mean is the score, (units,) in float64.

    ``streamed`` holds, per group, evidence that is no sum over samples under its name (see ``streaming``).
    """

    samples: int = 0
    values: dict[str, Tensor] = field(default_factory=dict)
    streamed: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums as tensors for a file."""
        streamed = {f"{name}.{group}": v for group, row in self.streamed.items() for name, v in row.items()}
        return {"samples": torch.tensor(self.samples), **{f"group.{k}": v for k, v in self.values.items()}, **streamed}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Sums:
        """Return the sums that ``tensors()`` wrote."""
        groups = {k.removeprefix("group."): v for k, v in tensors.items() if k.startswith("group.")}
        streamed: dict[str, dict[str, Tensor]] = {}
        for name, group, tensor in ((*key.split(".", 1), value) for key, value in tensors.items() if "." in key):
            if name in STREAMED:
                streamed.setdefault(group, {})[name] = tensor
        return cls(int(tensors["samples"]), groups, streamed)


class Riding:
    """Collects what ``criterion`` reads, on the model of ``graph``, from the steps of a training loop.

    Within ``with riding:``, for each batch of n samples: ``start(n)``, forward, ``loss.backward()`` of a loss that is
    a mean over the samples, ``take()`` before the gradients or weights change; now and then ``settle()``.  Then
    ``sums`` is what ``score(graph, criterion, sums=...)`` takes.  ``start(0)`` lets a batch pass unseen; ``looks``
    says which batches to watch, each ``every``-th.
    """

    def __init__(self, graph: Graph, criterion: Criterion, sums: Sums | None = None, every: int = 1) -> None:
        self.criterion, self.model, self.every = criterion, graph.model, every
        self.names = sorted(criterion.evidence & PER_SAMPLE)
        self.sums = sums or Sums()
        self.device = next((p.device for p in graph.model.parameters()), torch.device("cpu"))
        self.sizes = _sizes(graph)
        groups = [group for group in graph.groups if group.prunable]
        free = {group.name: unwatched(graph, group) if set(self.names) & BACKWARD else [] for group in groups}
        self.groups = [g for g in groups if free[g.name] or any(key_of(s) in self.sizes for s in g.sites)]
        self.members = {group.name: free[group.name] for group in self.groups}
        parameters = dict(graph.model.named_parameters())
        self.loose = {m.tensor: parameters[m.tensor] for found in self.members.values() for m in found}
        keys = {key_of(site) for group in self.groups for site in group.sites}
        self.keys = [key for key in self.sizes if key in keys]
        self.widths = {key: _width(self.sizes[key][0], self.groups, key) for key in self.keys}
        self.slots: dict[Slot, Tensor] = {}  # of the batch that runs; empty: unseen
        self._sized: dict[int, dict[Slot, Tensor]] = {}
        self._rows: dict[Slot, list[Tensor]] = defaultdict(list)
        self._products: dict[str, list[Tensor]] = defaultdict(list)
        self._counts: list[int] = []
        self._stack = ExitStack()

    def __enter__(self) -> Riding:
        for key in self.keys:
            self._stack.enter_context(self._hook(self.model.get_submodule(key[0]), key))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def looks(self, step: int) -> bool:
        """Return whether to watch the batch of optimiser step ``step``; batches are shuffled, so any will do."""
        return step % self.every == 0

    def start(self, samples: int) -> None:
        """Watch the next batch, of ``samples`` samples; 0: do not watch it."""
        if samples and samples not in self._sized:
            self._sized[samples] = {
                (name, key): torch.zeros(samples, self.widths[key], device=self.device, requires_grad=True)
                for name in self.names
                for key in self.keys
            }
        self.slots = self._sized[samples] if samples else {}
        self._samples = samples

    def take(self) -> None:
        """Take the evidence of the batch out of the slots."""
        if not self._samples:
            return
        self._counts.append(self._samples)
        for slot, tensor in self.slots.items():
            grad, tensor.grad = tensor.grad, None
            self._rows[slot].append(torch.zeros_like(tensor) if grad is None else grad)
        for name, weight in self.loose.items():
            grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            self._products[name].append(weight.detach().float() * grad.float())

    def _answer(self, slots: list[Slot], axis: int, value: Tensor, grad: Tensor) -> None:
        """Give the slots what one backward pass shows at one consumer: what ``_Slot`` does, with fewer calls."""
        for slot in slots:
            tensor = self.slots[slot]
            sums = _summed(slot[0], axis, value, grad, tensor.shape)
            tensor.grad = sums if tensor.grad is None else tensor.grad + sums

    def settle(self) -> None:
        """Add what was taken to ``sums``."""
        if not self._counts:
            return
        counts = torch.tensor(self._counts, device=self.device)
        scale = counts.repeat_interleave(counts)  # of each sample, the size of its batch
        rows = {slot: torch.cat(parts) for slot, parts in self._rows.items()}
        for group in self.groups:
            each = self.criterion.each(self._evidence(group, rows, scale)).sum(0)
            old = self.sums.values.get(group.name)
            self.sums.values[group.name] = each if old is None else old.to(each.device) + each
        self.sums.samples += len(scale)
        for waiting in (self._rows, self._products, self._counts):
            waiting.clear()

    def _evidence(self, group: Group, rows: Mapping[Slot, Tensor], scale: Tensor) -> Evidence:
        """Return what all samples since the last ``settle`` showed of ``group``."""
        count = max([1, *(self.sizes[key_of(s)][1] * s.index.shape[1] for s in group.sites if key_of(s) in self.sizes)])
        found: dict[str, Any] = {"positions": torch.full((len(scale),), float(count), device=scale.device)}
        for name in self.names:
            total = torch.zeros(len(scale), group.units, device=scale.device)
            for site in group.sites:
                if (name, key_of(site)) in rows:
                    total = total + _of_units(rows[name, key_of(site)], site.index)
            total = total * scale[:, None] if name in BACKWARD else total / count
            for member in self.members[group.name] if name in BACKWARD else ():
                total = total + self._by_weight(member, name)
            found[name] = total
        return Evidence(group.name, torch.arange(group.units), **found)

    def _by_weight(self, member: Member, name: str) -> Tensor:
        """Return the sums of w * dL/dw per unit: the mean of its batch for every sample."""
        parts = [unit_slices(member, product) for product in self._products[member.tensor]]
        sums = torch.stack([(part.abs() if name == "unit_grads_abs" else part).sum(1) for part in parts])
        return sums.repeat_interleave(torch.tensor(self._counts, device=sums.device), 0)

    def _hook(self, module: nn.Module, key: Key) -> Any:
        _, arg, axis = key
        copy = bool(getattr(module, "inplace", False))
        names = list(inspect.signature(module.forward).parameters)
        slots = [(name, key) for name in self.names]

        def watched(value: Tensor) -> Tensor:
            if torch.compiler.is_compiling() or not value.requires_grad:  # the former takes no hooks on values
                for slot in slots:
                    value = _Slot.apply(value, self.slots[slot], slot[0], axis, copy)
                return value
            own = value.clone() if copy else value.view_as(value)
            own.register_hook(lambda grad: self._answer(slots, axis, value.detach(), grad))
            return own

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not self.slots or not torch.is_grad_enabled():
                return None
            if arg < len(args):
                return (*args[:arg], watched(args[arg]), *args[arg + 1 :]), kwargs
            if arg < len(names) and isinstance(kwargs.get(names[arg]), Tensor):
                return args, {**kwargs, names[arg]: watched(kwargs[names[arg]])}
            return None

        return _removed(module.register_forward_pre_hook(hook, with_kwargs=True))


class _Slot(torch.autograd.Function):
    """Identity of ``value``; the gradient of ``slot`` (n, units) is the evidence ``name`` about ``value``."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, slot: Tensor, name: str, axis: int, copy: bool) -> Tensor:
        ctx.save_for_backward(value)
        ctx.how = (name, axis, *slot.shape)
        return value.clone() if copy else value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        (value,) = ctx.saved_tensors
        name, axis, *shape = ctx.how
        return grad, _summed(name, axis, value, grad, shape), None, None, None


def _summed(name: str, axis: int, value: Tensor, grad: Tensor, shape: Sequence[int]) -> Tensor:
    """Return evidence ``name`` summed over the positions, float32 of ``shape`` (samples, units)."""
    samples, units = shape
    a, g = (value.float(), grad.float()) if value.dtype == torch.float16 else (value, grad)
    values = REDUCE[name](a, a * g)
    if values.dim() == 4 and axis == 1 and values.shape[:2] == (samples, units):  # as below, with fewer calls
        return values.sum((2, 3)).float()
    values = by_sample(values, axis, samples)
    sums = values.reshape(len(values), units, -1).sum(2).float()
    return sums if len(sums) == samples else (sums / samples).expand(samples, -1)  # not told apart: each has the mean


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _width(size: int, groups: list[Group], key: Key) -> int:
    """Return the width of a slot: the number of units where they lie in order along the axis, else its ``size``."""
    found = [site.index for group in groups for site in group.sites if key_of(site) == key]
    plain = all(index.size == size and _in_order(index) for index in found)
    return len(found[0]) if plain and len({len(index) for index in found}) == 1 else size


def _in_order(index: np.ndarray) -> bool:
    return np.array_equal(index.reshape(-1), np.arange(index.size))


def _of_units(rows: Tensor, index: np.ndarray) -> Tensor:
    """Return (N, units) from ``rows`` (N, width of the axis)."""
    if len(index) == rows.shape[1] and _in_order(index):  # they were added up in the backward pass
        return rows
    return rows[:, torch.as_tensor(index, device=rows.device)].sum(-1)


def _sizes(graph: Graph) -> dict[Key, tuple[int, int]]:
    """Return for every site that runs on the example: the width of its axis, and the positions of one sample."""
    wanted: dict[str, dict[Key, None]] = defaultdict(dict)
    for group in graph.groups:
        for site in group.sites if group.prunable else ():
            wanted[site.module][key_of(site)] = None
    example = next((t for t in (*graph.args, *graph.kwargs.values()) if isinstance(t, Tensor) and t.dim()), None)
    samples = 1 if example is None else len(example)
    found: dict[Key, tuple[int, int]] = {}

    def look(key: Key, names: list[str]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = args[key[1]] if key[1] < len(args) else kwargs.get(names[key[1]])
            if isinstance(value, Tensor) and value.is_floating_point():
                shape = by_sample(value, key[2], samples).shape
                found[key] = (shape[1], max(shape[2], found.get(key, (0, 0))[1]))

        return hook

    handles = []
    try:
        for path, keys in wanted.items():
            module = graph.model.get_submodule(path)
            names = list(inspect.signature(module.forward).parameters)
            handles += [module.register_forward_pre_hook(look(key, names), with_kwargs=True) for key in keys]
        with eval_mode(graph.model), state_kept(graph.model), torch.no_grad():
            graph.model(*graph.args, **graph.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found
