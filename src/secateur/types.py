"""The words of secateur as frozen values, and its error tree.

Everything that flows between stages is defined here: ``Graph`` -> ``Scores`` -> ``Plan`` -> ``Proof`` /
``Measurement`` / ``Record``.  Modules further down the chain import from here and never from each other's
neighbours.

One convention carries the whole core: **unit ids**.  Every unit of every group has one integer,
``group.offset + unit``; every axis of every parameter and buffer is an array that says which unit each of its
positions belongs to (``-1``: to none, it always stays).  Masking, compacting, counting and scoring are then
array look-ups.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # only named in types, and the processes that read records do without
    import torch
    from torch import nn

PLAN_FORMAT = 1


class SecateurError(Exception):
    """Base of every error that a user can cause: says what was found, the rule, and what to do."""


class TraceError(SecateurError):
    """The model could not be run or recorded on the example inputs."""


class PlanError(SecateurError):
    """A plan, budget or score that does not fit the graph."""


class VerificationError(SecateurError):
    """A proof failed: the cut would change the function of the model."""


class RecipeError(SecateurError):
    """A recipe that does not follow the schema (dotted key, value, line, nearest valid name)."""


class DataError(SecateurError):
    """A dataset or image that is missing, truncated or foreign."""


class CheckpointError(SecateurError):
    """A checkpoint that is corrupt, foreign or does not fit the model."""


class EngineError(SecateurError):
    """A network, input or machine that the engine of run-time pruning cannot run."""


class MeasureError(SecateurError):
    """A measurement that could not be taken or lacks its unit, n, spread, device or method."""


@dataclass(frozen=True, eq=False)
class Member:
    """One slice of one tensor that belongs to the units of a group.

    ``index`` has shape (units, k): the k positions along ``axis`` of ``tensor`` that belong to each unit.
    ``role`` is ``out`` (produces the unit), ``in`` (consumes it, contracted) or ``along`` (norms, biases,
    buffers: rides with it).
    """

    tensor: str
    axis: int
    index: np.ndarray
    role: str


@dataclass(frozen=True, eq=False)
class Site:
    """Where the values of a group's units can be read in an ordinary forward pass.

    The tensor is positional argument ``arg`` of the leaf module ``module`` (a consumer of the units); ``index``
    has shape (units, k): positions along ``axis`` of that tensor.
    """

    module: str
    arg: int
    axis: int
    index: np.ndarray


@dataclass(frozen=True, eq=False)
class Group:
    """A family of interchangeable units that share axes.

    ``frozen`` is the reason (operator and module path) when the group cannot be cut, else ``None``.
    ``exact`` is False where a norm or a mean mixes the units, so that masking and compacting may differ.
    ``signature`` is equal for groups of the same structure (isomorphic allocation).  ``vanishes``: it may lose all of
    its units, because the model has a way around it.
    """

    name: str
    offset: int
    units: int
    granularity: str
    members: tuple[Member, ...]
    exact: bool = True
    why_inexact: str = ""
    frozen: str | None = None
    sites: tuple[Site, ...] = ()
    signature: str = ""
    vanishes: bool = False

    @property
    def prunable(self) -> bool:
        """True when units of this group may go."""
        return self.frozen is None and (self.units > 1 or self.vanishes)


@dataclass(frozen=True, eq=False)
class Cost:
    """Multiply-accumulates of one operator: ``scale`` times the number of kept positions of each axis."""

    op: str
    module: str
    scale: float
    axes: tuple[np.ndarray, ...]


@dataclass(frozen=True, eq=False)
class Graph:
    """What ``trace`` learnt about a model: groups, the unit ids of each tensor, and the cost of each operator.

    ``axes`` maps the name of each parameter and buffer to one int array of unit ids per axis (``None``: no unit
    on this axis).  ``aliases`` maps every further name of a tied tensor to its first name.  ``calls`` are the
    Python calls whose integers may be sizes; ``caches`` the plain dicts that a run fills; ``unmaskable`` the
    (tensor, axis) pairs that something divides by, so that ``mask_`` leaves them.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    groups: tuple[Group, ...]
    axes: dict[str, tuple[np.ndarray | None, ...]]
    aliases: dict[str, str]
    costs: tuple[Cost, ...]
    fingerprint: str
    operators: int
    seconds: float
    calls: tuple[Any, ...] = ()
    notes: tuple[str, ...] = ()
    caches: tuple[tuple[str, str], ...] = ()
    unmaskable: frozenset[tuple[str, int]] = frozenset()

    @property
    def units(self) -> int:
        """Total number of units over all groups (the length of a keep vector)."""
        return sum(group.units for group in self.groups)

    def group(self, name: str) -> Group:
        """Return the group called ``name``; raises ``PlanError`` naming the nearest ones."""
        for group in self.groups:
            if group.name == name:
                return group
        import difflib

        near = difflib.get_close_matches(name, [g.name for g in self.groups], n=3)
        raise PlanError(f"no group is called {name!r}; nearest: {', '.join(near) or 'none'}. See print(graph).")

    def __str__(self) -> str:
        from secateur.graph.show import table

        return table(self)


@dataclass(frozen=True)
class Budget:
    """How much stays, in (0, 1]: exactly one of ``units``, ``params``, ``macs``.

    >>> Budget(macs=0.5).kind
    'macs'
    """

    units: float | None = None
    params: float | None = None
    macs: float | None = None

    def __post_init__(self) -> None:
        given = {k: v for k, v in vars(self).items() if v is not None}
        if len(given) != 1:
            raise PlanError(f"Budget takes exactly one of units, params, macs; got {sorted(given) or 'none'}.")
        ((kind, value),) = given.items()
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise PlanError(f"Budget({kind}=...) is the fraction that stays, in (0, 1]; got {value!r}.")

    @property
    def kind(self) -> str:
        """Which quantity the budget limits."""
        return next(k for k, v in vars(self).items() if v is not None)

    @property
    def keep(self) -> float:
        """The fraction that stays."""
        return float(next(v for v in vars(self).values() if v is not None))


