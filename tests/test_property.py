"""A sample of the property run, on networks of its own; ``make slow`` checks 2,000."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest
from benchmarks.proving import properties

import secateur as sc


@pytest.mark.parametrize("first", range(100_000, 100_100, 10))
def test_random_networks_keep_every_promise(first: int) -> None:
    found = {seed: properties.check(seed)[0] for seed in range(first, first + 10)}
    assert not {seed: failed for seed, failed in found.items() if failed}


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("first", range(200_000, 202_000, 50))
def test_many_random_networks_keep_every_promise(first: int) -> None:
    found = {seed: properties.check(seed)[0] for seed in range(first, first + 50)}
    assert not {seed: failed for seed, failed in found.items() if failed}


def test_a_broken_surgery_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compact that keeps the wrong unit: the promise about masked and compact is the one that breaks."""
    compact = sc.compact
    importlib.import_module("secateur.trial")  # takes its name for compact when first imported: before the change

    def shifted(graph: Any, plan: Any, **options: Any) -> Any:
        rows = []
        for name, units, kept in plan.keep:
            rest = sorted(set(range(units)) - set(kept))
            rows.append((name, units, tuple(sorted((*kept[1:], rest[0])))))
        return compact(graph, sc.Plan(plan.fingerprint, tuple(rows)), **options)

    monkeypatch.setattr(sys.modules["secateur.compact"], "compact", shifted)
    kinds = {kind for seed in range(5) for kind, _ in properties.check(seed)[0]}
    assert "masked" in kinds
