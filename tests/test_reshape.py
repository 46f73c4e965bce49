"""Changes of shape against brute force: whatever unit dies, the same elements die before and after."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from secateur.graph.flow import Axes, Axis, Flow
from secateur.graph.reshape import blocks, reshape
from secateur.graph.trace import Recording


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((6,), (6,), [([0], [0])]),
        ((6,), (2, 3), [([0], [0, 1])]),
        ((2, 3), (6,), [([0, 1], [0])]),
        ((2, 8, 9), (2, 2, 4, 9), [([0], [0]), ([1], [1, 2]), ([2], [3])]),
        ((4, 6), (6, 4), [([0, 1], [0, 1])]),
        ((1, 5, 1), (5,), [([1], [0])]),
        ((2, 3, 4), (1, 2, 12, 1), [([0], [1]), ([1, 2], [2])]),
        ((1,), (1, 1), []),
        ((), (1,), []),
    ],
)
def test_blocks(before: tuple[int, ...], after: tuple[int, ...], expected: list) -> None:
    assert blocks(before, after) == expected


def naive_blocks(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Cut both shapes at every prefix product that they share."""
    left = [(i, n) for i, n in enumerate(before) if n != 1]
    right = [(j, n) for j, n in enumerate(after) if n != 1]
    shared = set(itertools.accumulate((n for _, n in left), lambda a, b: a * b))
    shared &= set(itertools.accumulate((n for _, n in right), lambda a, b: a * b))
    out = []
    for low, high in itertools.pairwise([1, *sorted(shared)]):
        parts = []
        for side in (left, right):
            product, axes = 1, []
            for axis, n in side:
                product *= n
                if low < product <= high:
                    axes.append(axis)
            parts.append(axes)
        out.append((parts[0], parts[1]))
    return out


def factoring(rng: random.Random, total: int) -> tuple[int, ...]:
    shape = []
    while total > 1:
        step = rng.choice([d for d in range(2, total + 1) if total % d == 0])
        shape.append(step)
        total //= step
        if rng.random() < 0.2:
            shape.append(1)
    return tuple(shape) or (1,)


TOTALS = (6, 8, 12, 16, 24, 36, 48)


@pytest.mark.parametrize("seed", range(30))
def test_blocks_are_those_of_shared_products(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(20):
        total = rng.choice(TOTALS)
        before, after = factoring(rng, total), factoring(rng, total)
        assert blocks(before, after) == naive_blocks(before, after)


def alive(flow: Flow, axes: Axes, shape: tuple[int, ...], dead: int) -> np.ndarray:
    """Which elements stay when the class of cells ``dead`` goes."""
    stay = np.ones(shape, dtype=bool)
    for k, axis in enumerate(axes):
        if axis is not None:
            view = [1] * len(shape)
            view[k] = shape[k]
            stay &= (flow.cells.find(axis.ids) != dead).reshape(view)
    return stay


def moves(rng: random.Random, shape: tuple[int, ...]) -> list:
    """A random chain of reshapes and permutations, as in attention, shuffles and windows."""
    steps: list = []
    for _ in range(rng.randint(1, 3)):
        order = rng.sample(range(len(shape)), len(shape))
        after = factoring(rng, math.prod(shape))
        steps.append((order, after))
        shape = after
    return steps


@pytest.mark.parametrize("seed", range(60))
def test_the_same_elements_die_before_and_after(seed: int) -> None:
    rng = random.Random(seed)
    lived = 0
    for _ in range(10):
        flow = Flow(Recording())
        shape = factoring(rng, rng.choice(TOTALS))
        start: Axes = [Axis(flow.cells.fresh(n)) if n > 1 and rng.random() < 0.6 else None for n in shape]
        stages = [(list(start), shape, None)]
        axes = start
        for order, after in moves(rng, shape):
            axes, turned = [axes[k] for k in order], tuple(shape[k] for k in order)
            axes, shape = reshape(flow, axes, turned, after), after
            stages.append((axes, shape, order))
        flow.cells.resolve()
        cells = np.arange(flow.cells.count)
        for root in np.unique(flow.cells.find(cells)):
            if flow.cells.frozen[root]:
                continue
            lived += 1
            stay = alive(flow, stages[0][0], stages[0][1], root)
            for axes, shape, order in stages[1:]:
                stay = stay.transpose(order).reshape(shape)
                assert np.array_equal(stay, alive(flow, axes, shape, root))
    assert lived > 3


def test_units_and_fixed_positions_folded_together_freeze() -> None:
    flow = Flow(Recording())
    ids = flow.cells.fresh(4)
    mixed = Axis(np.array([*ids, -1, -1]))
    out = reshape(flow, [mixed], (6,), (2, 3))
    flow.cells.resolve()
    assert flow.cells.is_frozen(ids).all()
    assert out == [None, None]


def test_one_unit_over_a_whole_axis_freezes() -> None:
    flow = Flow(Recording())
    one = flow.cells.fresh(1)
    reshape(flow, [Axis(np.repeat(one, 6))], (6,), (2, 3))
    assert flow.cells.is_frozen(one).all()


def test_the_same_view_twice_has_the_same_factors() -> None:
    flow = Flow(Recording())
    axis = Axis(flow.cells.fresh(6))
    first, second = (reshape(flow, [axis], (6,), (2, 3)) for _ in range(2))
    assert [a.ids.tolist() for a in first if a] == [a.ids.tolist() for a in second if a]
    back = reshape(flow, first, (2, 3), (6,))[0]
    flow.cells.resolve()
    assert back is not None
    assert np.array_equal(flow.cells.find(back.ids), flow.cells.find(axis.ids))
