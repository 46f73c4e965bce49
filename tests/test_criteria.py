"""Criteria: the golden values, and one contract for every entry of the registry."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from handmade import small_graph
from secateur.criteria import (
    REGISTRY,
    BNScale,
    Contribution,
    Costed,
    Criterion,
    Evidence,
    Fisher,
    Magnitude,
    Normalised,
    Random,
    Slice,
    Taylor,
    Worst,
    collect,
    smooth,
)
from secateur.criteria.wrappers import l2
from secateur.types import PlanError, Scores

# Two samples of one map with two positions: activations a and the gradients g of each sample's own loss.
A = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
G = torch.tensor([[0.5, -1.0], [2.0, 1.0]])
TOY = Evidence(
    "toy",
    torch.arange(1),
    (Slice("conv.weight", "out", torch.tensor([[5.0, -5.0]])),),
    unit_grads=(A * G).sum(1, keepdim=True),
    unit_grads_abs=(A * G).abs().sum(1, keepdim=True),
    positions=torch.full((2,), 2.0),
    macs=torch.tensor([0.25]),
)


@pytest.mark.parametrize(
    ("criterion", "value"),
    [
        (Taylor(), 1.875),
        (Taylor("elementwise"), 2.125),
        (Fisher(), 9.5625),
        (Magnitude(1), 10.0),
        (Magnitude(2), 50**0.5),
        (Magnitude(math.inf), 5.0),
        (Magnitude(1, normalise=True), 5.0),
        (Normalised(Fisher()), 1.0),
        (Costed(Taylor(), macs=0.5), 1.75),
    ],
)
def test_golden_values_of_the_toy(criterion: Criterion, value: float) -> None:
    assert criterion(TOY).tolist() == pytest.approx([value], rel=1e-6)


def test_the_signed_toy_would_differ_from_both_forms_of_taylor() -> None:
    parent = (A * G).mean().abs()  # absolute value after the mean over the batch: not offered
    assert float(parent) == pytest.approx(1.125)


def test_l1_takes_absolute_values() -> None:
    weights = Slice("w", "out", torch.tensor([[5.0, -5.0], [1.0, 1.0]]))
    strong, weak = Magnitude(1)(Evidence("g", torch.arange(2), (weights,)))
    assert strong > weak


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_magnitude_over_several_slices_is_the_norm_of_all_their_weights(p: float) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(4, 3), torch.randn(4, 5), torch.randn(4, 2)]
    slices = tuple(Slice(f"t{i}", role, w) for i, (w, role) in enumerate(zip(parts, ("out", "out", "in"), strict=True)))
    evidence = Evidence("g", torch.arange(4), slices[:2], slices[2:])
    produced, everything = torch.cat(parts[:2], 1), torch.cat(parts, 1)
    assert Magnitude(p)(evidence).allclose(torch.linalg.vector_norm(produced, p, dim=1))
    assert Magnitude(p, inputs=True)(evidence).allclose(torch.linalg.vector_norm(everything, p, dim=1))


@pytest.mark.parametrize("p", [1, 2, math.inf])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e20, 1e36])
def test_magnitude_keeps_its_values_at_extreme_scales(p: float, scale: float) -> None:
    weights = torch.arange(1.0, 13).reshape(3, 4)
    scores = Magnitude(p)(Evidence("g", torch.arange(3), (Slice("w", "out", weights * scale),)))
    assert (scores.double() / scale).tolist() == pytest.approx(weights.norm(p, dim=1).tolist(), rel=1e-4)


def test_magnitude_leaves_norms_and_biases_that_ride_along_out() -> None:
    produced, rides = Slice("w", "out", torch.ones(2, 3)), Slice("b", "along", torch.full((2, 1), 9.0))
    assert Magnitude(1)(Evidence("g", torch.arange(2), (produced, rides))).tolist() == [3, 3]
    assert not Magnitude(1).applies(Evidence("g", torch.arange(2), (rides,)))


def test_normalised_magnitude_does_not_reward_a_wide_fan_in() -> None:
    wide, narrow = torch.full((1, 64), 0.5), torch.full((1, 4), 0.5)
    for p in (1, 2, math.inf):
        scores = [
            Magnitude(p, normalise=True)(Evidence("g", torch.arange(1), (Slice("w", "out", w),)))
            for w in (wide, narrow)
        ]
        assert scores[0].allclose(scores[1])


@pytest.mark.parametrize("criterion", [Taylor(), Taylor("elementwise"), Fisher()])
def test_silent_units_score_exactly_zero(criterion: Criterion) -> None:
    zero = torch.tensor([[0.0, 1.0], [0.0, -2.0]])
    evidence = replace(TOY, ids=torch.arange(2), unit_grads=zero, unit_grads_abs=zero.abs())
    silent, loud = criterion(evidence).tolist()
    assert silent == 0 < loud


def test_normalised_scores_have_norm_one_and_zeros_stay_zero() -> None:
    for scale in (1e-40, 1e-20, 1.0, 1e20, 3e38):
        assert float(l2(torch.tensor([3.0, 4.0]) / 4 * scale).norm()) == pytest.approx(1, rel=1e-4)
    assert l2(torch.zeros(3)).tolist() == [0, 0, 0]


def test_bn_scale_reads_scales_only_and_leaves_other_groups_alone() -> None:
    scale = Slice("bn.weight", "along", torch.tensor([[-3.0], [1.0]]))
    shift = Slice("bn.bias", "along", torch.tensor([[100.0], [200.0]]))
    evidence = Evidence("g", torch.arange(2), (scale, shift))
    assert BNScale()(evidence).tolist() == [3, 1]
    assert not BNScale().applies(replace(evidence, weights=(shift,)))


def test_random_is_fixed_by_seed_and_group_and_leaves_the_global_state_alone() -> None:
    evidence = Evidence("g", torch.arange(5))
    before = torch.get_rng_state()
    first = Random(1)(evidence)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, Random(1)(evidence))
    assert not torch.equal(first, Random(2)(evidence))
    assert not torch.equal(first, Random(1)(replace(evidence, group="h")))


def test_smooth_is_the_running_mean() -> None:
    graph = small_graph()
    new, old = (Scores(graph, "c", {"conv1": torch.full((8,), value)}) for value in (1.0, 2.0))
    assert smooth(new, None) is new
    assert smooth(new, old, decay=0.75).values["conv1"].tolist() == [1.75] * 8
    with pytest.raises(PlanError, match="two different graphs"):
        smooth(new, Scores(small_graph((4, 6, 12)), "c", {"conv1": torch.zeros(4)}))
    with pytest.raises(PlanError, match=r"decay"):
        smooth(new, old, decay=1.5)


@pytest.mark.parametrize(
    "make",
    [lambda: Magnitude(3), lambda: Taylor("signed"), lambda: Costed(Fisher(), macs=-1), lambda: Contribution(1, -1)],
)
def test_wrong_options_say_what_is_right(make) -> None:
    with pytest.raises(PlanError, match="got"):
        make()


# ---- the contract: every entry of the registry, and wrapped

CONTRACT = [
    *(kind() for kind in REGISTRY.values()),
    Taylor("elementwise"),
    Magnitude(1),
    Magnitude(math.inf, inputs=True),
]
CONTRACT += [Contribution(1, 0), Contribution(0, 1), Worst(Taylor())]
CONTRACT += [Normalised(Taylor()), Costed(Normalised(Fisher()), macs=0.1, params=0.2)]


def evidence_of(seed: int, units: int, samples: int, scale: float) -> Evidence:
    torch.manual_seed(seed)
    draw = lambda *shape: (torch.randn(*shape) * scale).clamp(-3e38, 3e38)  # noqa: E731
    slices = (Slice("c.weight", "out", draw(units, 7)), Slice("n.weight", "along", draw(units, 1)))
    return Evidence(
        "group",
        torch.arange(units),
        slices,
        (Slice("d.weight", "in", draw(units, 9)),),
        unit_grads=draw(samples, units),
        unit_grads_abs=draw(samples, units).abs(),
        activations=draw(samples, units).abs(),
        positions=torch.randint(1, 9, (samples,)).float(),
        contributions=torch.rand(units),
        contribution_max=torch.rand(units),
        macs=torch.rand(units),
        params=torch.rand(units),
    )


def permuted(evidence: Evidence, order: Tensor) -> Evidence:
    changed = {f.name: getattr(evidence, f.name) for f in fields(Evidence)}
    for name in ("ids", "macs", "params", "contributions", "contribution_max"):
        changed[name] = changed[name][order]
    for name in ("unit_grads", "unit_grads_abs", "activations"):
        changed[name] = changed[name][:, order]
    for name in ("weights", "consumers"):
        changed[name] = tuple(replace(s, values=s.values[order]) for s in changed[name])
    return Evidence(**changed)


@pytest.mark.parametrize("criterion", CONTRACT, ids=repr)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    units=st.integers(1, 40),
    samples=st.integers(1, 20),
    scale=st.sampled_from([0.0, 1e-38, 1e-20, 1.0, 1e10, 1e25, 3e38]),
)
def test_contract(criterion: Criterion, seed: int, units: int, samples: int, scale: float) -> None:
    evidence = evidence_of(seed, units, samples, scale)
    copy = evidence_of(seed, units, samples, scale)
    scores = criterion(evidence)
    assert scores.dtype == torch.float32
    assert scores.shape == (units,)
    assert torch.isfinite(scores).all()
    assert torch.equal(scores, criterion(copy))  # a function of the evidence, which it does not change
    assert torch.equal(scores, criterion(evidence))
    order = torch.randperm(units)
    assert torch.allclose(criterion(permuted(evidence, order)), scores[order], rtol=1e-6, atol=0)


@pytest.mark.parametrize("criterion", CONTRACT, ids=repr)
def test_a_criterion_reads_only_what_it_declares(criterion: Criterion) -> None:
    full = evidence_of(0, 6, 4, 1.0)
    asked = {"group", "ids", "positions", *criterion.evidence}
    bare = Evidence(**{name: getattr(full, name) for name in asked})
    assert torch.equal(criterion(bare), criterion(full))
    for name in criterion.evidence - {"weights", "consumers"}:
        with pytest.raises(KeyError, match=name):
            criterion(replace(bare, **{name: None}))


def test_the_registry_holds_every_criterion_by_its_name() -> None:
    assert set(REGISTRY) >= {"magnitude", "taylor", "fisher", "random", "bn_scale"}
    assert all(kind.name == name for name, kind in REGISTRY.items())


@dataclass(frozen=True)
class Good(Criterion):
    """A criterion."""

    name: ClassVar[str] = "good"
    wants: ClassVar[frozenset[str]] = frozenset()

    @property
    def evidence(self) -> frozenset[str]:
        return self.wants


def _no_name() -> type:
    return dataclass(frozen=True)(type("NoName", (Good,), {"__doc__": "A criterion.", "name": ""}))


def _no_doc() -> type:
    return dataclass(frozen=True)(type("NoDoc", (Good,), {"__doc__": " ", "name": "no_doc"}))


def _plain() -> type:
    return type("Plain", (Good,), {"__doc__": "A criterion.", "name": "plain"})


def _twice() -> type:
    return dataclass(frozen=True)(type("Twice", (Good,), {"__doc__": "A criterion.", "name": "good"}))


def _unknown() -> type:
    body = {"__doc__": "A criterion.", "name": "unknown", "wants": frozenset({"hessian"})}
    return dataclass(frozen=True)(type("Unknown", (Good,), body))


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (_no_name, "lower-case"),
        (_no_doc, "docstring"),
        (_plain, "frozen dataclass"),
        (_twice, "not taken"),
        (_unknown, "hessian"),
    ],
)
def test_collect_refuses_a_broken_criterion(make, problem: str) -> None:
    assert collect([Good, 3, Criterion, Normalised]) == {"good": Good}
    with pytest.raises(TypeError, match=problem):
        collect([Good, make()])
