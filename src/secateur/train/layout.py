"""The order of the numbers in memory: channels last (NHWC) where convolutions run faster that way.

Training on one CPU core took 0.74 of the time of the usual order for ResNet-20, 0.52 for MobileNetV2, 1.1 for
ResNet-18 (32x32 images) and 0.6 to 1.1 for small networks (means of two runs each).
"""

from __future__ import annotations

import torch
from torch import nn

from secateur.graph.state import eval_mode, state_kept


def laid_out(model: nn.Module, inputs: torch.Tensor) -> bool:
    """Lay ``model`` out channels last if it has 2-D convolutions and then runs on ``inputs``; return whether it is.

    Code that calls ``view`` on images can refuse that order.
    """
    if inputs.dim() != 4 or not any(parameter.dim() == 4 for parameter in model.parameters()):
        return False
    model.to(memory_format=torch.channels_last)
    try:
        with eval_mode(model), state_kept(model), torch.no_grad():
            model(inputs.contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        model.to(memory_format=torch.contiguous_format)
        return False
    return True


def like_weights(optimizer: torch.optim.Optimizer) -> None:
    """Lay loaded state out like its weights: another order of the numbers in memory can round differently."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter).copy_(value)
