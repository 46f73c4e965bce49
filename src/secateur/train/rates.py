"""Learning-rate schedules: training progress in [0, 1] -> factor of the base rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Rate = Callable[[float], float]


def constant(progress: float) -> float:
    """Return 1: the base rate throughout."""
    return 1.0


def cosine(progress: float) -> float:
    """Return half a cosine from 1 to 0 (Loshchilov and Hutter 2017, arXiv 1608.03983, without restarts).

    >>> cosine(0.0), round(cosine(0.5), 6), cosine(1.0)
    (1.0, 0.5, 0.0)
    """
    return 0.5 * (1 + math.cos(math.pi * progress))


def one_cycle(progress: float) -> float:
    """Return a rise from 1/25 to 1 over the first 30 %, then a fall to 1/250,000, both half a cosine.

    Source: Smith and Topin 2018, arXiv 1708.07120; the figures are those of torch's ``OneCycleLR``.

    >>> round(one_cycle(0.0), 9), one_cycle(0.3), round(one_cycle(1.0), 9)
    (0.04, 1.0, 4e-06)
    """
    low, end, rise = 1 / 25, 1 / 250_000, 0.3
    if progress < rise:
        return 1 - (1 - low) * cosine(progress / rise)
    return end + (1 - end) * cosine((progress - rise) / (1 - rise))


def step(progress: float, drops: Sequence[float] = (0.3, 0.6, 0.8), factor: float = 0.2) -> float:
    """Return 1, and ``factor`` times as much from each of the ``drops`` on.

    Source: Zagoruyko and Komodakis 2016, arXiv 1605.07146, section 3 (drops at epochs 60, 120, 160 of 200).

    >>> step(0.0), round(step(0.3), 6), round(step(0.9), 6), step(0.5, (0.5, 0.75), 0.1)
    (1.0, 0.2, 0.008, 0.1)
    """
    return factor ** sum(progress >= at for at in drops)


def warmed(rate: Rate, share: float) -> Rate:
    """Return ``rate`` after a linear rise from 1 % to its first value over the first ``share`` of the training.

    ``rate`` runs over what is left.  Source: Goyal et al. 2017, arXiv 1706.02677, section 2.2.

    >>> warm = warmed(cosine, 0.5)
    >>> [round(warm(progress), 3) for progress in (0.0, 0.25, 0.5, 0.75, 1.0)]
    [0.01, 0.505, 1.0, 0.5, 0.0]
    """

    def factor(progress: float) -> float:
        if progress < share:
            return rate(0.0) * (0.01 + 0.99 * progress / share)
        return rate((progress - share) / (1 - share))

    return factor if share > 0 else rate


RATES: dict[str, Rate] = {f.__name__: f for f in (constant, cosine, one_cycle, step)}
