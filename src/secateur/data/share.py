"""Which rows of a batch this process holds, where several processes divide it; alone, it holds all of them.

Random draws are made for the whole batch in every process, and each takes its rows of them: so an image is shifted,
mirrored and covered alike however many processes there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Share:
    """Rows ``begin`` to ``end`` of a batch of ``total`` images.

    ``real`` is False in a process that is left without an image: it holds one that counts nothing, because it must
    take part in whatever the processes do together.
    """

    total: int
    begin: int
    end: int
    real: bool = True

    @property
    def count(self) -> int:
        """How many images of the batch count here."""
        return self.end - self.begin if self.real else 0

    @property
    def weight(self) -> float:
        """The fraction of the batch that counts here."""
        return self.count / self.total


_HELD: ContextVar[Share | None] = ContextVar("share", default=None)


def share_of(total: int, rank: int, size: int) -> Share:
    """Return what process ``rank`` of ``size`` takes of a batch: rows in order, the first ones one more.

    >>> [(s.begin, s.end, s.count) for s in (share_of(5, rank, 2) for rank in range(2))]
    [(0, 3, 3), (3, 5, 2)]
    >>> share_of(2, 2, 3)
    Share(total=2, begin=1, end=2, real=False)
    """
    each, more = divmod(total, size)
    begin = rank * each + min(rank, more)
    end = begin + each + (rank < more)
    return Share(total, begin, end) if end > begin else Share(total, total - 1, total, real=False)


@contextmanager
def holding(share: Share) -> Iterator[None]:
    """Say which rows of the present batch this process holds."""
    token = _HELD.set(share)
    try:
        yield
    finally:
        _HELD.reset(token)


def held(rows: int) -> Share:
    """Return the present share; all of ``rows`` where nothing was said."""
    return _HELD.get() or Share(rows, 0, rows)


def of_batch(rows: int, make: Callable[[int], torch.Tensor], axis: int = 0) -> torch.Tensor:
    """Return this process's ``rows`` of what ``make`` draws for all n images of the batch, (n,) along ``axis``.

    >>> with holding(Share(4, 1, 3)):
    ...     of_batch(2, torch.arange)
    tensor([1, 2])
    """
    share = held(rows)
    return make(share.total).narrow(axis, share.begin, rows)
