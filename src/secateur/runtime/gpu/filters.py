"""The weights of one convolution on the device, with everything that is constant folded in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.runtime.gates import Prefix
from secateur.runtime.nodes import Node


@dataclass(frozen=True, eq=False)
class Filters:
    """``folded`` (C_out, C_in / groups, kh, kw), of the host, and ``shift`` (C_out,): y = folded * x + shift, float32.

    The scale of the batch norm is in both, and the gain of a prefix gate; the saliency of an FBS gate is not.  The
    device gets the order of the weights that is asked for.
    """

    folded: Tensor
    shift: Tensor
    node: Node

    @classmethod
    def of(cls, node: Node, gate: nn.Module | None, device: torch.device) -> Filters:
        """Return the weights of ``node`` for ``device``; folded in float64."""
        assert node.weight is not None
        assert node.scale is not None
        assert node.shift is not None
        scale, shift = node.scale.double(), node.shift.double()
        if isinstance(gate, Prefix):
            gain = gate.gain.detach().to(scale)
            scale, shift = scale * gain, shift * gain
        weight = node.weight.double() * scale[:, None, None, None]
        return cls(weight.float().cpu(), shift.float().to(device), node)

    @cached_property
    def weight(self) -> Tensor:
        """The weights in torch's order."""
        return self.folded.to(self.shift.device)

    @cached_property
    def packed(self) -> Tensor:
        """The weights as (kh, kw, C_out, C_in): neighbouring inputs of one tap lie side by side for the kernel."""
        return self.folded.permute(2, 3, 0, 1).contiguous().to(self.shift.device)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of the output."""
        node = self.node
        given = zip((height, width), node.kernel, node.stride, node.padding, node.dilation, strict=True)
        high, wide = [(side + 2 * pad - gap * (taps - 1) - 1) // step + 1 for side, taps, step, pad, gap in given]
        return high, wide

    def run(self, x: Tensor, inputs: int | None = None, outputs: int | None = None) -> Tensor:
        """Return torch's convolution of ``x`` (B, inputs, H, W) with the first ``inputs`` and ``outputs`` channels."""
        node: Any = self.node
        weight, shift = self.weight[:outputs, :inputs], self.shift[:outputs]
        return F.conv2d(x, weight, shift, node.stride, node.padding, node.dilation, node.groups)
