"""A moving average of the weights: what is validated and kept, while training goes on with the weights themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

Tensors = dict[str, torch.Tensor]


class Average:
    """The exponential moving average of a model's parameters and buffers.

    After optimiser step t (from 0): average <- d average + (1 - d) weights, with d = min(decay, (1 + t) / (10 + t)),
    so that the random beginning is soon forgotten.  Running statistics are averaged like weights, whole numbers are
    copied.  Source: Polyak and Juditsky 1992; the rule for d is that of TensorFlow's ExponentialMovingAverage.
    ``tensors`` continues an average that was saved.
    """

    def __init__(self, model: nn.Module, decay: float, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        self.decay = decay
        self.live = tensors_of(model)
        self.tensors = {name: tensor.clone() for name, tensor in self.live.items()}
        if tensors is not None:
            _copy(tensors, self.tensors)
        self.moving = [name for name, tensor in self.live.items() if tensor.is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step ``step``, counted from 0."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([self.tensors[n] for n in self.moving], [self.live[n] for n in self.moving], weight)
        _copy({name: tensor for name, tensor in self.live.items() if name not in set(self.moving)}, self.tensors)

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Let the model hold the average; its own weights come back bit for bit."""
        own = {name: tensor.clone() for name, tensor in self.live.items()}
        try:
            self.settle()
            yield
        finally:
            _copy(own, self.live)

    def settle(self) -> None:
        """Give the model the average for good."""
        _copy(self.tensors, self.live)


def tensors_of(model: nn.Module) -> Tensors:
    """Return the tensors of ``model``'s state, sharing its memory."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


@torch.no_grad()
def _copy(source: Mapping[str, torch.Tensor], target: Tensors) -> None:
    for name, tensor in source.items():
        target[name].copy_(tensor)
