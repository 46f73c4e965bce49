"""Modules that lost all of their units: what torch's own forward refuses or gets wrong with sizes of zero.

What makes the units hands on one channel of zeros in their place, which pooling, activations and views take as they
take any other; what rides with them passes it on; what consumes them gives its bias alone.  The parameters have zero
elements and keep their names, so that counts, optimisers and checkpoints need no exception.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd


class Hollow:
    """The forward of a module without units (a plain attribute, like ``patch.SizedForward``)."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        """Return zeros for what the module would make of its units, or its bias where it consumes them."""
        module: Any = self.module
        if isinstance(module, _ConvNd):
            outer = 1 if module.transposed else 0
            sizes = [_length(module, x.shape[k + 2], k) for k in range(x.dim() - 2)]
            return _made(module, x.new_zeros(len(x), 1, *sizes), outer, 1)
        if isinstance(module, nn.Linear):
            return _made(module, x.new_zeros(*x.shape[:-1], 1), 0, -1)
        return x


def hollow(model: nn.Module) -> nn.Module:
    """Give every module of ``model`` that has no units left its ``Hollow`` forward; return ``model``."""
    for module in model.modules():
        if isinstance(module, _ConvNd | nn.Linear | _BatchNorm | nn.PReLU):
            held = (*module._parameters.values(), *module._buffers.values())
            if any(tensor is not None and 0 in tensor.shape for tensor in held):
                module.__dict__["forward"] = Hollow(module)
    return model


def _made(module: Any, zeros: torch.Tensor, outer: int, axis: int) -> torch.Tensor:
    """Return ``zeros`` (one channel) where the module makes the units, else as many channels as it has, plus bias."""
    if not module.weight.shape[outer]:
        return zeros
    # the sum over nothing is 0 for each channel; it lets a trace see whose channels these are
    level = module.weight.sum([k for k in range(module.weight.dim()) if k != outer])
    level = level if module.bias is None else level + module.bias
    shape = [1] * zeros.dim()
    shape[axis] = len(level)
    return zeros + level.reshape(shape)


def _length(conv: Any, size: int, k: int) -> int:
    """Return the length of axis ``k`` that ``conv`` makes of ``size``."""
    stride, reach = conv.stride[k], conv.dilation[k] * (conv.kernel_size[k] - 1)
    if conv.transposed:
        return (size - 1) * stride - 2 * conv.padding[k] + reach + conv.output_padding[k] + 1
    if isinstance(conv.padding, str):
        return size if conv.padding == "same" else (size - reach - 1) // stride + 1
    return (size + 2 * conv.padding[k] - reach - 1) // stride + 1
