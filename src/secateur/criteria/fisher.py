"""Fisher estimate of the increase of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.criteria.evidence import Criterion, Evidence


@dataclass(frozen=True)
class Fisher(Criterion):
    """The second-order (empirical Fisher) estimate of the loss increase when the unit is zeroed.

    score = 1/(2N) sum_n s_n^2 with s_n = sum over positions of a * dL_n/da, L_n the loss of sample n
    alone, so that mean- and sum-reduced losses and unequal batches give the same value.

    Source: Theis et al. 2018, arXiv 1801.05787, equation 6.  Its cost term beta * dCost is ``Costed``.

    >>> Fisher().evidence
    frozenset({'unit_grads'})
    """

    name: ClassVar[str] = "fisher"

    @property
    def evidence(self) -> frozenset[str]:
        """Names of the ``Evidence`` fields that this criterion reads."""
        return frozenset({"unit_grads"})

    def each(self, evidence: Evidence) -> Tensor:
        """Return s_n^2 / 2 (N, U), in units of loss."""
        return evidence.need("unit_grads").square() / 2
