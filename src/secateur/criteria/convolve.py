"""Shares of the input channels of a convolution in its outputs.

A module's own forward runs once more, on |input|, and every convolution in it takes |weight| and no bias: whatever
its stride, padding (also by reflection, or in code of the module's own), dilation or groups.  The outputs are the sums
S of all products; S is linear in |w|, so |w| times the gradient of sum(log S) are the sums of the shares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from secateur.criteria.ratios import magnitude, reciprocal, spans

# function -> number of spatial axes; the arguments begin with input, weight, bias; number 6 is groups
PLAIN: dict[Any, int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
TRANSPOSED: dict[Any, int] = {torch.conv_transpose1d: 1, torch.conv_transpose2d: 2, torch.conv_transpose3d: 3}
GROUPS = 6


@dataclass(frozen=True, eq=False)
class Call:
    """One convolution of magnitudes: ``a`` (n, C, ...), ``w``, its function and other arguments, and its outputs."""

    function: Any
    a: Tensor
    w: Tensor
    rest: tuple[Any, ...]
    named: dict[str, Any]
    sums: Tensor

    @property
    def groups(self) -> int:
        """Groups of the convolution."""
        return int(self.rest[GROUPS - 3] if len(self.rest) > GROUPS - 3 else self.named.get("groups", 1))

    @property
    def outputs(self) -> int:
        """Output channels M."""
        return self.w.shape[1] * self.groups if self.function in TRANSPOSED else self.w.shape[0]

    def kernels(self) -> Tensor:
        """Return the weights as (C, M / groups, ...): what each input channel sends to the outputs of its group."""
        if self.function in TRANSPOSED:
            return self.w
        parts = self.w.unflatten(0, (self.groups, -1)).transpose(1, 2)
        return parts.flatten(0, 1)

    def shares(self) -> Tensor:
        """Return the shares (C,) summed over samples and outputs."""
        (grad,) = torch.autograd.grad(self.sums, self.w, reciprocal(self.sums.detach()))
        product = self.w.detach() * grad
        if self.function in TRANSPOSED:
            return product.flatten(1).sum(1)
        return product.unflatten(0, (self.groups, -1)).flatten(3).sum((1, 3)).flatten()

    @torch.no_grad()
    def peaks(self, index: Tensor) -> Tensor:
        """Return the largest share (U,) over samples and outputs of units that hold the channels ``index`` (U, k)."""
        spatial = (PLAIN | TRANSPOSED)[self.function]
        batched = self.a.dim() == spatial + 2
        a, sums = (self.a, self.sums) if batched else (self.a[None], self.sums[None])
        inverse = reciprocal(sums).unflatten(1, (self.groups, -1))
        each, kernels = a.shape[1] // self.groups, self.kernels()
        index = index.to(a.device)
        found = a.new_zeros(len(index))
        for number in range(self.groups):
            held = index // each == number  # units differ in how many channels of this group they hold
            width = int(held.sum(1).max())
            if not width:
                continue
            order = held.byte().argsort(dim=1, descending=True, stable=True)[:, :width]
            use, chosen = held.gather(1, order), index.gather(1, order)
            for start, stop in spans(len(a), inverse[0, number].numel()):
                below = inverse[start:stop, number]
                for first, last in spans(len(index), below.numel()):
                    part = self._alone(a[start:stop], kernels, chosen[first:last], use[first:last])
                    table = (part * below[:, None]).transpose(0, 1).flatten(1)
                    found[first:last] = torch.maximum(found[first:last], table.amax(1))
        return found

    def _alone(self, a: Tensor, kernels: Tensor, chosen: Tensor, use: Tensor) -> Tensor:
        """Return the outputs (n, units, M / groups, ...) of the channels ``chosen`` (units, k) that ``use`` marks."""
        units, width = chosen.shape
        flat = chosen.flatten()
        w = kernels[flat] * use.flatten().to(kernels.dtype).view(-1, *[1] * (kernels.dim() - 1))
        if self.function not in TRANSPOSED:
            w = w.unflatten(0, (units, width)).transpose(1, 2).flatten(0, 1)
        rest, named = self.rest, self.named
        if len(rest) > GROUPS - 3:
            rest = (*rest[: GROUPS - 3], units, *rest[GROUPS - 2 :])
        else:
            named = {**named, "groups": units}
        return self.function(a[:, flat], w, None, *rest, **named).unflatten(1, (units, -1))


def recorded(forward: Callable[[Tensor], Any], a: Tensor) -> list[Call]:
    """Return the convolutions that ``forward`` does with the magnitudes ``a``."""
    with torch.enable_grad(), _Magnitudes() as mode:
        forward(a)
    return mode.calls


class _Magnitudes(TorchFunctionMode):
    """Lets convolutions take the magnitude of their weight and no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        if func not in PLAIN and func not in TRANSPOSED:
            return func(*args, **named)
        found = [args[n] if n < len(args) else named.pop(name, None) for n, name in enumerate(("input", "weight"))]
        named.pop("bias", None)
        a, w, rest = found[0].detach(), magnitude(found[1]).requires_grad_(), tuple(args[3:])
        sums = func(a, w, None, *rest, **named)
        self.calls.append(Call(func, a, w, rest, named, sums))
        return sums
