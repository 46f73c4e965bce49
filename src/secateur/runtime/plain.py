"""The network that gates were put on, as their weights are now."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from secateur.runtime.gates import FBS, Follower, Gated, Steered


@torch.no_grad()
def plain(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` without gates (and controller): convolutions, batch norms, and a constant scale.

    That scale is rho of an FBS gate and the gain of a prefix gate, so the copy equals the gated model with all FBS
    gates switched off, and with the largest actions.

    >>> from secateur.runtime.gates import gate
    >>> chain = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    >>> [type(layer).__name__ for layer in plain(gate(chain, 0.5, torch.rand(1, 3, 8, 8)).model)]
    ['Conv2d', 'BatchNorm2d', 'ReLU']
    """
    model = copy.deepcopy(model.model if isinstance(model, Steered) else model)
    for path, layer in [(path, module) for path, module in model.named_modules() if isinstance(module, Gated)]:
        gate: Any = layer.gate
        scale: torch.Tensor = gate.predictor.bias.relu() if isinstance(gate, FBS) else gate.gain
        producer: Any = layer.conv
        norm: Any = layer.norm
        shift = layer.shift * scale
        if layer.took:
            whole = type(norm)(norm.num_features, norm.eps, norm.momentum).to(producer.weight).train(norm.training)
            weight = norm.weight * scale if norm.affine else scale
            bias = norm.bias * scale + shift if norm.affine else shift
            whole.load_state_dict({**norm.state_dict(), "weight": weight, "bias": bias})
            model.set_submodule(layer.took, whole)
        else:
            producer.weight.mul_(scale.reshape(-1, *[1] * (producer.weight.dim() - 1)))
            producer.bias = nn.Parameter(shift if producer.bias is None else producer.bias * scale + shift)
        model.set_submodule(path, producer)
    for path, follower in [(path, module) for path, module in model.named_modules() if isinstance(module, Follower)]:
        model.set_submodule(path, follower.layer)
    return model
