"""A convolution or linear layer, its batch norm and a gate as one layer: pi(x) * (norm(layer(x)) + beta)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from secateur.runtime.gates.choice import Choice, Gate
from secateur.runtime.gates.fbs import FBS
from secateur.runtime.gates.prefix import Prefix

SMALL = 1e-6  # a smaller scale cannot carry beta / gamma
NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.Linear: nn.BatchNorm1d,
}  # what can be gated, and the batch norm that goes with it
Producer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


class Gated(nn.Module):
    """What takes the place of a layer: y = pi(x) * (norm(layer(x)) + shift), zero where the gate says no.

    ``conv`` is a convolution or a linear layer, whose units lie on the last axis.  The batch norm has lost its scale
    (the gate gives it) and its shift (``shift``, added before scaling, the form of the FBS paper); without a batch
    norm ``norm`` is the identity.  Whatever followed the batch norm (ReLU, addition) follows here.  ``took`` is the
    path of that batch norm in the model, "" without one.  With a ``board``, each mask is left on it under ``path``,
    for the layers that share it.
    """

    took = path = ""
    board: Any = None

    def __init__(self, conv: Producer, norm: nn.Module, shift: Tensor, gate: Gate) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm
        self.shift = nn.Parameter(shift)
        self.gate = gate

    @property
    def before(self) -> int:
        """The number of inputs that the gate looks at."""
        return self.conv.in_features if isinstance(self.conv, nn.Linear) else self.conv.in_channels

    @property
    def units(self) -> int:
        """The number of channels or neurons that the gate decides about."""
        return len(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the maps (B, C, ...) of ``x``, (B, ..., C) of a linear layer; what is not chosen is exactly 0."""
        last = isinstance(self.conv, nn.Linear)
        choice: Choice = self.gate(x.movedim(-1, 1) if last else x)
        if self.board is not None:
            self.board.masks[self.path] = choice.mask
        y = self.norm(self.conv(x))
        shift, pi = self.shift.to(y.dtype), (choice.saliency * choice.mask).to(y.dtype)  # no wider maps under autocast
        ones = [1] * (y.dim() - 2)
        shape = [len(pi), *ones, len(shift)] if last else [*pi.shape, *ones]
        # pi y + pi shift, because adding one number per channel to all maps takes four times as long
        return y * pi.reshape(shape) + (pi * shift).reshape(shape)


@torch.no_grad()
def gated(conv: Any, norm: Any, make: Any, scale: str = "gate") -> Gated:
    """Return the layer that equals ``conv`` and ``norm`` as long as its gate computes everything.

    ``make`` builds the gate from the numbers of inputs and outputs.  An FBS gate begins with phi = 0 and rho = gamma;
    a negative gamma is absorbed into the sign of filter and running mean, a gamma of 0 into a filter of zeros.  The
    gain of a prefix gate begins with gamma.  ``conv`` is changed in place.

    ``scale`` "norm" leaves gamma and beta where they are, and the gate begins with rho = 1.  With rho = gamma the
    channels of the largest gamma win for every image, and the others get no gradient that could change that.
    """
    after = len(conv.weight)
    gate = make(conv.weight.shape[1] * getattr(conv, "groups", 1), after).to(conv.weight)
    gamma, beta = conv.weight.new_ones(after), conv.weight.new_zeros(after)
    plain: Any = nn.Identity()
    if norm is not None and scale == "norm":
        plain = copy.deepcopy(norm)
    elif norm is not None:
        gamma, beta = norm.weight.detach().clone(), norm.bias.detach().clone()
        plain = type(norm)(after, norm.eps, norm.momentum, affine=False).to(norm.weight)
        plain.load_state_dict(dict(norm.named_buffers()))
        plain.train(norm.training)
        if isinstance(gate, FBS):
            sign = torch.where(gamma < 0, -1.0, 1.0).to(gamma)
            conv.weight.mul_(sign.reshape(-1, *[1] * (conv.weight.dim() - 1)))
            if conv.bias is not None:
                conv.bias.mul_(sign)
            plain.running_mean.mul_(sign)
            gamma = gamma.abs()
        silent = gamma.abs() < SMALL  # a constant beta: a filter of zeros says the same
        conv.weight[silent] = 0
        if conv.bias is not None:
            conv.bias[silent] = 0
        plain.running_mean[silent] = 0
        gamma = torch.where(silent, 1, gamma)
    if isinstance(gate, FBS):
        gate.predictor.weight.zero_()
        gate.predictor.bias.copy_(gamma)
    elif isinstance(gate, Prefix):
        gate.gain.copy_(gamma)
    return Gated(conv, plain, beta / gamma, gate)
