"""Learning-rate schedules: training progress in [0, 1] -> factor of the base rate."""

from __future__ import annotations

import math
from collections.abc import Callable

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


def step(progress: float) -> float:
    """Return 1, then 0.2 from 30 %, 0.04 from 60 %, 0.008 from 80 % of the training.

    Source: Zagoruyko and Komodakis 2016, arXiv 1605.07146, section 3 (drops at epochs 60, 120, 160 of 200).

    >>> step(0.0), round(step(0.3), 6), round(step(0.9), 6)
    (1.0, 0.2, 0.008)
    """
    return 0.2 ** sum(progress >= at for at in (0.3, 0.6, 0.8))


RATES: dict[str, Rate] = {f.__name__: f for f in (constant, cosine, step)}
