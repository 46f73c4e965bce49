"""Batch norm over the whole batch while several processes hold a share of it each, on any device.

Torch's ``SyncBatchNorm`` is for CUDA alone, replaces modules and misses batch norms that are functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from secateur.data.share import Share
from secateur.train.devices import Team


@contextmanager
def norms_joined(team: Team, share: Share) -> Iterator[None]:
    """Let every ``F.batch_norm`` that takes its statistics from the batch take them from all processes' rows.

    All processes must run the same batch norms in the same order, forward and backward.
    """
    if not team.several:
        yield
        return
    with _Joined(team, share):
        yield


class _Joined(TorchFunctionMode):
    def __init__(self, team: Team, share: Share) -> None:
        super().__init__()
        self.team, self.share = team, share
        self.batch_norm = torch.compiler.disable(self._batch_norm)  # compiled code is cut in two at each of them

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.batch_norm:
            return self.batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        input: torch.Tensor,
        running_mean: torch.Tensor | None,
        running_var: torch.Tensor | None,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> torch.Tensor:
        if not training:
            return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
        out, mean, var, count = _Normed.apply(input, weight, bias, eps, self.team, self.share.real)
        with torch.no_grad():
            if running_mean is not None:
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            if running_var is not None:
                running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
        return out


class _Normed(torch.autograd.Function):
    """Normalise (n, channels, ...) by mean and variance over the rows of all processes.

    Each process gives count, mean and variance of its rows, which are joined as by Chan, Golub and LeVeque 1979:
    no difference of large squares.  The backward pass is that of batch norm with its two sums over all processes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        team: Team,
        real: bool,
    ) -> tuple[torch.Tensor, ...]:
        wide = input if input.dtype == torch.float64 else input.float()
        own_var, own_mean = torch.var_mean(wide, _axes(input), correction=0)
        table = torch.zeros(team.size, 2 * input.shape[1] + 1, dtype=torch.float64, device=input.device)
        if real:
            table[team.rank, 0] = input.numel() // input.shape[1]
            table[team.rank, 1:] = torch.cat([own_mean, own_var])
        counts, means, variances = team.sum_(table).tensor_split([1, 1 + input.shape[1]], 1)
        count = counts.sum()
        mean = (counts * means).sum(0) / count
        var = (counts * (variances + (means - mean).square())).sum(0) / count
        ctx.team, ctx.real = team, real
        ctx.save_for_backward(input, weight, mean, (var + eps).rsqrt(), count)
        ctx.mark_non_differentiable(mean, var, count)
        out = F.batch_norm(input, mean.to(wide.dtype), var.to(wide.dtype), weight, bias, False, 0.0, eps)
        return out, mean, var, count

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        input, weight, mean, scale, count = ctx.saved_tensors
        wide = torch.float64 if input.dtype == torch.float64 else torch.float32
        shape = [-1 if axis == 1 else 1 for axis in range(input.dim())]
        grad = grads[0].to(wide)
        normal = (input.to(wide) - mean.to(wide).view(shape)) * scale.to(wide).view(shape)
        own = torch.stack([grad.sum(_axes(input)), (grad * normal).sum(_axes(input))])
        both = ctx.team.sum_(own.double()) / count
        plain, along = both.to(wide) * int(ctx.real)  # rows that count nothing have no part in the statistics
        factor = scale.to(wide) if weight is None else scale.to(wide) * weight.to(wide)
        back = (grad - plain.view(shape) - normal * along.view(shape)) * factor.view(shape)
        slope, shift = (None, None) if weight is None else (own[1].to(weight.dtype), own[0].to(weight.dtype))
        return back.to(input.dtype), slope, shift if ctx.needs_input_grad[2] else None, None, None, None


def _axes(input: torch.Tensor) -> list[int]:
    return [axis for axis in range(input.dim()) if axis != 1]
