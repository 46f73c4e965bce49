"""Magnitude of the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.criteria.evidence import Criterion, Evidence, narrow, wide
from secateur.types import PlanError


@dataclass(frozen=True)
class Magnitude(Criterion):
    """The p-norm of all weights that produce a unit.

    score = (sum_i |w_i|^p)^(1/p) over the slices that produce it (with ``inputs`` also those that consume
    it); ``p`` is 1, 2 or ``math.inf`` ("inf" in a recipe).  ``normalise`` divides the sum by the number of
    weights first, so that a wide fan-in does not count as importance.  For single kernels p = inf is the
    kernel-level criterion.

    Raises ``PlanError`` for another p.  Source: Li et al. 2017, "Pruning Filters for Efficient ConvNets"
    (p = 1).

    >>> Magnitude(p=1).evidence
    frozenset({'weights'})
    """

    p: float = 2
    normalise: bool = False
    inputs: bool = False
    name: ClassVar[str] = "magnitude"

    def __post_init__(self) -> None:
        if self.p not in (1, 2, math.inf, "inf"):
            raise PlanError(f"Magnitude(p=...) is 1, 2 or math.inf; got {self.p!r}.")
        object.__setattr__(self, "p", float(self.p) if isinstance(self.p, str) else self.p)

    @property
    def evidence(self) -> frozenset[str]:
        """Names of the ``Evidence`` fields that this criterion reads."""
        return frozenset({"weights", "consumers"} if self.inputs else {"weights"})

    def applies(self, evidence: Evidence) -> bool:
        """False for a group without parameters of these roles."""
        return bool(self._slices(evidence))

    def __call__(self, evidence: Evidence) -> Tensor:
        """Return the norms (U,)."""
        slices = self._slices(evidence)
        norms = torch.stack([_norm(s, self.p) for s in slices])
        total = torch.linalg.vector_norm(norms, self.p, dim=0)
        count = sum(s.shape[1] for s in slices)
        return narrow(total / count ** (1 / self.p) if self.normalise else total)

    def _slices(self, evidence: Evidence) -> list[Tensor]:
        found = [s for s in evidence.weights if s.role == "out"]
        return [s.values for s in (*found, *(evidence.consumers if self.inputs else ())) if s.values.shape[1]]


def _norm(values: Tensor, p: float) -> Tensor:
    """Return the row norms in float64: from float32, which is faster, unless a power left its range."""
    if values.dtype == torch.float32:
        norms = torch.linalg.vector_norm(values, p, dim=1)
        low, high = norms.aminmax()
        if low > 1e-12 and high < 1e12:
            return wide(norms)
    return torch.linalg.vector_norm(wide(values), p, dim=1)
