"""The control: scores that know nothing."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.criteria.evidence import Criterion, Evidence


@dataclass(frozen=True)
class Random(Criterion):
    """Uniform random scores in [0, 1), fixed by ``seed``, the group's name and the unit's number.

    The draw leaves the global random state alone, and gives the same scores on every device.

    >>> Random(seed=3).evidence
    frozenset()
    """

    seed: int = 0
    name: ClassVar[str] = "random"

    @property
    def evidence(self) -> frozenset[str]:
        """Names of the ``Evidence`` fields that this criterion reads."""
        return frozenset()

    def __call__(self, evidence: Evidence) -> Tensor:
        """Return the scores (U,)."""
        ids = evidence.ids.cpu()
        source = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}:{evidence.group}".encode()))
        return torch.rand(int(ids.max()) + 1, generator=source)[ids]
