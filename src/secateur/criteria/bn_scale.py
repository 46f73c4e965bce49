"""Scale of the norm that follows a unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.criteria.evidence import Criterion, Evidence, Slice, narrow, wide


@dataclass(frozen=True)
class BNScale(Criterion):
    """The mean of |gamma| over the norms (batch, layer, group) whose scale rides with the unit.

    Says nothing about groups without such a norm: they stay whole.

    Source: Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming"; its L1
    penalty on gamma belongs to training.

    >>> BNScale().evidence
    frozenset({'weights'})
    """

    name: ClassVar[str] = "bn_scale"

    @property
    def evidence(self) -> frozenset[str]:
        """Names of the ``Evidence`` fields that this criterion reads."""
        return frozenset({"weights"})

    def applies(self, evidence: Evidence) -> bool:
        """True for a group with at least one norm scale."""
        return any(map(_is_scale, evidence.weights))

    def __call__(self, evidence: Evidence) -> Tensor:
        """Return the mean absolute scales (U,)."""
        scales = [wide(s.values).abs().mean(1) for s in evidence.weights if _is_scale(s)]
        return narrow(torch.stack(scales).mean(0))


def _is_scale(item: Slice) -> bool:
    return item.role == "along" and item.tensor.rpartition(".")[2] == "weight"
