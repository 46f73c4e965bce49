"""What a criterion may see, and what a criterion is.

A criterion names the fields of ``Evidence`` that it needs; ``secateur.score`` collects the union in one pass
and calls the criterion once per group.  A criterion is a frozen dataclass and a pure function: it never
sorts, thresholds or touches the model.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from secateur.types import Member

FLOAT_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True, eq=False)
class Slice:
    """The weights of one member: ``values`` is (units, d), one row per unit; ``role`` as in ``Member``."""

    tensor: str
    role: str
    values: Tensor


@dataclass(frozen=True, eq=False)
class Evidence:
    """What was seen of one group: U units, N samples, M positions per unit and sample.

    ``ids`` (U,) number the units within the group.  ``weights`` are the slices of the parameters that
    produce the units or ride with them, ``consumers`` of those that contract them.
    ``unit_grads`` (N, U) is s_n = sum over the M positions of a * dL_n/da, with L_n the loss of sample n
    alone; ``unit_grads_abs`` (N, U) is the same sum of absolute values; ``activations`` (N, U) is the
    mean of |a|; ``positions`` (N,) is M, which comes with any of the three. ``contributions`` (U,) is the
    mean and ``contribution_max`` (U,) the maximum, over all samples and the outputs of the consumers, of the
    share that the unit has in such an output (see ``shares``).  ``macs`` and ``params`` (U,) are the
    fractions of the whole model that removing this one unit saves.
    """

    group: str
    ids: Tensor
    weights: tuple[Slice, ...] = ()
    consumers: tuple[Slice, ...] = ()
    unit_grads: Tensor | None = None
    unit_grads_abs: Tensor | None = None
    activations: Tensor | None = None
    positions: Tensor | None = None
    contributions: Tensor | None = None
    contribution_max: Tensor | None = None
    macs: Tensor | None = None
    params: Tensor | None = None

    def need(self, name: str) -> Tensor:
        """Return the tensor called ``name`` in float64; raises ``KeyError`` when it was not declared."""
        value = getattr(self, name)
        if value is None:
            raise KeyError(f"evidence {name!r} of group {self.group!r} was not collected; declare it in `evidence`.")
        return wide(value)


KNOWN = frozenset(field.name for field in fields(Evidence)) - {"group", "ids", "positions"}
PER_SAMPLE = frozenset({"unit_grads", "unit_grads_abs", "activations"})
STREAMED = frozenset({"contributions", "contribution_max"})  # one value per unit, whatever the number of samples
DATA = PER_SAMPLE | STREAMED  # what needs batches
BACKWARD = frozenset({"unit_grads", "unit_grads_abs"})
SLICES = {"weights": ("out", "along"), "consumers": ("in",)}
COSTS = frozenset({"macs", "params"})


@dataclass(frozen=True)
class Criterion:
    """Base of every criterion: scores (U,) in float32 from the evidence of one group; higher = keep."""

    name: ClassVar[str] = ""

    @property
    def evidence(self) -> frozenset[str]:
        """Names of the ``Evidence`` fields that this criterion reads."""
        raise NotImplementedError

    def applies(self, evidence: Evidence) -> bool:
        """False where the criterion says nothing about this group (it then stays whole)."""
        return True

    def __call__(self, evidence: Evidence) -> Tensor:
        """Return the scores (U,) of the units of one group.

        Of criteria that read data: ``finish`` of the mean over the samples of ``each``, so that the samples may come
        in any number of parts.
        """
        return self.finish(self.each(evidence).mean(0), evidence)

    def each(self, evidence: Evidence) -> Tensor:
        """Return what every sample says about every unit, (N, U) in float64."""
        raise NotImplementedError(f"{type(self).__name__} says nothing about single samples.")

    def finish(self, mean: Tensor, evidence: Evidence) -> Tensor:
        """Return the scores (U,) from the ``mean`` (U,) of ``each``; ``evidence`` holds what is no sum over samples."""
        return narrow(mean)


def wide(values: Tensor) -> Tensor:
    """Return ``values`` in float64: squares of any float32 stay finite (MPS lacks it: on the CPU)."""
    device = "cpu" if values.device.type == "mps" else values.device
    return values.detach().to(device, torch.float64)


def narrow(values: Tensor) -> Tensor:
    """Return ``values`` in float32, clamped to its finite range."""
    return values.clamp(-FLOAT_MAX, FLOAT_MAX).to(torch.float32)


def unit_slices(member: Member, tensor: Tensor) -> Tensor:
    """Return the values of ``member`` in ``tensor`` as (units, d), one row per unit.

    ``axis`` -1 with a scalar index per unit stands for kernels or single weights: the leading axes are
    the units.
    """
    if member.axis < 0:
        return tensor.reshape(len(member.index), -1)
    moved = tensor.movedim(member.axis, 0)
    if member.index.shape[1] == 1 and np.array_equal(member.index[:, 0], np.arange(len(moved))):
        return moved.flatten(1) if moved.dim() > 1 else moved.unsqueeze(1)
    return moved[torch.as_tensor(member.index, device=tensor.device)].flatten(1)
