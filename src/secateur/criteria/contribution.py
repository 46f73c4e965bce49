"""Contribution of a unit to what its consumers compute."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.criteria.evidence import Criterion, Evidence, narrow
from secateur.types import PlanError


@dataclass(frozen=True)
class Contribution(Criterion):
    """lambda1 * C_avg + lambda2 * C_max, the mean and the largest share of a unit in the next units' inputs.

    The share of unit k in next unit j and sample f is |w_jk a_kf| / sum_i |w_ji a_if|, with a the value that enters
    the consumer, after the activation function, and 0 where the sum is 0.  C_avg is its mean over f and j, C_max its
    maximum; both lie in [0, 1], and C_avg over all inputs of one consumer sums to 1.  In a convolution j runs over the
    positions of all output channels; a unit that spans several columns (after flatten) has the sum of their shares;
    with several consumers, j runs over the output units of all of them.  ``lambda1`` rewards steady units, ``lambda2``
    protects those that matter rarely but then much; with ``lambda2=0`` C_max, which costs more, is not collected.

    Raises ``PlanError`` for negative weights, or for zero twice.  Source: train-time pruning by neural importance
    (reference system S1), which takes the values before the activation function and the last batch only.

    >>> Contribution(lambda1=1, lambda2=0).evidence
    frozenset({'contributions'})
    """

    lambda1: float = 0.5
    lambda2: float = 0.5
    name: ClassVar[str] = "contribution"

    def __post_init__(self) -> None:
        given = (self.lambda1, self.lambda2)
        if any(isinstance(w, bool) or not isinstance(w, int | float) for w in given) or not (
            min(given) >= 0 and 0 < max(given) < math.inf
        ):
            raise PlanError(
                "Contribution(lambda1=, lambda2=) are weights of at least 0, not both 0; "
                f"got {self.lambda1!r}, {self.lambda2!r}."
            )

    @property
    def evidence(self) -> frozenset[str]:
        """Names of the ``Evidence`` fields that this criterion reads."""
        return frozenset(name for name, weight in self._parts if weight)

    def __call__(self, evidence: Evidence) -> Tensor:
        """Return the blend (U,)."""
        return narrow(torch.stack([w * evidence.need(name) for name, w in self._parts if w]).sum(0))

    @property
    def _parts(self) -> tuple[tuple[str, float], ...]:
        return ("contributions", self.lambda1), ("contribution_max", self.lambda2)
