"""One network of a suite: how to build it, how to feed it, and what is expected of it."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Inputs = Callable[[int], Any]  # batch size -> tensor | tuple (positional) | dict (keyword) | (args, kwargs)


@dataclass(frozen=True)
class Case:
    """A network to judge.

    ``inputs(batch)`` makes example inputs; ``train_inputs`` those of train mode where they differ (detection).
    ``cut_expected`` is False where nothing can be cut, None where both answers are fine.
    """

    suite: str
    name: str
    make: Callable[[], nn.Module]
    inputs: Inputs
    train_inputs: Inputs | None = None
    tags: tuple[str, ...] = ()
    cut_expected: bool | None = None
    batches: tuple[int, int] = (2, 3)

    def build(self) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        """Return (model in eval mode with non-trivial weights, args, kwargs)."""
        model = self.model()
        args, kwargs = self.feed(self.batches[0])
        return model, args, kwargs

    def model(self) -> nn.Module:
        """Return the model: the same seed gives the same weights in every process."""
        torch.manual_seed(zlib.crc32(self.name.encode()))
        model = self.make()
        randomise(model)
        return model.eval()

    def feed(self, batch: int, train: bool = False) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return (args, kwargs) for ``batch`` samples."""
        torch.manual_seed(1000 + batch)
        made = (self.train_inputs or self.inputs)(batch) if train else self.inputs(batch)
        if isinstance(made, dict):
            return (), made
        if isinstance(made, tuple):
            if len(made) == 2 and isinstance(made[0], tuple) and isinstance(made[1], dict):
                return made
            return made, {}
        return (made,), {}


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Give constant parameters and running statistics non-trivial values, so that no mistake can hide in them.

    Ones (norm scales) become U(0.5, 1.5), zeros (biases, zero-initialised branches) N(0, 0.1), other constants
    (layer scales of 1e-6) U(0.1, 0.3); running means N(0, 0.2), running variances U(0.5, 1.5).  Weights drawn with
    a deviation of 0.02 are scaled up: attention over them would be uniform, whatever the heads hold.
    """
    for parameter in model.parameters():
        if not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        low, high = float(parameter.min()), float(parameter.max())
        if low != high:
            _strengthen(parameter)
            continue
        if low == 0.0:
            parameter.normal_(0.0, 0.1)
        elif low == 1.0:
            parameter.uniform_(0.5, 1.5)
        elif parameter.numel() > 1:
            parameter.uniform_(0.1, 0.3)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0.0, 0.2)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)


def _strengthen(parameter: torch.Tensor) -> None:
    if parameter.dim() < 2 or parameter.is_complex():
        return
    gain = float(parameter.std()) * (parameter.numel() / parameter.shape[0]) ** 0.5
    if 0.0 < gain < 0.4:
        parameter.mul_(0.7 / gain)
