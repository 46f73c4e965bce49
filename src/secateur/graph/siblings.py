"""Experts that no token of the example visited: run them beside a sibling that ran.

What feeds an expert is cut with the experts that run, so each one must be known.  Members of a ``ModuleList`` or
``ModuleDict`` of equal class and shapes stand for each other: one that did not run gets the inputs of one that did,
and its outputs are tied to that one's.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn


def idle_siblings(model: nn.Module, ran: Collection[str]) -> dict[str, list[str]]:
    """Return path of a module that ran -> paths of its equal siblings that did not."""
    found: dict[str, list[str]] = {}
    for path, holder in model.named_modules():
        if not isinstance(holder, nn.ModuleList | nn.ModuleDict):
            continue
        first: dict[Any, str] = {}
        children = [(f"{path}.{name}" if path else name, child) for name, child in holder.named_children()]
        for name, child in children:
            if name in ran:
                first.setdefault(_kind(child), name)
        for name, child in children:
            sibling = first.get(_kind(child))
            if name not in ran and sibling is not None and any(p.dim() > 1 for p in child.parameters()):
                found.setdefault(sibling, []).append(name)
    return found


def _kind(module: nn.Module) -> Any:
    return type(module), tuple((n, p.shape) for n, p in module.named_parameters())


def companions(model: nn.Module, idle: dict[str, list[str]], tensors_in: Any) -> list[Any]:
    """Hook the modules that run so that they run their idle siblings, once each; return the handles."""

    def hook(path: str, waiting: list[str]) -> Any:
        def run(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            while waiting:
                again = model.get_submodule(waiting.pop())(*args, **kwargs)
                for a, b in zip(tensors_in(out), tensors_in(again), strict=False):
                    if a.shape == b.shape:
                        torch.add(a, b)  # recorded: ties the units of both

        return model.get_submodule(path).register_forward_hook(run, with_kwargs=True)

    return [hook(path, list(others)) for path, others in idle.items()]
