"""A convolution, its batch norm and a gate as one layer: pi(x) * (norm(conv(x)) + beta)."""

from __future__ import annotations

import torch
from torch import nn

from secateur.runtime.gates.choice import Choice, Gate
from secateur.runtime.gates.fbs import FBS
from secateur.runtime.gates.prefix import Prefix

SMALL = 1e-6  # a smaller scale cannot carry beta / gamma


class Gated(nn.Module):
    """What takes the place of a convolution: y = pi(x) * (norm(conv(x)) + shift), zero where the gate says no.

    The batch norm has lost its scale (the gate gives it) and its shift (``shift``, added before scaling, the form of
    the FBS paper); without a batch norm ``norm`` is the identity.  Whatever followed the batch norm (ReLU, addition)
    follows here.  ``took`` is the path of that batch norm in the model, "" without one.
    """

    took = ""

    def __init__(self, conv: nn.Conv2d, norm: nn.Module, shift: torch.Tensor, gate: Gate) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm
        self.shift = nn.Parameter(shift)
        self.gate = gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the gated maps (B, C, H, W) of ``x``; channels that are not chosen are exactly 0."""
        choice: Choice = self.gate(x)
        y = self.norm(self.conv(x))
        shift, pi = self.shift.to(y.dtype), (choice.saliency * choice.mask).to(y.dtype)  # no wider maps under autocast
        return (y + shift[:, None, None]) * pi[:, :, None, None]


@torch.no_grad()
def gated(conv: nn.Conv2d, norm: nn.BatchNorm2d | None, density: float | None, pooling: str, groups: int) -> Gated:
    """Return the layer that equals ``conv`` and ``norm`` as long as its gate computes everything.

    ``density`` makes an FBS gate with phi = 0 and rho = gamma; a negative gamma is absorbed into the sign of filter
    and running mean, a gamma of 0 into a filter of zeros.  ``density`` None makes a prefix gate of ``groups``.
    ``conv`` is changed in place.
    """
    after = conv.out_channels
    gamma, beta = torch.ones_like(conv.weight[:, 0, 0, 0]), torch.zeros_like(conv.weight[:, 0, 0, 0])
    plain: nn.Module = nn.Identity()
    if norm is not None:
        gamma, beta = norm.weight.detach().clone(), norm.bias.detach().clone()
        plain = nn.BatchNorm2d(after, norm.eps, norm.momentum, affine=False).to(norm.weight)
        plain.load_state_dict(dict(norm.named_buffers()))
        plain.train(norm.training)
        if density is not None:
            sign = torch.where(gamma < 0, -1.0, 1.0).to(gamma)
            conv.weight.mul_(sign[:, None, None, None])
            if conv.bias is not None:
                conv.bias.mul_(sign)
            plain.running_mean.mul_(sign)  # type: ignore[union-attr]
            gamma = gamma.abs()
        silent = gamma.abs() < SMALL  # a constant beta: a filter of zeros says the same
        conv.weight[silent] = 0
        if conv.bias is not None:
            conv.bias[silent] = 0
        plain.running_mean[silent] = 0  # type: ignore[index]
        gamma = torch.where(silent, 1, gamma)
    gate: FBS | Prefix
    if density is not None:
        gate = FBS(conv.in_channels, after, density, pooling).to(conv.weight)
        gate.predictor.weight.zero_()
        gate.predictor.bias.copy_(gamma)
    else:
        gate = Prefix(after, groups).to(conv.weight)
        gate.gain.copy_(gamma)
    return Gated(conv, plain, beta / gamma, gate)