@dataclass(frozen=True, eq=False)
class Scores:
    """float32 scores per unit for every prunable group of ``graph``; higher = keep."""

    graph: Graph
    criterion: str
    values: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Plan:
    """The decision: which units stay in which group.  A value: equality, JSON, fingerprint.

    ``keep`` lists (group name, number of units, kept unit indices in order) for every group that loses units;
    all other groups stay whole.  ``achieved`` holds the fractions of units, params and macs that stay.
    ``notes`` say what a reader must know, e.g. why a budget was missed by more than 2 %.
    """

    fingerprint: str
    keep: tuple[tuple[str, int, tuple[int, ...]], ...]
    granularity: str = "unit"
    budget: tuple[str, float] | None = None
    achieved: tuple[tuple[str, float], ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)

    def kept(self, graph: Graph) -> np.ndarray:
        """Return the keep vector: bool, one entry per unit id of ``graph``, plus a last True for "no unit".

        Raises ``PlanError`` when the plan was made for another graph.
        """
        if self.fingerprint != graph.fingerprint:
            raise PlanError(
                f"the plan is for graph {self.fingerprint}, this graph is {graph.fingerprint}; "
                "make the plan again with sc.allocate on this graph."
            )
        kept = np.ones(graph.units + 1, dtype=bool)
        for name, units, indices in self.keep:
            group = graph.group(name)
            if group.units != units:
                raise PlanError(f"group {name!r} has {group.units} units, the plan says {units}.")
            span = np.zeros(units, dtype=bool)
            span[list(indices)] = True
            kept[group.offset : group.offset + units] = span
        return kept

    def to_json(self) -> str:
        """Return the plan as JSON text; unit sets are packed bits (base64) with their count for the reader."""
        rows = [
            {"group": name, "units": units, "kept": len(indices), "bits": _pack(units, indices)}
            for name, units, indices in self.keep
        ]
        head = {
            "format": PLAN_FORMAT,
            "fingerprint": self.fingerprint,
            "granularity": self.granularity,
            "budget": list(self.budget) if self.budget else None,
            "achieved": dict(self.achieved),
            "notes": list(self.notes),
            "keep": rows,
        }
        return json.dumps(head, indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Return the plan written by ``to_json``; raises ``PlanError`` on anything else."""
        try:
            head = json.loads(text)
            if head["format"] != PLAN_FORMAT:
                raise PlanError(f"plan format {head['format']!r} is not {PLAN_FORMAT}; use a matching secateur.")
            rows = tuple((str(r["group"]), int(r["units"]), _unpack(int(r["units"]), r["bits"])) for r in head["keep"])
            budget = (str(head["budget"][0]), float(head["budget"][1])) if head["budget"] else None
            achieved = tuple((str(k), float(v)) for k, v in head["achieved"].items())
            return Plan(
                str(head["fingerprint"]),
                rows,
                str(head["granularity"]),
                budget,
                achieved,
                tuple(map(str, head["notes"])),
            )
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise PlanError(
                f"this is not a plan written by secateur ({error!r}); write one with plan.to_json()."
            ) from error


def _pack(units: int, indices: tuple[int, ...]) -> str:
    bits = np.zeros(units, dtype=bool)
    bits[list(indices)] = True
    return base64.b64encode(np.packbits(bits).tobytes()).decode()


def _unpack(units: int, text: str) -> tuple[int, ...]:
    raw = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    if units < 1 or len(raw) != (units + 7) // 8:
        raise ValueError(f"{len(raw)} bytes of bits for {units} units")
    return tuple(np.flatnonzero(np.unpackbits(raw)[:units]).tolist())


@dataclass(frozen=True)
class Check:
    """One row of a proof: the largest relative error of ``kind`` over group(s) ``group``, and its tolerance."""

    group: str
    kind: str
    error: float
    tolerance: float
    ok: bool


@dataclass(frozen=True)
class Proof:
    """The rows of a verification; ``ok`` when every row is."""

    rows: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """True when every row holds."""
        return all(row.ok for row in self.rows)

    def __str__(self) -> str:
        lines = [f"{'group':<40} {'kind':<12} {'error':>10} {'tolerance':>10}"]
        lines += [
            f"{r.group:<40} {r.kind:<12} {r.error:>10.2e} {r.tolerance:>10.0e} {'ok' if r.ok else 'FAILED'}"
            for r in self.rows
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Measurement:
    """A number that nobody can misread: what, value, unit, n, spread, device and how it was taken.

    >>> Measurement("latency", 1.5, "ms", 30, 0.1, "cpu", "median of interleaved runs, batch 1").unit
    'ms'
    """

    name: str
    value: float
    unit: str
    n: int
    spread: float
    device: str
    how: str

    def __post_init__(self) -> None:
        if not (self.name and self.unit and self.device and self.how) or self.n < 1:
            raise MeasureError(
                f"a Measurement needs a name, unit, n >= 1, device and how; got {self.name!r}, {self.unit!r}, "
                f"n={self.n}, {self.device!r}, {self.how!r}."
            )


@dataclass(frozen=True)
class Record:
    """One JSON line about one stage of a run."""

    stage: str
    data: Mapping[str, Any]
    time: float
