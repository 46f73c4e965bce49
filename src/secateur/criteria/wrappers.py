"""Wrappers: a criterion in, a criterion (or scores) out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur.criteria.evidence import Criterion, Evidence, narrow, wide
from secateur.types import PlanError, Scores


@dataclass(frozen=True)
class Wrapper(Criterion):
    """Base of criteria that change the scores of another one."""

    inner: Criterion

    @property
    def evidence(self) -> frozenset[str]:
        """What the inner criterion reads."""
        return self.inner.evidence

    def applies(self, evidence: Evidence) -> bool:
        """Where the inner criterion applies."""
        return self.inner.applies(evidence)

    def __call__(self, evidence: Evidence) -> Tensor:
        """Return the changed scores (U,)."""
        return self.change(self.inner(evidence), evidence)

    def each(self, evidence: Evidence) -> Tensor:
        """What the inner criterion says about every sample (N, U)."""
        return self.inner.each(evidence)

    def finish(self, mean: Tensor, evidence: Evidence) -> Tensor:
        """Return the changed scores (U,) from the mean of ``each``."""
        return self.change(self.inner.finish(mean, evidence), evidence)

    def change(self, scores: Tensor, evidence: Evidence) -> Tensor:
        """Return what becomes of the inner ``scores`` (U,)."""
        raise NotImplementedError


@dataclass(frozen=True)
class Normalised(Wrapper):
    """The inner scores divided by their L2 norm over the group; an all-zero group stays zero.

    Source: Molchanov et al. 2017, arXiv 1611.06440, section 2.2.

    >>> from secateur.criteria import Taylor
    >>> Normalised(Taylor()).evidence
    frozenset({'unit_grads'})
    """

    def change(self, scores: Tensor, evidence: Evidence) -> Tensor:
        """Return scores (U,) of L2 norm one (or zero)."""
        return l2(scores)


@dataclass(frozen=True)
class Costed(Wrapper):
    """The inner score minus what the unit costs: score - macs * dM/M - params * dP/P.

    dM/M and dP/P are the fractions of the model's MACs and parameters that removing this one unit saves,
    so an expensive unit goes earlier.  ``macs`` and ``params`` are the weights (lambda of Molchanov et
    al. 2017, equation 9; beta of Theis et al. 2018, equation 8), at least 0.

    Raises ``PlanError`` for a negative weight.

    >>> from secateur.criteria import Fisher
    >>> sorted(Costed(Fisher(), macs=1e-3).evidence)
    ['macs', 'unit_grads']
    """

    macs: float = 0.0
    params: float = 0.0

    def __post_init__(self) -> None:
        if not (self.macs >= 0 and self.params >= 0):
            raise PlanError(f"Costed(macs=, params=) are weights of at least 0; got {self.macs!r}, {self.params!r}.")

    @property
    def evidence(self) -> frozenset[str]:
        """What the inner criterion reads, and the costs."""
        return self.inner.evidence | {name for name in ("macs", "params") if getattr(self, name)}

    def change(self, scores: Tensor, evidence: Evidence) -> Tensor:
        """Return the penalised scores (U,)."""
        score = wide(scores)
        for name in ("macs", "params"):
            weight = getattr(self, name)
            if weight:
                score = score - weight * evidence.need(name).to(score.device)
        return narrow(score)


@dataclass(frozen=True)
class Worst(Wrapper):
    """The negated inner score: the most important units go first.  An adversarial control, never a way to prune.

    >>> from secateur.criteria import Magnitude
    >>> Worst(Magnitude()).evidence
    frozenset({'weights'})
    """

    def change(self, scores: Tensor, evidence: Evidence) -> Tensor:
        """Return the negated scores (U,)."""
        return -scores


def smooth(scores: Scores, previous: Scores | None, decay: float = 0.9) -> Scores:
    """Return the running mean decay * previous + (1 - decay) * scores, per unit.

    ``previous`` are the scores of the round before, for the same graph (masks, not surgery, between
    rounds), or None in the first round.  Raises ``PlanError`` for scores of another graph.  Source:
    Molchanov et al. 2019, arXiv 1906.10771, section 4 (decay 0.9 across rounds).
    """
    if not 0 <= decay < 1:
        raise PlanError(f"smooth(decay=...) is in [0, 1); got {decay!r}.")
    if previous is None:
        return scores
    same = previous.graph.fingerprint == scores.graph.fingerprint and previous.values.keys() == scores.values.keys()
    if not same:
        raise PlanError("smooth() got scores of two different graphs; pass previous=None after a compaction.")
    mixed = {k: narrow(decay * wide(previous.values[k]) + (1 - decay) * wide(v)) for k, v in scores.values.items()}
    return replace(scores, values=mixed)


def l2(scores: Tensor) -> Tensor:
    """Return ``scores`` (U,) divided by their L2 norm; zeros stay zeros."""
    values = wide(scores)
    norm = torch.linalg.vector_norm(values)
    return narrow(values / norm if norm > 0 else values)
