"""Multiply-accumulates of a gated network, per sample, as its gates choose."""

from __future__ import annotations

import torch
from torch import nn

from secateur.graph.state import eval_mode
from secateur.runtime.gates import FBS, watch
from secateur.runtime.gates.cost import meter


def macs(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Return the multiply-accumulates (B,) float64 that each sample of ``inputs`` (B, C, H, W) needs.

    taps * active inputs * active outputs * output pixels of every convolution, and the linear layers; sets pass
    through pooling, activations, dropout and concatenation, a sum has the union.  The predictors of the gates and
    the scaling are not counted: they are ``overhead``.

    >>> from secateur.models.cifarnet import cifarnet
    >>> from secateur.runtime.gates import gate
    >>> x = torch.rand(1, 3, 32, 32)
    >>> macs(gate(cifarnet(), 0.5, x).model, x).item()
    43964736.0
    """
    count = meter(model, inputs)
    with eval_mode(model), torch.no_grad(), watch(model) as choices:
        model(inputs)
    return count(choices, len(inputs))


def overhead(model: nn.Module) -> int:
    """Return what the gates themselves multiply per sample, at most: inputs times outputs of every predictor."""
    found = [module.predictor for module in model.modules() if isinstance(module, FBS)]
    return sum(layer.in_features * layer.out_features for layer in found)
