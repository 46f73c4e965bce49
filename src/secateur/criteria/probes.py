"""Reading unit evidence during an ordinary forward and backward pass.

A probe sits on one input of a consumer module.  It is an identity whose backward sees the input a and the
gradient g that flows back *through this consumer*, and reduces them at once to one number per sample and
position of the unit axis, so that no activation or gradient is kept.  All probes hang on one dummy scalar,
the pulse: ``autograd.grad(loss, [pulse])`` runs exactly the part of the backward pass that leads to a probe
and computes no weight gradient.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from secateur.criteria.evidence import BACKWARD
from secateur.types import Group, Site

Key = tuple[str, int, int]

# evidence name -> what is summed over the positions, from the activation a and p = a * g
REDUCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "unit_grads": lambda a, p: p,
    "unit_grads_abs": lambda a, p: p.abs(),
    "activations": lambda a, p: a.abs(),
}


class Probes:
    """Hooks on every site of ``groups``; ``read`` returns what one batch showed, and empties the probes."""

    def __init__(self, model: nn.Module, groups: Iterable[Group], names: frozenset[str], device: torch.device) -> None:
        self.names = names
        self.pulse = torch.zeros((), device=device, requires_grad=bool(names & BACKWARD))
        self.samples = 1
        self.sums: dict[tuple[str, Key], Tensor] = {}
        self.entries: dict[Key, int] = defaultdict(int)
        self._stack = ExitStack()
        wanted: dict[str, dict[Key, None]] = defaultdict(dict)
        for group in groups:
            for site in group.sites:
                wanted[site.module][key_of(site)] = None
        for module, keys in wanted.items():
            for key in keys:
                self._stack.enter_context(self._hook(model.get_submodule(module), key))

    def __enter__(self) -> Probes:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def start(self, samples: int) -> None:
        """Forget the last batch; the next one holds ``samples`` samples."""
        self.samples = samples
        self.sums.clear()
        self.entries.clear()

    def read(self, group: Group, name: str) -> Tensor | None:
        """Return evidence ``name`` (n, units), summed over positions and sites; None if no site ran."""
        total = None
        for site in group.sites:
            sums = self.sums.get((name, key_of(site)))
            if sums is not None:
                rows = sums[:, torch.as_tensor(site.index, device=sums.device)].sum(-1)
                total = rows if total is None else total + rows
        return total

    def positions(self, group: Group) -> int:
        """Return the number of values per unit and sample, at the site that has most of them."""
        counts = [self.entries[key_of(site)] * site.index.shape[1] for site in group.sites]
        return max([1, *counts])

    def _hook(self, module: nn.Module, key: Key) -> AbstractContextManager[Any]:
        _, arg, axis = key
        copy = bool(getattr(module, "inplace", False))
        names = list(inspect.signature(module.forward).parameters)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if arg < len(args):
                watched = self._watch(args[arg], key, axis, copy)
                return (*args[:arg], watched, *args[arg + 1 :]), kwargs
            if arg < len(names) and isinstance(kwargs.get(names[arg]), Tensor):
                return args, {**kwargs, names[arg]: self._watch(kwargs[names[arg]], key, axis, copy)}
            return None

        return module.register_forward_pre_hook(hook, with_kwargs=True)

    def _watch(self, value: Tensor, key: Key, axis: int, copy: bool) -> Tensor:
        if not value.is_floating_point():
            return value
        if self.pulse.requires_grad:
            return _Probe.apply(value, self.pulse, lambda a, g: self._reduce(key, axis, a, a.float() * g.float()), copy)
        self._reduce(key, axis, value.detach(), value)
        return value

    def _reduce(self, key: Key, axis: int, a: Tensor, p: Tensor) -> None:
        for name in self.names:
            values = by_sample(REDUCE[name](a, p), axis, self.samples)
            sums = values.sum(2, dtype=torch.float32)
            if len(sums) != self.samples:  # the samples could not be told apart: each gets the mean
                sums = (sums / self.samples).expand(self.samples, -1)
            old = self.sums.get((name, key))
            self.sums[name, key] = sums if old is None else old + sums
            self.entries[key] = max(self.entries[key], values.shape[2])


class _Probe(torch.autograd.Function):
    """Identity; its backward hands the input and its gradient to ``tap``."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, pulse: Tensor, tap: Callable[[Tensor, Tensor], None], copy: bool) -> Tensor:
        ctx.save_for_backward(value)
        ctx.tap = tap
        return value.clone() if copy else value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        ctx.tap(ctx.saved_tensors[0], grad)
        return grad, None, None, None


def by_sample(values: Tensor, axis: int, samples: int) -> Tensor:
    """Return ``values`` as (n, C, positions): C the unit axis, n the samples (or 1 if they can't be told
    apart).

    The sample axis is the first one of that length (batch first), else the second (sequence first); a
    first axis that is a multiple holds each sample's windows or tokens in a row.
    """
    axis %= values.dim()
    others = [n for n in range(values.dim()) if n != axis]
    sizes = [values.shape[n] for n in others]
    batch = next((n for n, size in zip(others[:2], sizes, strict=False) if size == samples), None)
    if batch is not None:
        return values.movedim((batch, axis), (0, 1)).reshape(samples, values.shape[axis], -1)
    flat = values.movedim(axis, -1).reshape(-1, values.shape[axis])
    if others[:1] == [0] and values.shape[0] % samples == 0:
        return flat.reshape(samples, -1, flat.shape[1]).transpose(1, 2)
    return flat.T.unsqueeze(0)


def key_of(site: Site) -> Key:
    """Return what a site is told by: module, argument, axis."""
    return site.module, site.arg, site.axis
