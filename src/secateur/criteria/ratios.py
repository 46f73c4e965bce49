"""Shares of the inputs of a matrix product in its outputs, from magnitudes.

Input k has the share |w_jk| |a_fk| / S_fj in output j of sample f, with S = |a| |w|^T; 0 where S is 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 2**22  # entries of the tables from which maxima are taken


def magnitude(values: Tensor) -> Tensor:
    """Return |values| over their largest: shares do not change, and no sum of products leaves the range of float32."""
    values = values.detach()
    values = (values if values.dtype == torch.float64 else values.float()).abs()
    top = values.amax()
    return values.div_(torch.where((top > 0) & top.isfinite(), top, 1))


def reciprocal(sums: Tensor) -> Tensor:
    """Return 1 / ``sums``, and 0 where they are 0 (of numbers too small for it: the largest)."""
    return torch.where(sums > 0, sums.reciprocal(), 0).clamp_(max=torch.finfo(sums.dtype).max)


def shares(a: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Return the shares (P,) summed over samples and outputs, and 1 / S (F, M), of magnitudes (F, P) and (M, P)."""
    inverse = reciprocal(a @ w.T)
    if len(a) < len(w):  # the same sums; the smaller table is the cheaper one
        return (a * (inverse @ w)).sum(0), inverse
    return (w * (inverse.T @ a)).sum(0), inverse


def peaks(a: Tensor, w: Tensor, inverse: Tensor, index: Tensor) -> Tensor:
    """Return the largest share (U,) over samples and outputs of units that hold the columns ``index`` (U, k)."""
    index = index.to(a.device)
    found = a.new_zeros(len(index))
    columns = w[:, index].permute(1, 2, 0)  # (U, k, M)
    for start, stop in spans(len(a), len(w)):
        rows = a[start:stop, index].transpose(0, 1)  # (U, f, k)
        for first, last in spans(len(index), len(w) * (stop - start)):
            table = (rows[first:last] @ columns[first:last]).mul_(inverse[start:stop])
            found[first:last] = torch.maximum(found[first:last], table.amax((1, 2)))
    return found


def spans(count: int, each: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) over ``count`` things of ``each`` entries, in parts of ``CHUNK`` entries or one thing.

    >>> list(spans(5, CHUNK // 2))
    [(0, 2), (2, 4), (4, 5)]
    """
    step = max(1, CHUNK // max(each, 1))
    return ((start, min(count, start + step)) for start in range(0, count, step))
