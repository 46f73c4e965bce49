"""Union-find over *cells*: one cell per position of each parameter axis, merged where operators tie positions.

All operations are vectorised over arrays of cell ids.  A class of cells carries three facts, kept at its root and
combined by ``max`` when classes merge: why it is frozen, why it is inexact (indices into ``reasons``, 0 = not),
and whether it is a batch axis of an activation-by-activation product (an attention head).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FIXED = -1  # a position that belongs to no unit
KERNEL = "positions of a kernel"  # frozen without a word: nobody would ask to prune them


@dataclass(eq=False)
class Split:
    """A view that factors an axis: ``element`` (f1, f2, ...) dies where any of its factor cells dies."""

    element: np.ndarray
    factors: list[np.ndarray]
    where: str


class Cells:
    """The growing universe of cells of one trace."""

    def __init__(self) -> None:
        self.count = 0
        self.parent = np.zeros(1024, dtype=np.int64)
        self.frozen = np.zeros(1024, dtype=np.int32)
        self.inexact = np.zeros(1024, dtype=np.int32)
        self.head = np.zeros(1024, dtype=np.int32)
        self.parts: list[np.ndarray] = []
        self.reasons: list[str] = [""]
        self._reason_index: dict[str, int] = {"": 0}
        self.splits: list[Split] = []
        self._factors: dict[tuple[bytes, tuple[int, ...]], list[np.ndarray | None]] = {}
        self._products: dict[tuple[bytes, ...], np.ndarray] = {}

    def fresh(self, n: int) -> np.ndarray:
        """Return ``n`` new cells, each a class of its own."""
        start, end = self.count, self.count + n
        if end > len(self.parent):
            size = max(end, 2 * len(self.parent))
            for name in ("parent", "frozen", "inexact", "head"):
                old = getattr(self, name)
                new = np.zeros(size, dtype=old.dtype)
                new[: len(old)] = old
                setattr(self, name, new)
        ids = np.arange(start, end, dtype=np.int64)
        self.parent[start:end] = ids
        self.count = end
        return ids

    def find(self, ids: np.ndarray) -> np.ndarray:
        """Return the root of each cell; ``FIXED`` stays ``FIXED``."""
        parent = self.parent
        root = parent[ids]
        while True:
            up = parent[root]
            if np.array_equal(up, root):
                break
            root = up
        parent[ids] = root
        return np.where(ids < 0, FIXED, root)

    def union(self, a: np.ndarray, b: np.ndarray) -> None:
        """Merge the classes of ``a[i]`` and ``b[i]``; where one side is ``FIXED`` the pair is skipped."""
        a, b = np.broadcast_arrays(a, b)
        use = (a >= 0) & (b >= 0) & (a != b)
        if not use.any():
            return
        a, b = a[use], b[use]
        ra, rb = self.find(a), self.find(b)
        start = np.unique(np.concatenate([ra, rb]))
        facts = [(array, array[start].copy()) for array in (self.frozen, self.inexact, self.head)]
        while True:
            low, high = np.minimum(ra, rb), np.maximum(ra, rb)
            differ = low != high
            if not differ.any():
                break
            np.minimum.at(self.parent, high[differ], low[differ])
            # a root that met two smaller roots keeps the smaller one: unite those in the next round
            ra, rb = self.find(ra), self.find(rb)
        root = self.find(start)
        for array, value in facts:
            np.maximum.at(array, root, value)

    def reason(self, text: str) -> int:
        """Return the index of a reason, adding it when new."""
        if text not in self._reason_index:
            self._reason_index[text] = len(self.reasons)
            self.reasons.append(text)
        return self._reason_index[text]

    def freeze(self, ids: np.ndarray, why: str) -> None:
        """Mark the classes of ``ids`` as not prunable; the first reason stays."""
        self._mark(self.frozen, ids, self.reason(why))

    def mix(self, ids: np.ndarray, why: str) -> None:
        """Mark the classes of ``ids`` as inexact: an operator mixes units along the axis."""
        self._mark(self.inexact, ids, self.reason(why))

    def mark_heads(self, ids: np.ndarray) -> None:
        """Mark the classes of ``ids`` as batch axis of an attention-like product."""
        self._mark(self.head, ids, 1)

    def mark_part(self, ids: np.ndarray) -> None:
        """Note that these positions are cut out of an axis: they cannot be exchanged with the others."""
        self.parts.append(ids[ids >= 0])

    def part_keys(self) -> np.ndarray:
        """Return one number per root that differs between units cut out of an axis by different slices."""
        keys = np.zeros(self.count, dtype=np.uint64)
        rng = np.random.default_rng(1)
        for ids in self.parts:
            np.add.at(keys, self.find(ids), rng.integers(1, 2**63, dtype=np.uint64))
        return keys

    def _mark(self, array: np.ndarray, ids: np.ndarray, value: int) -> None:
        root = self.find(ids[ids >= 0])
        root = root[array[root] == 0]
        array[root] = value

    def is_frozen(self, ids: np.ndarray) -> np.ndarray:
        """Return a bool per cell; ``FIXED`` counts as frozen."""
        return (ids < 0) | (self.frozen[self.find(ids)] > 0)

    def factor(self, element: np.ndarray, where: str) -> list[np.ndarray | None]:
        """Factor an array of cells over its axes: one id array per axis, None where nothing varies along it.

        An axis along which nothing else varies takes the cells themselves.  Where several axes vary, each gets
        fresh factor cells and the relation is kept as a ``Split`` for ``resolve``.  The same element array always
        gives the same factors.
        """
        element = self.find(element)
        axes = [j for j in range(element.ndim) if (element != element.take([0], axis=j)).any()]
        out: list[np.ndarray | None] = [None] * element.ndim
        if not axes:
            if (element >= 0).any():  # one unit repeated over every position: nothing can go
                self.freeze(element.ravel()[:1], f"a single unit fills the whole axis in {where}")
            return out
        core = element[tuple(slice(None) if j in axes else 0 for j in range(element.ndim))]
        if len(axes) == 1:
            out[axes[0]] = core
            return out
        if (core < 0).any():
            self.freeze(core.ravel(), f"units and fixed positions are folded together by {where}")
            return out
        key = (np.ascontiguousarray(core).tobytes(), core.shape)
        if key not in self._factors:
            factors = [self.fresh(n) for n in core.shape]
            self._factors[key] = list(factors)
            self.splits.append(Split(core, factors, where))
        for axis, ids in zip(axes, self._factors[key], strict=True):
            out[axis] = ids
        return out

    def product(self, factors: list[np.ndarray], where: str) -> np.ndarray:
        """Return the element cells (f1, f2, ...) of an axis that merges several axes with units."""
        key = tuple(np.ascontiguousarray(f).tobytes() for f in factors)
        if key not in self._products:
            shape = tuple(len(f) for f in factors)
            element = self.fresh(int(np.prod(shape))).reshape(shape)
            self._products[key] = element
            self._factors[(element.tobytes(), shape)] = list(factors)
            self.splits.append(Split(element, list(factors), where))
        return self._products[key]

    def resolve(self) -> None:
        """Decide for every ``Split`` which factor carries the units; tie the positions of the others.

        Splits with a single possible carrier go first.  Otherwise attention heads win, then the factor with the
        most units, then the outermost.
        """
        todo = list(self.splits)
        while True:
            rest = []
            for split in todo:
                carriers = self._carriers(split)
                if len(carriers) > 1:
                    rest.append(split)
                else:
                    self._carry(split, carriers[0] if carriers else None)
            if len(rest) == len(todo):
                break
            todo = rest
        for split in sorted(todo, key=self._most, reverse=True):  # the widest first: it leaves others what it can
            carriers = self._carriers(split)
            best = max(carriers, key=lambda j: self._preference(split, j), default=None)
            self._carry(split, best)

    def _most(self, split: Split) -> tuple[int, int]:
        return max(self._preference(split, j)[:2] for j in range(len(split.factors)))

    def _carriers(self, split: Split) -> list[int]:
        dead = self.is_frozen(split.element)
        found = []
        for j, ids in enumerate(split.factors):
            free = ~self.is_frozen(ids)
            free &= ~dead.any(axis=tuple(k for k in range(dead.ndim) if k != j))
            if len(np.unique(self.find(ids[free]))) > 1:
                found.append(j)
        return found

    def _preference(self, split: Split, j: int) -> tuple[int, int, int]:
        roots = self.find(split.factors[j])
        return int(self.head[roots].any()), len(np.unique(roots)), -j

    def _carry(self, split: Split, carrier: int | None) -> None:
        if carrier is None:
            why = f"no axis of the view in {split.where} can carry units"
            self.freeze(split.element.ravel(), why)
            for ids in split.factors:
                self.freeze(ids, why)
            return
        rows = np.moveaxis(split.element, carrier, 0).reshape(len(split.factors[carrier]), -1)
        self.union(rows, split.factors[carrier][:, None])
        for j, ids in enumerate(split.factors):
            if j != carrier:
                self.freeze(ids, f"tied by the view in {split.where}: another of its axes carries the units")
