"""Feature boosting and suppression (Gao et al. 2019, arXiv 1810.05331): a predictor picks the channels per input."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from secateur.runtime.gates.choice import Choice, Gate
from secateur.types import PlanError

POOLINGS = ("l1", "avg", "max", "l2")
THRESHOLDS = ("online", "local")
DECAY = 0.9997  # of the running threshold, as the reference has it
OPEN = -0.1  # a threshold below every saliency


def quota(density: float, units: int) -> int:
    """Return ceil(d C), the number of winners; d is read as the decimal that it was written as.

    >>> quota(0.7, 10), quota(0.5, 7), quota(0.001, 64)
    (7, 4, 1)
    """
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise PlanError(f"a density is the fraction of channels computed per input, in (0, 1]; got {density!r}.")
    return math.ceil(Fraction(repr(density)) * units)


def pooled(x: torch.Tensor, how: str) -> torch.Tensor:
    """Return one number per channel, (B, C), of maps (B, C, ...): ``l1`` is mean |x|, ``l2`` the root mean square.

    Of a vector (B, C) there is one number to pool: |x|, or x itself.

    >>> pooled(torch.tensor([[[[3.0, -4.0]]]]), "l1").item()
    3.5
    """
    flat = x.flatten(2) if x.dim() > 2 else x[:, :, None]
    if how == "l1" and x.dim() > 2:
        total: torch.Tensor = _Size.apply(x)
        return total / flat.shape[2]
    if how == "l1":
        return x.abs()
    if how == "avg":
        return flat.mean(2)
    if how == "max":
        return flat.amax(2)
    if how == "l2":
        return torch.linalg.vector_norm(flat, dim=2) / math.sqrt(flat.shape[2])
    raise PlanError(f"pooling must be one of {', '.join(POOLINGS)}; got {how!r}.")


class _Size(torch.autograd.Function):
    """Sum of |x| over the pixels: a tenth of the time of torch's 1-norm on maps that lie channels last."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """Return (B, C) of ``x`` (B, C, ...)."""
        ctx.save_for_backward(x)
        return x.abs().sum(tuple(range(2, x.dim())))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        """Return the sign of each number, times the gradient of its channel."""
        (x,), (grad,) = ctx.saved_tensors, grads
        return x.sgn() * grad.reshape(*grad.shape, *[1] * (x.dim() - 2))


def winners(saliency: torch.Tensor, k: int) -> torch.Tensor:
    """Return the bool mask (B, C) of exactly ``k`` winners per sample; of equal saliencies the lower index wins.

    >>> winners(torch.tensor([[0.0, 2.0, 0.0, 0.0]]), 2).tolist()
    [[True, True, False, False]]
    """
    order = saliency.detach().sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(saliency, dtype=torch.bool).scatter_(1, order, True)


class FBS(Gate):
    """The gate of FBS in the form of the paper, section 3: g(x) = relu(ss(x) phi + rho), the k largest stay.

    ``ss`` pools each input channel to one number, ``predictor`` holds phi (its weight, transposed) and rho (its bias).
    The winners keep their saliency, which scales (boosts) their normalised output.  The selection itself has no
    gradient, the saliencies of winners do.  ``enabled = False`` gives every channel its rho and computes all.

    ``threshold`` "online" selects exactly the k largest.  "local" is cheap and keeps the density on average only: it
    computes what is above ``level``, the running mean of the (k + 1)-th largest saliency in training.  Departs from the
    reference, whose mean starts at -0.1 with decay 0.9997 and follows a new density for thousands of steps: here it
    starts at the first batch of each density, and the decay grows from 0.18 to that.
    """

    level: torch.Tensor
    steps: torch.Tensor
    steps_for: torch.Tensor

    def __init__(
        self, before: int, after: int, density: float = 1.0, pooling: str = "l1", threshold: str = "online"
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise PlanError(f"pooling must be one of {', '.join(POOLINGS)}; got {pooling!r}.")
        if threshold not in THRESHOLDS:
            raise PlanError(f"threshold must be one of {', '.join(THRESHOLDS)}; got {threshold!r}.")
        quota(density, after)
        self.threshold = threshold
        if threshold == "local":
            self.register_buffer("level", torch.tensor(OPEN))
            self.register_buffer("steps", torch.tensor(0))
            self.register_buffer("steps_for", torch.tensor(after))
        self.density = density
        self.pooling = pooling
        self.enabled = True
        self.predictor = nn.Linear(before, after)

    @property
    def k(self) -> int:
        """How many channels are computed per sample."""
        return quota(self.density, self.predictor.out_features) if self.enabled else self.predictor.out_features

    def forward(self, x: torch.Tensor) -> Choice:
        """Return the saliencies and the winners, exactly ``k`` ("online"), for each sample of ``x`` (B, C_in, ...)."""
        if not self.enabled:
            saliency = self.predictor.bias.relu().expand(len(x), -1)
            return Choice(saliency, torch.ones_like(saliency, dtype=torch.bool))
        saliency = self.predictor(pooled(x, self.pooling)).relu()
        if self.threshold == "online" or self.k == saliency.shape[1]:
            return Choice(saliency, winners(saliency, self.k))
        if self.training:
            self._follow(saliency.detach())
        return Choice(saliency, saliency > self.level)

    def _follow(self, saliency: torch.Tensor) -> None:
        """Move ``level`` towards the mean over ``saliency`` (B, C) of the (k + 1)-th largest."""
        seen = saliency.topk(self.k + 1, dim=1).values[:, -1].mean()
        self.steps *= self.steps_for == self.k
        self.steps_for.fill_(self.k)
        decay = ((1 + self.steps) / (10 + self.steps)).clamp_max(DECAY).to(seen)
        self.level.copy_(torch.where(self.steps > 0, decay * self.level + (1 - decay) * seen, seen))
        self.steps += 1

    def extra_repr(self) -> str:
        """Density, pooling and a threshold that runs, for ``print(model)``."""
        more = "" if self.threshold == "online" else f", threshold={self.threshold!r}"
        return f"density={self.density}, pooling={self.pooling!r}{more}"


def penalty(choices: Mapping[str, Choice]) -> torch.Tensor:
    """Return the sum over gates of the mean over the batch of ||g(x)||_1, to be weighted by lambda (paper: 1e-8).

    The mean makes lambda independent of the batch size.  ``choices`` are those of ``watch``.
    """
    if not choices:
        raise PlanError("no gate has run; call the gated model inside `with watch(model) as choices`.")
    return torch.stack([choice.saliency.abs().sum(1).mean() for choice in choices.values()]).sum()
