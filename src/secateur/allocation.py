"""Allocations: how a budget is split over groups, as widths that grow with the fraction that stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from secateur.granularity import MASKED
from secateur.types import Group, PlanError

Path = Callable[[float], np.ndarray]  # fraction that stays, in [0, 1] -> ideal width of each free group

NORMS: dict[str, Callable[[np.ndarray], float]] = {
    "mean": lambda values: float(np.abs(values).mean()),
    "l2": lambda values: float(np.linalg.norm(values)),
    "none": lambda values: 1.0,
}


@dataclass(frozen=True, eq=False)
class Free:
    """The groups whose width is to be chosen: their scores (U,) each, and the fewest units that must stay."""

    groups: tuple[Group, ...]
    scores: tuple[np.ndarray, ...]
    least: np.ndarray

    @property
    def units(self) -> np.ndarray:
        """Dense widths (G,)."""
        return np.array([group.units for group in self.groups])


def _check(normalise: str | None) -> None:
    if normalise is not None and normalise not in NORMS:
        raise PlanError(f"normalise is one of {', '.join(NORMS)}, or None; got {normalise!r}.")


@dataclass(frozen=True)
class Uniform:
    """The same fraction stays in every group."""

    def path(self, free: Free) -> Path:
        """Return the widths as a function of the fraction."""
        return lambda t: np.clip(t * free.units, free.least, free.units)


@dataclass(frozen=True)
class Global:
    """One threshold over the units of all groups.

    ``normalise`` makes the scores of different groups comparable: ``mean`` divides them by the mean of their
    absolute values, ``l2`` by their L2 norm (Molchanov et al. 2017; where the scores of a group are nearly
    equal it empties the widest group first), ``none`` compares them as they are.  None: ``mean`` for
    channels, heads and neurons, ``none`` for kernels and weights.

    Raises ``PlanError`` for another word.
    """

    normalise: str | None = None

    def __post_init__(self) -> None:
        _check(self.normalise)

    def path(self, free: Free) -> Path:
        """Return the widths as a function of the fraction."""
        return _by_rank(free, [0] * len(free.groups), self.normalise)


@dataclass(frozen=True)
class Isomorphic:
    """Units are ranked within pools of groups of the same structure; the same fraction stays in every pool.

    ``normalise`` as in ``Global``.  Source: Fang et al. 2024, "Isomorphic Pruning for Vision Models".
    """

    normalise: str | None = None

    def __post_init__(self) -> None:
        _check(self.normalise)

    def path(self, free: Free) -> Path:
        """Return the widths as a function of the fraction."""
        pools = [group.signature or group.name for group in free.groups]
        numbers = {pool: number for number, pool in enumerate(dict.fromkeys(pools))}
        return _by_rank(free, [numbers[pool] for pool in pools], self.normalise)


@dataclass(frozen=True)
class Profile:
    """The shape of a network that was pruned before: widths in the proportions of ``fractions``, name -> fraction.

    On the way from the whole network to nothing every group passes through its fraction at once; ``t`` scales them
    by t / (1 - t), and no group grows beyond its units.  Source: Crowley et al. 2018, arXiv 1810.04622, section 5
    (networks copied from the profile of a pruned one).

    >>> stretched((1.0, 0.5), 4)
    (1.0, 0.875, 0.625, 0.5)
    """

    fractions: tuple[tuple[str, float], ...]

    def path(self, free: Free) -> Path:
        """Return the widths as a function of the fraction."""
        known = dict(self.fractions)
        shares = np.array([known.get(group.name, 1.0) for group in free.groups])

        def widths(t: float) -> np.ndarray:
            wanted = shares * t / (1 - t) if t < 1 else np.ones_like(shares)
            return np.clip(wanted * free.units, free.least, free.units)

        return widths


def stretched(fractions: Sequence[float], count: int) -> tuple[float, ...]:
    """Return ``fractions``, one per group along the depth, for a network of ``count`` groups: linear in between."""
    at = (np.arange(count) + 0.5) * len(fractions) / count - 0.5
    return tuple(np.interp(at, np.arange(len(fractions)), fractions).tolist())


Allocation = Uniform | Global | Isomorphic | Profile
ALLOCATIONS: dict[str, Allocation] = {"uniform": Uniform(), "global": Global(), "isomorphic": Isomorphic()}


def best(values: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the ``count`` highest scores, ascending; ties go to the lower index."""
    if count >= len(values):
        return np.arange(len(values))
    if not count:
        return np.arange(0)
    lowest = np.partition(values, len(values) - count)[len(values) - count]
    above = np.flatnonzero(values > lowest)
    level = np.flatnonzero(values == lowest)[: count - len(above)]
    return np.sort(np.concatenate([above, level]))


def _by_rank(free: Free, pools: Sequence[int], normalise: str | None) -> Path:
    """Pool the scores of groups; the path removes the same fraction of every pool, lowest first."""
    masked = bool(free.groups) and free.groups[0].granularity in MASKED
    norm = NORMS[normalise or ("none" if masked else "mean")]
    ladders = []  # per group: the scores that may go, ascending; the best ``least`` stay whatever happens
    for values, least in zip(free.scores, free.least, strict=True):
        key = values.astype(np.float64)
        key /= norm(key) or 1.0  # a group of zeros stays zero
        ladders.append(np.sort(key)[: len(key) - int(least)])
    members = [np.flatnonzero(np.asarray(pools) == pool) for pool in range(max(pools) + 1)]
    sizes = [int(free.units[groups].sum()) for groups in members]
    # the parts are sorted already, and the stable sort merges sorted parts
    pooled = [np.sort(np.concatenate([ladders[g] for g in groups]), kind="stable") for groups in members]

    def path(t: float) -> np.ndarray:
        widths = free.units.copy()
        for groups, size, ladder in zip(members, sizes, pooled, strict=True):
            gone = min(round((1 - t) * size), len(ladder))
            widths[groups] -= _below(ladder, [ladders[g] for g in groups], gone)
        return widths

    return path


def _below(pooled: np.ndarray, ladders: list[np.ndarray], gone: int) -> np.ndarray:
    """Return how many of the ``gone`` lowest scores of a pool lie in each group; of equals the later go first."""
    if not gone:
        return np.zeros(len(ladders), dtype=np.int64)
    threshold = pooled[gone - 1]
    low = np.array([np.searchsorted(ladder, threshold, "left") for ladder in ladders])
    level = np.array([np.searchsorted(ladder, threshold, "right") for ladder in ladders]) - low
    later = np.cumsum(level[::-1])[::-1] - level  # equals in the groups after this one
    return low + np.clip(gone - low.sum() - later, 0, level)
