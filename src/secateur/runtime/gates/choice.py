"""What a gate decides about one batch, and how to listen to it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn


class Choice(NamedTuple):
    """What one gate decides: ``saliency`` (B, C) float before selection, ``mask`` (B, C) bool of what runs."""

    saliency: torch.Tensor
    mask: torch.Tensor


class Gate(nn.Module):
    """Base of all gates: a module that maps the input of a layer (B, C_in, ...) to a ``Choice``."""

    def forward(self, x: torch.Tensor) -> Choice:
        """Return the decision for each sample of ``x``."""
        raise NotImplementedError


@contextlib.contextmanager
def watch(model: nn.Module) -> Iterator[dict[str, Choice]]:
    """Collect the choices of all gates of ``model`` inside a ``with`` block, under the paths of the gated layers.

    The tensors carry gradients, so a penalty on saliencies can be added to a loss.  A layer that runs several times
    leaves its last choice.

    >>> from secateur.runtime.gates import gate
    >>> chain = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    >>> model = gate(chain, 0.5, torch.rand(1, 3, 8, 8)).model
    >>> with watch(model) as choices:
    ...     _ = model(torch.rand(2, 3, 8, 8))
    >>> choices["0"].mask.sum(1).tolist()
    [4, 4]
    """
    seen: dict[str, Choice] = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: Any, choice: Choice) -> None:
            seen[path] = choice

        return hook

    gates = [(path, module) for path, module in model.named_modules() if isinstance(module, Gate)]
    handles = [gate.register_forward_hook(note(path.rpartition(".")[0])) for path, gate in gates]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
