"""Which gates decide about each unit: sums, concatenations and picks against sets, one unit at a time."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from secateur.runtime.gates.flows import Flow, beside, union

WIDTHS = {"a": 5, "b": 3, "c": 7}
Slow = list[set[tuple[str, int]] | None]  # for each unit the channels that decide, None: always computed


def grown(rng: random.Random, depth: int) -> tuple[Flow, Slow]:
    """A flow at random, and what it should say."""
    kind = rng.choice(["gate", "whole"] if depth == 0 else ["gate", "sum", "cat", "pick", "pick"])
    if kind == "gate":
        path = rng.choice(list(WIDTHS))
        return Flow.of(path, WIDTHS[path]), [{(path, channel)} for channel in range(WIDTHS[path])]
    if kind == "whole":
        return Flow.whole(4), [None] * 4
    (one, slow), (two, other) = grown(rng, depth - 1), grown(rng, depth - 1)
    if kind == "cat":
        return beside([one, two]), slow + other
    ids = [rng.randrange(len(slow)) for _ in range(6)]
    one, slow = one.pick(torch.tensor(ids)), [slow[unit] for unit in ids]
    if kind == "pick":
        return one, slow
    ids = [rng.randrange(len(other)) for _ in range(6)]
    two, other = two.pick(torch.tensor(ids)), [other[unit] for unit in ids]
    return union(one, two), [None if a is None or b is None else a | b for a, b in zip(slow, other, strict=True)]


def slowly(slow: Slow, masks: dict[str, Tensor], samples: int) -> Tensor:
    return torch.tensor(
        [
            [ways is None or any(path not in masks or bool(masks[path][n, c]) for path, c in ways) for ways in slow]
            for n in range(samples)
        ]
    )


@pytest.mark.parametrize("seed", range(30))
def test_a_flow_says_what_sets_say(seed: int) -> None:
    rng = random.Random(seed)
    flow, slow = grown(rng, 4)
    for missing in (set(), {"b"}):
        masks = {path: torch.rand(3, width) < 0.4 for path, width in WIDTHS.items() if path not in missing}
        expected, again = slowly(slow, masks, 3), Flow.read(flow.rows(), WIDTHS)
        for one in (flow, again):
            found = one.mask(masks, 3)
            assert torch.equal(torch.ones_like(expected) if found is None else found, expected)


def test_rows_are_runs() -> None:
    assert beside([Flow.of("a", 5), Flow.whole(2)]).rows() == [[["a", 0, 5], [None, 0, 2]]]
    both = beside([union(Flow.of("a", 5), Flow.of("c", 5)), Flow.of("b", 3)])
    assert both.rows() == [[["a", 0, 5], ["b", 0, 3]], [["c", 0, 5], ["", 0, 3]]]
    assert Flow.of("a", 5).pick(torch.tensor([3, 4, 0])).rows() == [[["a", 3, 2], ["a", 0, 1]]]
