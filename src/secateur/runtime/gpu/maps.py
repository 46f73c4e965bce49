"""Maps of a batch on the device: whole, or only the channels that each sample computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur.runtime.gates.fbs import pooled


@dataclass(frozen=True, eq=False)
class Maps:
    """``values`` (B, K, H, W) of ``channels`` channels, of which the others are zero.

    ``ids`` (B, K) int64, ascending, are the channels that ``values`` holds (None: all, K = channels); ``counts`` (B,)
    int64 says of whole maps how many leading channels may differ from zero (None: all).
    """

    values: Tensor
    channels: int
    ids: Tensor | None = None
    counts: Tensor | None = None

    def whole(self) -> Tensor:
        """Return all channels (B, channels, H, W).

        >>> Maps(torch.ones(1, 1, 1, 1), 3, torch.tensor([[1]])).whole().flatten().tolist()
        [0.0, 1.0, 0.0]
        """
        if self.ids is None:
            return self.values
        space = self.values.new_zeros(len(self.values), self.channels, *self.values.shape[2:])
        return space.scatter_(1, self._index(), self.values)

    def plus(self, other: Maps) -> Maps:
        """Return the sum, as whole maps; leading channels of both stay leading channels."""
        if other.ids is None:
            total = self.whole() + other.values
        elif self.ids is None:
            return other.plus(self)
        else:
            total = self.whole().scatter_add_(1, other._index(), other.values)
        counts = None
        if self.counts is not None and other.counts is not None:
            counts = torch.maximum(self.counts, other.counts)
        return Maps(total, self.channels, counts=counts)

    def pooled(self, how: str) -> Tensor:
        """Return one number per channel (B, channels), as ``gates.fbs.pooled`` of the whole maps."""
        few = pooled(self.values, how)
        if self.ids is None:
            return few
        return few.new_zeros(len(few), self.channels).scatter_(1, self.ids, few)

    def holding(self, values: Tensor) -> Maps:
        """Return other ``values`` of the same channels: what works on each plane for itself and keeps zero planes."""
        return replace(self, values=values)

    def _index(self) -> Tensor:
        assert self.ids is not None
        return self.ids[:, :, None, None].expand_as(self.values)


def joined(parts: Sequence[Maps]) -> Maps:
    """Return the concatenation over channels; compact as soon as one of ``parts`` is."""
    channels = sum(part.channels for part in parts)
    values = torch.cat([part.values for part in parts], 1)
    if all(part.ids is None for part in parts):
        return Maps(values, channels)
    ids, first = [], 0
    for part in parts:
        own = part.ids
        if own is None:
            own = torch.arange(part.channels, device=values.device).expand(len(values), -1)
        ids.append(own + first)
        first += part.channels
    return Maps(values, channels, torch.cat(ids, 1))
