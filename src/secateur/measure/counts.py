"""Parameters and multiply-accumulates of a graph, dense or under a keep vector.

Both are sums of products: one term per parameter (or operator), one factor per axis, each factor the number
of kept positions of that axis.  ``Counter`` lays the factors out as arrays once, so that hundreds of
candidate widths are evaluated in a few matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from secateur.types import Graph

Axes = tuple[np.ndarray | None, ...]


def params(graph: Graph, kept: np.ndarray | None = None) -> int:
    """Return the number of parameters (distinct ones: tied tensors count once, buffers do not count).

    ``kept`` is the keep vector of ``Plan.kept`` (None: everything stays).
    """
    kept = _whole(graph) if kept is None else kept
    return int(sum(_product(1.0, axes, shape, kept) for axes, shape in _parameters(graph)))


def macs(graph: Graph, kept: np.ndarray | None = None) -> int:
    """Return the multiply-accumulates of one forward pass on the example inputs of the trace.

    sum over operators of scale * product over axes of the number of kept positions.
    """
    kept = _whole(graph) if kept is None else kept
    return round(sum(_product(cost.scale, cost.axes, (), kept) for cost in graph.costs))


@dataclass(frozen=True, eq=False)
class Counter:
    """Fast counts for many width vectors: ``positions`` (A, G) kept positions on axis a per kept unit of
    group g, ``base`` (A,) positions that always stay; ``terms`` of params and macs are rows of axis
    numbers and scales.
    """

    positions: np.ndarray
    base: np.ndarray
    terms: dict[str, tuple[np.ndarray, np.ndarray]]

    @staticmethod
    def of(graph: Graph) -> Counter:
        """Return the counter of ``graph``; widths are numbers of units per group, in the order of the groups.

        All units of a group hold the same number of positions on an axis (they are interchangeable).
        """
        rows: dict[bytes, int] = {}
        axes: list[np.ndarray] = []

        def row(ids: np.ndarray) -> int:
            key = np.ascontiguousarray(ids, dtype=np.int64).tobytes()
            if key not in rows:
                rows[key] = len(axes)
                axes.append(np.asarray(ids, dtype=np.int64))
            return rows[key]

        par, par_scale = [], []
        for given, shape in _parameters(graph):
            par.append([row(ids) for ids in given if ids is not None])
            par_scale.append(float(np.prod([n for ids, n in zip(given, shape, strict=True) if ids is None])))
        mac = [[row(ids) for ids in cost.axes] for cost in graph.costs]
        mac_scale = [cost.scale for cost in graph.costs]
        positions, base = _tabulate(graph, axes)
        terms = {"params": _pad(par, par_scale, len(axes)), "macs": _pad(mac, mac_scale, len(axes))}
        return Counter(positions, base, terms)

    def __call__(self, kind: str, widths: np.ndarray) -> np.ndarray:
        """Return ``kind`` ('params' or 'macs') for each row of ``widths`` (..., G), as float64 (...)."""
        counts = widths.astype(np.float64) @ self.positions.T + self.base
        counts = np.concatenate([counts, np.ones((*counts.shape[:-1], 1))], axis=-1)
        index, scale = self.terms[kind]
        return counts[..., index].prod(-1) @ scale


def _tabulate(graph: Graph, axes: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    groups = len(graph.groups)
    owner = np.full(graph.units + 1, groups)  # the last entry is "no unit": ids of -1 land there
    for number, group in enumerate(graph.groups):
        owner[group.offset : group.offset + group.units] = number
    table = np.zeros((len(axes), groups + 1))
    for number, ids in enumerate(axes):
        table[number] = np.bincount(owner[ids], minlength=groups + 1)
    sizes = np.array([group.units for group in graph.groups], dtype=np.float64)
    return table[:, :groups] / sizes, table[:, groups]


def _pad(terms: list[list[int]], scale: list[float], one: int) -> tuple[np.ndarray, np.ndarray]:
    """Return axis numbers (T, widest), padded with ``one`` (a constant factor 1), and scales (T,)."""
    widest = max((len(t) for t in terms), default=0)
    index = np.full((len(terms), widest), one, dtype=np.int64)
    for number, term in enumerate(terms):
        index[number, : len(term)] = term
    return index, np.array(scale, dtype=np.float64)


def _parameters(graph: Graph) -> list[tuple[Axes, tuple[int, ...]]]:
    """Return unit ids and shape of each parameter (``named_parameters`` lists tied ones once)."""
    found = []
    for name, tensor in graph.model.named_parameters():
        axes = graph.axes.get(graph.aliases.get(name, name), (None,) * tensor.dim())
        found.append((axes, tuple(tensor.shape)))
    return found


def _product(scale: float, axes: Axes, shape: tuple[int, ...], kept: np.ndarray) -> float:
    for number, ids in enumerate(axes):
        scale *= shape[number] if ids is None else int(kept[ids].sum())
    return scale


def _whole(graph: Graph) -> np.ndarray:
    return np.ones(graph.units + 1, dtype=bool)
