"""Contribution that rides on training steps: the shares of some samples of every batch, taken in the forward pass.

What enters a consumer is there anyway, as it is sent on: after the activation function, with batch norms and dropout in
train mode.  Hooks on the consumers hand it to ``Shares``; sums wait there until ``settle``.
"""

from __future__ import annotations

import torch

from secateur.criteria.evidence import PER_SAMPLE, STREAMED, Criterion
from secateur.criteria.riding import Riding, Sums
from secateur.criteria.shares import Shares
from secateur.types import Graph, PlanError


class Streaming:
    """Collects what ``criterion`` reads of contributions, used as ``Riding`` is.

    Of every batch each ``every``-th sample is looked at, the first one always: batches are shuffled, so these are drawn
    at random.  ``sums.samples`` counts them; ``sums.streamed`` holds the mean and the maximum of their shares.
    """

    def __init__(self, graph: Graph, criterion: Criterion, every: int = 8) -> None:
        self.sums, self.every = Sums(), every
        self.names = criterion.evidence & STREAMED
        self.groups = [group for group in graph.groups if group.prunable]
        self._shares = Shares(graph, self.groups, self.names, every, awake=False)
        self._begun = self._waiting = 0

    def __enter__(self) -> Streaming:
        return self

    def __exit__(self, *error: object) -> None:
        self._shares.__exit__(*error)

    def looks(self, step: int) -> bool:
        """Return whether to watch the batch of optimiser step ``step``: all, for a part of each is looked at."""
        return True

    def start(self, samples: int) -> None:
        """Watch the next batch, of ``samples`` samples; 0: do not watch it."""
        self._shares.awake, self._begun = samples > 0, -(-samples // self.every)

    def take(self) -> None:
        """Stop watching: the forward pass of the batch is over."""
        self._shares.awake, self._waiting, self._begun = False, self._waiting + self._begun, 0

    def settle(self) -> None:
        """Add what was seen since the last time to ``sums``: means by the number of samples, maxima."""
        if not self._waiting:
            return
        total = self.sums.samples + self._waiting
        for group in self.groups:
            new = self._shares.read(group)
            if new.keys() != self.names:
                continue  # no module consumes it
            old = self.sums.streamed.get(group.name, new)
            old = {name: values.to(new[name].device) for name, values in old.items()}
            part = self._waiting / total
            joined = {
                "contributions": lambda a, b, part=part: torch.lerp(a, b, part),
                "contribution_max": lambda a, b, part=part: torch.maximum(a, b),
            }
            self.sums.streamed[group.name] = {name: joined[name](old[name], new[name]) for name in self.names}
        self.sums.samples, self._waiting = total, 0
        self._shares.forget()


def rider(graph: Graph, criterion: Criterion, every: int = 8) -> Riding | Streaming | None:
    """Return what collects the evidence of ``criterion`` from training steps, None where it reads no data.

    ``every``: of contributions, the samples of a batch of which one is looked at; of gradients, the batches.  Raises
    ``PlanError`` for a criterion that reads both.
    """
    streamed, rows = criterion.evidence & STREAMED, criterion.evidence & PER_SAMPLE
    if streamed and rows:
        raise PlanError(
            f"{criterion!r} reads {', '.join(sorted(streamed | rows))}: one training gathers contributions or "
            "what single samples say, not both; take a pass."
        )
    if streamed:
        return Streaming(graph, criterion, every)
    return Riding(graph, criterion, every=every) if rows else None
