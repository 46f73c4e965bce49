"""Watching how much each unit adds to the outputs of its consumers, in one pass over the data.

Hooks on the consumers take the shares of each call and keep one sum and one maximum per input: no rows of samples.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from secateur.criteria import ratios
from secateur.criteria.convolve import recorded
from secateur.criteria.evidence import STREAMED, wide
from secateur.criteria.probes import Key, key_of
from secateur.types import Graph, Group, Site

Peaks = Callable[[Tensor], Tensor]  # index (U, k) -> largest share (U,)


@dataclass(frozen=True, eq=False)
class Seen:
    """Of one input of a consumer: the sum of the shares (P,), and over how many output elements and output units."""

    sums: Tensor
    elements: int
    outputs: int


class Shares:
    """Hooks on every site of ``groups``; ``read`` returns what all batches showed of a group.

    The shares of all inputs of one consumer, averaged over samples and outputs, sum to 1 (to the fraction of its
    outputs that anything reaches).  Several consumers of a unit count by the number of their output units, so that
    the result is the mean over samples and next units; in a map it is also the mean over positions.  Consumers are
    convolutions, linear layers, and other modules that contract the axis with 2-D weights of their own (recurrent
    layers: their gates).  What has no site (raw weights used in functions) or no such weight is not seen.

    The hooks work in any forward pass, of training too.  ``every``: look at each so-many-th sample of a batch alone.
    They look while ``awake``.
    """

    def __init__(
        self, graph: Graph, groups: Iterable[Group], names: frozenset[str], every: int = 1, awake: bool = True
    ) -> None:
        self.names, self.every, self.awake = names & STREAMED, every, awake
        self._graph = graph
        self._seen: dict[Key, Seen] = {}
        self._peaks: dict[tuple[str, Key], Tensor] = {}
        self._stack = ExitStack()
        self._sites: dict[Key, list[tuple[Group, Site]]] = {}
        for group in groups if self.names else ():
            for site in group.sites:
                self._sites.setdefault(key_of(site), []).append((group, site))
        for key in self._sites:
            self._stack.enter_context(self._hook(graph.model.get_submodule(key[0]), key))

    def __enter__(self) -> Shares:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def forget(self) -> None:
        """Begin anew."""
        self._seen.clear()
        self._peaks.clear()

    def read(self, group: Group) -> dict[str, Tensor]:
        """Return evidence name -> values (U,) of ``group``; nothing if no consumer was seen."""
        seen = [(self._seen[key], site) for site in group.sites if (key := key_of(site)) in self._seen]
        if not seen:
            return {}
        outputs = sum(one.outputs for one, _ in seen)
        found = {}
        if "contributions" in self.names:
            means = [
                (one.sums / one.elements)[torch.as_tensor(site.index, device=one.sums.device)].sum(1) * one.outputs
                for one, site in seen
            ]
            found["contributions"] = torch.stack(means).sum(0) / outputs
        if "contribution_max" in self.names:
            tops = [self._peaks[group.name, key_of(site)] for _, site in seen]
            found["contribution_max"] = torch.stack(tops).amax(0)
        return found

    def _hook(self, module: nn.Module, key: Key) -> AbstractContextManager[Any]:
        names = list(inspect.signature(module.forward).parameters)
        arg = key[1]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self.awake:
                return
            name = names[arg] if arg < len(names) else ""
            value = args[arg] if arg < len(args) else kwargs.get(name)
            if not (isinstance(value, Tensor) and value.is_floating_point() and value.numel()):
                return

            def again(changed: Tensor) -> Any:
                if arg < len(args):
                    return module.forward(*args[:arg], changed, *args[arg + 1 :], **kwargs)
                return module.forward(*args, **{**kwargs, name: changed})

            value = value[:: self.every] if key[2] % value.dim() else value
            with torch.autocast(value.device.type, enabled=False):
                self._look(module, key, ratios.magnitude(value), again)

        return module.register_forward_pre_hook(hook, with_kwargs=True)

    def _look(self, module: nn.Module, key: Key, a: Tensor, again: Callable[[Tensor], Any]) -> None:
        """Add what one call of ``module`` shows; ``a`` are the magnitudes of its input."""
        if isinstance(module, _ConvNd):
            channels = key[2] % a.dim() == a.dim() - len(module.kernel_size) - 1
            for call in recorded(again, a) if channels else ():
                self._add(key, Seen(wide(call.shares()), call.sums.numel(), call.outputs), call.peaks)
            return
        weight = self._matrix(module, key)
        rows = a.movedim(key[2], -1).flatten(0, -2) if a.dim() > 1 else a[None]
        if weight is not None and weight.shape[1] == rows.shape[1]:
            w = ratios.magnitude(weight)
            sums, inverse = ratios.shares(rows, w)
            self._add(
                key, Seen(wide(sums), inverse.numel(), len(w)), lambda index: ratios.peaks(rows, w, inverse, index)
            )

    def _matrix(self, module: nn.Module, key: Key) -> Tensor | None:
        """Return the weights (M, P) with which ``module`` contracts its input, None where there are none."""
        if isinstance(module, nn.Linear):
            return module.weight
        tensors = dict(self._graph.model.named_parameters())
        members = [m for group, _ in self._sites[key] for m in group.members if m.role == "in" and m.tensor in tensors]
        axes = {id(tensors[m.tensor]): m.axis for m in members}
        own = [p if axes[id(p)] else p.T for p in module.parameters() if id(p) in axes and p.dim() == 2]
        return torch.cat(own) if own and len({w.shape[1] for w in own}) == 1 else None

    def _add(self, key: Key, new: Seen, peaks: Peaks) -> None:
        old = self._seen.get(key)
        if old is not None:
            new = Seen(old.sums + new.sums, old.elements + new.elements, new.outputs)
        self._seen[key] = new
        for group, site in self._sites[key] if "contribution_max" in self.names else ():
            peak = wide(peaks(torch.as_tensor(site.index)))
            before = self._peaks.get((group.name, key))
            self._peaks[group.name, key] = peak if before is None else torch.maximum(before, peak)
