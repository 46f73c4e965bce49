"""Masks that hold through training: what a plan zeroed stays exactly zero, whatever the optimiser does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Hold = Callable[[torch.optim.Optimizer], torch.optim.Optimizer]


@contextmanager
def held(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> Iterator[Hold]:
    """Hold the masked weights of ``model`` at zero for the length of a ``with`` block.

    ``masks``: tensor name -> bool, True = stays, in the shape of the tensor or broadcast to it (what
    ``granularity.masks`` returns).  The weights are zeroed at once and their gradients as they arrive, so that
    neither a gradient norm nor a momentum sees them.  The block gets a function that every optimiser over the model
    is passed through: after each of its steps the weights are zeroed again, and so is the state that it loads, so
    that a momentum saved before the mask cannot move them.  The masks are values of their own: a weight that stays
    and becomes exactly 0 goes on training.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> with held(layer, {"weight": torch.tensor([[True, False]])}) as hold:
    ...     optimizer = hold(torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1))
    ...     for _ in range(3):
    ...         layer(torch.ones(1, 2)).sum().backward()
    ...         optimizer.step()
    >>> layer.weight[0, 1].item(), layer.weight[0, 0].item() != 0
    (0.0, True)
    """
    zero_(model, masks)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    handles: list[Any] = []

    def hold(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        weights: list[torch.Tensor] = [parameters[name] for name in masks]
        # factors in the type and the memory order of the weights: six times as fast on a CPU as filling in zeros
        factors = [torch.empty_like(w).copy_(mask) for w, mask in zip(weights, masks.values(), strict=True)]
        pairs = list(zip(weights, factors, strict=True))
        handles.extend(weight.register_post_accumulate_grad_hook(_gradient(factor)) for weight, factor in pairs)
        handles.append(optimizer.register_step_post_hook(lambda *_: _multiply(weights, factors)))
        handles.append(optimizer.register_load_state_dict_post_hook(lambda loaded: _forget(loaded, pairs)))
        _forget(optimizer, pairs)
        return optimizer

    try:
        yield hold
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def zero_(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> nn.Module:
    """Zero the masked weights of ``model`` in place, for good; ``masks`` as in ``held``."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        parameters[name].masked_fill_(~mask, 0)  # a product would keep a nan
    return model


def astray(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return tensor name -> largest absolute value among its masked weights, which should be 0."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    values = {name: parameters[name].detach().abs().masked_fill(mask, 0) for name, mask in masks.items()}
    return {name: float(value.max()) for name, value in values.items()}


def _gradient(factor: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def hook(weight: torch.Tensor) -> None:
        if weight.grad is not None:
            weight.grad.mul_(factor)

    return hook


@torch.no_grad()
def _multiply(weights: list[torch.Tensor], factors: list[torch.Tensor]) -> None:
    if weights:
        torch._foreach_mul_(weights, factors)


@torch.no_grad()
def _forget(optimizer: torch.optim.Optimizer, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Zero what ``optimizer`` remembers of the masked weights."""
    for weight, factor in pairs:
        state = optimizer.state.get(weight, {})
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                state[name] = value * factor  # not in place: what was loaded is still the caller's
