"""Optimisers by name: (parameters, rate, weight decay, momentum) -> optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

Maker = Callable[[Iterable[nn.Parameter], float, float, float], torch.optim.Optimizer]


def adam(parameters: Iterable[nn.Parameter], lr: float, decay: float, momentum: float) -> torch.optim.Optimizer:
    """Return Adam with L2 decay (Kingma and Ba 2015); ``momentum`` is its first beta."""
    return torch.optim.Adam(parameters, lr=lr, weight_decay=decay, betas=(momentum, 0.999))


def adamw(parameters: Iterable[nn.Parameter], lr: float, decay: float, momentum: float) -> torch.optim.Optimizer:
    """Return Adam with decoupled decay (Loshchilov and Hutter 2019); ``momentum`` is its first beta."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay, betas=(momentum, 0.999))


def rmsprop(parameters: Iterable[nn.Parameter], lr: float, decay: float, momentum: float) -> torch.optim.Optimizer:
    """Return RMSprop with the decay 0.9 of its source (Tieleman and Hinton 2012, lecture 6.5; torch's is 0.99)."""
    return torch.optim.RMSprop(parameters, lr=lr, alpha=0.9, weight_decay=decay, momentum=momentum)


def sgd(parameters: Iterable[nn.Parameter], lr: float, decay: float, momentum: float) -> torch.optim.Optimizer:
    """Return stochastic gradient descent with Nesterov's momentum where there is any."""
    return torch.optim.SGD(parameters, lr=lr, weight_decay=decay, momentum=momentum, nesterov=momentum > 0)


OPTIMIZERS: dict[str, Maker] = {f.__name__: f for f in (adam, adamw, rmsprop, sgd)}
