"""Multiply-accumulates of a gated network, per sample, as its gates choose."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from secateur.graph.state import eval_mode
from secateur.runtime.gates import FBS, watch
from secateur.runtime.gates.cost import Meter, meter


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
    return spent(model, meter(model, inputs), [inputs])


def spent(model: nn.Module, count: Meter, batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return what ``macs`` returns for all samples (n,) of ``batches``, with the ``meter`` of the model.

    >>> from secateur.runtime.gates import gate
    >>> chain = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.ReLU())
    >>> x = torch.rand(3, 3, 2, 2)
    >>> model = gate(chain, 0.5, x).model
    >>> spent(model, meter(model, x), x.split(2)).tolist()
    [48.0, 48.0, 48.0]
    """
    found = []
    with eval_mode(model), torch.no_grad(), watch(model) as choices:
        for inputs in batches:
            model(inputs)
            found.append(count(choices, len(inputs)).cpu())
    return torch.cat(found)


def overhead(model: nn.Module) -> int:
    """Return what the gates themselves multiply per sample, at most: inputs times outputs of every predictor."""
    found = [module.predictor for module in model.modules() if isinstance(module, FBS)]
    return sum(layer.in_features * layer.out_features for layer in found)
