"""Which gates decide about each unit of an axis: a value that sums, concatenations and shuffles combine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.types import PlanError

ALWAYS, NEVER = -1, -2
LARGEST = 2**22  # units times ways of one flow that a file may ask for


@dataclass(frozen=True, eq=False)
class Flow:
    """Unit u of an axis is computed where one of its ways says so: channel ``channel[w, u]`` of gate ``gate[w, u]``.

    ``gate`` and ``channel`` are int64 (ways, units); ``gate`` counts in ``gates`` (paths), ``ALWAYS`` stands for what
    no gate decides, ``NEVER`` fills up.

    >>> both = union(Flow.of("a", 3), Flow.of("b", 3))
    >>> masks = {"a": torch.tensor([[True, False, False]]), "b": torch.tensor([[False, False, True]])}
    >>> both.mask(masks, 1).tolist(), Flow.whole(2).mask(masks, 1)
    ([[True, False, True]], None)
    """

    gates: tuple[str, ...]
    gate: Tensor
    channel: Tensor

    @classmethod
    def of(cls, path: str, units: int) -> Flow:
        """Return the flow of what the gate at ``path`` decides."""
        return cls((path,), torch.zeros(1, units, dtype=torch.int64), torch.arange(units)[None])

    @classmethod
    def whole(cls, units: int) -> Flow:
        """Return the flow of what is computed for every input."""
        return cls((), torch.full((1, units), ALWAYS), torch.zeros(1, units, dtype=torch.int64))

    @property
    def units(self) -> int:
        """The number of units."""
        return self.gate.shape[1]

    @property
    def decided(self) -> bool:
        """Does a gate decide about any unit?"""
        return not bool((self.gate == ALWAYS).any(0).all())

    def pick(self, ids: Tensor) -> Flow:
        """Return the flow of the units ``ids`` (n,), in their order."""
        return Flow(self.gates, self.gate[:, ids], self.channel[:, ids])

    def mask(self, masks: Mapping[str, Tensor], samples: int) -> Tensor | None:
        """Return what is computed, bool (samples, units), None for everything; a gate without a mask skips nothing."""
        known = [masks[path] for path in self.gates if path in masks]
        if not known or not self.decided:
            return None
        fixed = known[0].new_tensor([[True, False]]).expand(samples, 2)
        starts, begin = [], 2
        for path in self.gates:
            starts.append(begin if path in masks else -1)
            begin += masks[path].shape[1] if path in masks else 0
        at = torch.tensor(starts)[self.gate.clamp_min(0)]
        at = torch.where(at < 0, 0, at + self.channel)
        at = torch.where(self.gate < 0, -1 - self.gate, at)
        return torch.cat([fixed, *known], 1)[:, at.to(fixed.device)].any(1)

    def rows(self) -> list[list[list[Any]]]:
        """Return the ways as lists of runs [gate, first channel, units], for JSON; the gate may be null or ""."""
        names = {ALWAYS: None, NEVER: ""} | dict(enumerate(self.gates))
        found = []
        for gate, channel in zip(self.gate, self.channel, strict=True):
            torn = (gate.diff() != 0) | ((channel.diff() != 1) & (gate[1:] >= 0))
            starts = [0, *(torn.nonzero().ravel() + 1).tolist()]
            sizes = torch.tensor([*starts, self.units]).diff().tolist()
            numbers = zip(gate[starts].tolist(), channel[starts].tolist(), sizes, strict=True)
            found.append([[names[which], first if which >= 0 else 0, size] for which, first, size in numbers])
        return found

    @classmethod
    def read(cls, rows: Any, widths: Mapping[str, int]) -> Flow:
        """Return the flow of ``rows`` that somebody wrote; ``widths`` are the units of each gate there is.

        Raises ``PlanError`` for rows that are not those of a flow.

        >>> Flow.read(Flow.of("a", 3).rows(), {"a": 3}).units
        3
        """
        runs = [run for row in rows for run in row] if _nested(rows) else []
        if not runs or not all(_fits(run, widths) for run in runs) or sum(run[2] for run in runs) > LARGEST:
            raise PlanError("a shared mask has rows of runs [gate or null, first channel, units] within that gate.")
        names = list(dict.fromkeys(name for name, _, _ in runs if name))
        numbers = {None: ALWAYS, "": NEVER} | {name: number for number, name in enumerate(names)}
        if len({sum(run[2] for run in row) for row in rows}) != 1:
            raise PlanError("the rows of a shared mask differ in length.")
        gate = [torch.cat([torch.full((n,), numbers[name]) for name, _, n in row]) for row in rows]
        channel = [
            torch.cat([torch.arange(a, a + n) if name else torch.zeros(n).long() for name, a, n in row]) for row in rows
        ]
        return cls(tuple(names), torch.stack(gate), torch.stack(channel))


def _nested(rows: Any) -> bool:
    return isinstance(rows, list) and bool(rows) and all(isinstance(row, list) and row for row in rows)


def _fits(run: Any, widths: Mapping[str, int]) -> bool:
    """Is ``run`` [gate, first, units] of a gate that there is?"""
    if not isinstance(run, list) or len(run) != 3 or any(type(n) is not int or n < 0 for n in run[1:]) or not run[2]:
        return False
    if run[0] is None or run[0] == "":
        return run[1] == 0 and run[2] <= LARGEST
    return isinstance(run[0], str) and run[1] + run[2] <= widths.get(run[0], 0)


def union(one: Flow, two: Flow) -> Flow:
    """Return the flow of a sum of two maps: a unit is computed where either computes it."""
    gates, renumbered = _together([one, two])
    gate, channel = torch.cat(renumbered), torch.cat([one.channel, two.channel])
    both = torch.stack([gate, channel], 1).unique(dim=0)
    return Flow(gates, both[:, 0], both[:, 1])


def beside(flows: Sequence[Flow]) -> Flow:
    """Return the flow of a concatenation."""
    gates, renumbered = _together(flows)
    ways = max(flow.gate.shape[0] for flow in flows)
    gate = [_filled(part, ways, NEVER) for part in renumbered]
    return Flow(gates, torch.cat(gate, 1), torch.cat([_filled(flow.channel, ways, 0) for flow in flows], 1))


def _together(flows: Sequence[Flow]) -> tuple[tuple[str, ...], list[Tensor]]:
    """Return the gates of all flows, and ``gate`` of each counted in them."""
    gates = tuple(dict.fromkeys(path for flow in flows for path in flow.gates))
    place = {path: number for number, path in enumerate(gates)}
    found = []
    for flow in flows:
        numbers = torch.tensor([*(place[path] for path in flow.gates), NEVER, ALWAYS])  # -2 and -1 count from the end
        found.append(numbers[flow.gate])
    return gates, found


def _filled(rows: Tensor, ways: int, value: int) -> Tensor:
    return torch.cat([rows, rows.new_full((ways - len(rows), rows.shape[1]), value)])
