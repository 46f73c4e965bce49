"""First-order Taylor estimate of the change of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.criteria.evidence import Criterion, Evidence
from secateur.types import PlanError

FORMS = {"paper": "unit_grads", "elementwise": "unit_grads_abs"}


@dataclass(frozen=True)
class Taylor(Criterion):
    """How much the loss would move, to first order, if the unit's activation became zero.

    ``paper``: mean_n | (1/M) sum_m a_nm g_nm |, absolute value after the mean over the M positions, per
    example. ``elementwise``: mean_n (1/M) sum_m | a_nm g_nm |, larger where positive and negative parts
    cancel. g_n is the gradient of the loss of sample n alone.  a is read where it is consumed, after the
    activation.

    Raises ``PlanError`` for another form.  Source: Molchanov et al. 2017, arXiv 1611.06440, equation 8; the
    paper's L2 norm per layer is ``Normalised`` (``allocate`` applies it in the global allocation).

    >>> Taylor().evidence
    frozenset({'unit_grads'})
    """

    form: str = "paper"
    name: ClassVar[str] = "taylor"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise PlanError(f"Taylor(form=...) is one of {', '.join(FORMS)}; got {self.form!r}.")

    @property
    def evidence(self) -> frozenset[str]:
        """Names of the ``Evidence`` fields that this criterion reads."""
        return frozenset({FORMS[self.form]})

    def each(self, evidence: Evidence) -> Tensor:
        """Return the estimate of every sample (N, U), in units of loss per position."""
        return evidence.need(FORMS[self.form]).abs() / evidence.need("positions").unsqueeze(1)
