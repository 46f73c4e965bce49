"""The history of a network that was pruned unit by unit: an ordered list that gives every plan on the way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from secateur.progressive import achieved
from secateur.types import Graph, Plan, PlanError, Scores

FORMAT = 1


@dataclass(frozen=True)
class Removal:
    """One unit that went: in which event (from 1), of which group, its number in the dense model.

    ``score`` is what the criterion gave it, ``params`` what the model had left after the event.
    """

    event: int
    group: str
    unit: int
    score: float
    params: int


@dataclass(frozen=True)
class History:
    """All removals in order; ``units`` lists every group that can be cut and its units in the dense model."""

    fingerprint: str
    units: tuple[tuple[str, int], ...]
    removals: tuple[Removal, ...] = ()

    @staticmethod
    def of(dense: Graph) -> History:
        """Return the empty history of a dense model."""
        return History(dense.fingerprint, tuple((g.name, g.units) for g in dense.groups if g.prunable))

    def until(self, event: int) -> History:
        """Return the history up to and with ``event``; raises ``PlanError`` when it has no such event."""
        last = max((r.event for r in self.removals), default=0)
        if event > last:
            raise PlanError(f"the history has {last} events; {event} were asked (prune.events).")
        return replace(self, removals=tuple(r for r in self.removals if r.event <= event))

    def plan(self, dense: Graph) -> Plan:
        """Return what all removals together leave of ``dense``; raises ``PlanError`` for another graph."""
        known, gone = dict(self.units), {name: set[int]() for name, _ in self.units}
        for r in self.removals:
            if not 0 <= r.unit < known.get(r.group, 0) or r.unit in gone[r.group]:
                raise PlanError(f"event {r.event} of the history removes unit {r.unit} of {r.group!r}: not there.")
            gone[r.group].add(r.unit)
        rows = tuple(
            (g.name, known[g.name], tuple(k for k in range(known[g.name]) if k not in gone[g.name]))
            for g in dense.groups
            if gone.get(g.name)
        )
        bare = Plan(self.fingerprint, rows)
        return replace(bare, achieved=achieved(dense, bare))

    def fractions(self) -> tuple[tuple[str, float], ...]:
        """Return (group, fraction of its units that stays) in the order of the model."""
        gone = [r.group for r in self.removals]
        return tuple((name, 1 - gone.count(name) / units) for name, units in self.units)

    def to_json(self) -> str:
        """Return the history as JSON text."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @staticmethod
    def from_json(text: str) -> History:
        """Return the history written by ``to_json``; raises ``PlanError`` on anything else."""
        try:
            head = json.loads(text)
            if head["format"] != FORMAT:
                raise PlanError(f"history format {head['format']!r} is not {FORMAT}; use a matching secateur.")
            units = tuple((str(name), int(count)) for name, count in head["units"])
            rows = tuple(
                Removal(int(r["event"]), str(r["group"]), int(r["unit"]), float(r["score"]), int(r["params"]))
                for r in head["removals"]
            )
            return History(str(head["fingerprint"]), units, rows)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"this is not a history written by secateur ({error!r}).") from error


def longer(history: History, event: int, before: Plan, after: Plan, scores: Scores, params: int) -> History:
    """Return ``history`` with the units that ``after`` drops and ``before``, its plan so far, has.

    ``scores`` are those of the units that ``before`` leaves, in its order.
    """
    units, old = dict(history.units), {name: indices for name, _, indices in before.keep}
    rows = []
    for name, _, indices in after.keep:
        had, stays = old.get(name, tuple(range(units[name]))), set(indices)
        for place, unit in enumerate(had):
            if unit not in stays:
                rows.append(Removal(event, name, unit, float(scores.values[name][place]), params))
    return replace(history, removals=(*history.removals, *sorted(rows, key=lambda r: r.score)))


def shape_of(text: str) -> History | Plan:
    """Return the history or the plan in a JSON text; raises ``PlanError`` when it is neither."""
    try:
        head = json.loads(text)
    except ValueError as error:
        raise PlanError(f"this is neither a plan nor a history ({error}).") from error
    return History.from_json(text) if isinstance(head, Mapping) and "removals" in head else Plan.from_json(text)
