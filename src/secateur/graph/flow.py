"""The state that flows through the operator rules: one ``Axis`` (or None) per axis of every value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from secateur.graph.cells import Cells
from secateur.graph.trace import Op, Recording, Ref


@dataclass(frozen=True, eq=False, slots=True)
class Axis:
    """The units along one axis.

    ``ids``: one cell per position.  ``zero``: the slice of a dead unit is exactly zero.  ``source``: the
    (parameter, axis) that this axis is, unchanged, if it is one.  ``free``: the tensor is the same at every
    position (an expanded axis), so that folding it into another axis only repeats that one's units.
    """

    ids: np.ndarray
    zero: bool = False
    source: tuple[str, int] | None = None
    free: bool = False


Axes = list[Axis | None]


@dataclass(frozen=True, eq=False)
class Term:
    """The multiply-accumulates of one operator, before cells become units."""

    op: str
    module: str
    scale: float
    axes: tuple[np.ndarray, ...]


class Flow:
    """Axes of all values, the cells, and what the rules noted on the way."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.cells = Cells()
        self.axes: list[Axes] = []
        self.roles: dict[tuple[str, int], str] = {}
        self.costs: list[Term] = []
        self.unmaskable: set[tuple[str, int]] = set()
        self.op: Op | None = None
        self.idle = False  # the current operator's result reaches no output: it must fit, but its values do not count
        for value in recording.values:
            axes: Axes = [None] * len(value.shape)
            if value.origin == "parameter" and value.dtype.is_floating_point and value.name is not None:
                for axis, size in enumerate(value.shape):
                    if size > 1:
                        axes[axis] = Axis(self.cells.fresh(size), True, (value.name, axis))
            self.axes.append(axes)

    @property
    def where(self) -> str:
        """Operator and module path, for reasons."""
        op = self.op
        return f"{op.target.split('::')[-1].split('.')[0]} in {op.module or 'the model'}" if op else "the model"

    def shape(self, ref: Any) -> tuple[int, ...]:
        """Shape of a tensor argument (or of a value index)."""
        return self.recording.values[ref.value if isinstance(ref, Ref) else ref].shape

    def of(self, ref: Any) -> Axes:
        """Axes of a tensor argument; nothing for None and numbers."""
        return self.axes[ref.value] if isinstance(ref, Ref) else []

    def set(self, axes: Sequence[Axis | None], out: int = 0) -> None:
        """Set the axes of output ``out`` of the current operator."""
        assert self.op is not None
        index = self.op.outs[out] if out < len(self.op.outs) else None
        if index is not None:
            shape = self.recording.values[index].shape
            if len(axes) != len(shape):
                self.block([a for a in axes if a is not None], f"unexpected rank after {self.where}")
                return
            clean: Axes = []
            for axis, size in zip(axes, shape, strict=True):
                if axis is not None and len(axis.ids) != size:
                    self.block([axis], f"unexpected size after {self.where}")
                    axis = None
                if axis is not None and size == 1:  # units lose their axis here: one that was picked must stay
                    self.block([axis], f"single positions are picked by {self.where}")
                    axis = None
                clean.append(axis)
            self.axes[index] = clean

    def block(self, axes: Iterable[Axis | None], why: str | None = None) -> None:
        """Freeze the units of these axes."""
        for axis in axes:
            if axis is not None:
                self.cells.freeze(axis.ids, why or self.where)

    def mix(self, axis: Axis | None) -> None:
        """Mark the units of an axis as mixed by the current operator, if its result matters."""
        if axis is not None and not self.idle:
            self.cells.mix(axis.ids, self.where)

    def tie(self, a: Axis | None, b: Axis | None, fixed_ok: bool = False) -> Axis | None:
        """Tie two axes position by position; a full-size axis without units freezes the other."""
        if a is None or b is None:
            one = a if a is not None else b
            if one is not None and not fixed_ok:
                self.block([one], f"{self.where} joins them with positions that have no units")
            return one
        if a.ids is not b.ids:
            lone = (a.ids < 0) != (b.ids < 0)
            if lone.any():
                both = np.concatenate([a.ids[lone], b.ids[lone]])
                self.cells.freeze(both, f"{self.where} joins them with positions that have no units")
            self.cells.union(a.ids, b.ids)
        return b if a.free else a

    def role(self, axis: Axis | None, role: str) -> None:
        """Note how a parameter axis is used: 'out', 'in' or 'along'; 'in' and 'out' win over 'along'."""
        if axis is not None and axis.source is not None and self.roles.get(axis.source, "along") == "along":
            self.roles[axis.source] = role

    def cost(self, scale: float, *axes: tuple[Axis | None, int]) -> None:
        """Note multiply-accumulates: ``scale`` times each (axis, size)."""
        assert self.op is not None
        ids = tuple(axis.ids for axis, _ in axes if axis is not None)
        fixed = float(np.prod([float(size) for axis, size in axes if axis is None] or [1.0]))
        self.costs.append(Term(self.op.target, self.op.module, scale * fixed, ids))
