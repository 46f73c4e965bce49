"""Plans: against slow references, and the promises of budgets, rounding and guards."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import secateur as sc
from handmade import small_graph
from secateur.allocate import allocate
from secateur.allocation import ALLOCATIONS, Global, Isomorphic, Uniform
from secateur.measure.counts import macs, params
from secateur.types import Budget, Graph, Plan, PlanError, Scores
from secateur.widths import NEAR, allowed, nearest, steps

WIDE = (64, 48, 96)


def random_scores(graph: Graph, seed: int = 0, decimals: int = 9) -> Scores:
    source = np.random.default_rng(seed)
    draw = lambda units: torch.tensor(source.random(units).round(decimals), dtype=torch.float32)  # noqa: E731
    return Scores(graph, "test", {g.name: draw(g.units) for g in graph.groups if g.prunable})


def widths(plan: Plan, graph: Graph) -> list[int]:
    kept = {name: len(indices) for name, _, indices in plan.keep}
    return [kept.get(group.name, group.units) for group in graph.groups]


def test_the_best_units_stay_and_ties_go_to_the_lower_index() -> None:
    graph = small_graph()
    scores = Scores(graph, "test", {"conv1": torch.tensor([1.0, 5, 3, 3, 3, 0, 3, 9])})
    plan = allocate(scores, Budget(units=0.9), keep={"conv1": 0.5}, round_to=None)
    assert plan.keep == (("conv1", 8, (1, 2, 3, 7)),)


def threshold(values: dict[str, torch.Tensor], removed: int) -> list[int]:
    """The slow way: sort all units but the best of each group, take the lowest; of equals the later group's."""
    pooled = [(float(s), -g) for g, v in enumerate(values.values()) for s in sorted(v.tolist())[:-1]]
    lost = [-g for _, g in sorted(pooled)[:removed]]
    return [*(len(v) - lost.count(g) for g, v in enumerate(values.values())), 4]


@pytest.mark.parametrize("decimals", [0, 1, 9])
@pytest.mark.parametrize("removed", range(0, 24, 3))
def test_global_is_one_threshold_over_all_groups(removed: int, decimals: int) -> None:
    graph = small_graph()
    scores, budget = random_scores(graph, seed=removed, decimals=decimals), Budget(units=(26 - removed) / 26)
    norms = {"mean": lambda v: v.double() / v.double().mean(), "l2": lambda v: v.double() / v.double().norm()}
    for word, norm in {**norms, "none": lambda v: v}.items():
        plan = allocate(scores, budget, Global(word), round_to=None)
        assert widths(plan, graph) == threshold({name: norm(v) for name, v in scores.values.items()}, removed)
    assert allocate(scores, budget, "global") == allocate(scores, budget, Global("mean"))


def test_isomorphic_ranks_inside_pools_of_equal_structure() -> None:
    graph = small_graph()
    values = {"conv1": torch.arange(8.0) + 100, "conv2": torch.arange(6.0), "fc": torch.arange(12.0) - 50}
    plan = allocate(Scores(graph, "test", values), Budget(units=0.5), Isomorphic("none"), round_to=None)
    # the pool of the convolutions (14) loses 7: 5 of conv2 and then, guarded, 2 of conv1; fc loses 6 of 12
    assert widths(plan, graph) == [6, 1, 6, 4]


def test_uniform_keeps_the_same_fraction_everywhere() -> None:
    graph = small_graph((80, 40, 120))
    for keep in (0.2, 0.35, 0.5, 0.75):
        plan = allocate(random_scores(graph), Budget(units=keep), Uniform(), round_to=None)
        assert widths(plan, graph)[:3] == [round(keep * units) for units in (80, 40, 120)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.tuples(*[st.integers(2, 100)] * 3),
    kind=st.sampled_from(["units", "params", "macs"]),
    keep=st.floats(0.05, 1),
    how=st.sampled_from(sorted(ALLOCATIONS)),
    round_to=st.sampled_from(["auto", None, 4, 16]),
    min_units=st.integers(1, 3),
    decimals=st.sampled_from([0, 1, 9]),
)
def test_promises(seed, sizes, kind, keep, how, round_to, min_units, decimals) -> None:
    graph = small_graph(sizes)
    scores = random_scores(graph, seed, decimals)
    options = {"round_to": round_to, "min_units": min_units}
    try:
        plan = allocate(scores, Budget(**{kind: keep}), how, **options)
    except PlanError as error:
        if "smallest reachable" not in str(error):
            raise
        floor = [allowed(g.units, s, min_units)[0] for g, s in zip(graph.groups, steps(graph, round_to), strict=True)]
        assert fraction(graph, kind, [*floor[:3], 4]) > keep + NEAR
        return
    got = widths(plan, graph)
    for group, width, step in zip(graph.groups, got, steps(graph, round_to), strict=True):
        assert width >= min(min_units, group.units)
        assert width % step == 0 or width == group.units
    for name, _, indices in plan.keep:  # nothing that went scores higher than anything that stayed
        values = scores.values[name]
        gone = [i for i in range(len(values)) if i not in indices]
        assert list(indices) == sorted(indices)
        assert all((-float(values[i]), i) < (-float(values[j]), j) for i in indices for j in gone)
    achieved = dict(plan.achieved)
    kept = plan.kept(graph)
    assert achieved["macs"] == pytest.approx(macs(graph, kept) / macs(graph))
    assert achieved["params"] == pytest.approx(params(graph, kept) / params(graph))
    assert achieved["units"] == pytest.approx(sum(got[:3]) / sum(sizes))
    assert abs(achieved[kind] - keep) <= NEAR or "asked" in plan.notes[0]
    assert Plan.from_json(plan.to_json()) == plan
    assert allocate(scores, Budget(**{kind: keep}), how, **options) == plan


def fraction(graph: Graph, kind: str, got: list[int]) -> float:
    kept = np.ones(graph.units + 1, dtype=bool)
    for group, width in zip(graph.groups, got, strict=True):
        kept[group.offset + width : group.offset + group.units] = False
    if kind == "units":
        return sum(got[:3]) / sum(g.units for g in graph.groups[:3])
    count = {"params": params, "macs": macs}[kind]
    return count(graph, kept) / count(graph)


@pytest.mark.parametrize("how", sorted(ALLOCATIONS))
@pytest.mark.parametrize("kind", ["params", "macs"])
@pytest.mark.parametrize("keep", [0.7, 0.5, 0.3])
def test_budgets_are_met_on_a_real_network(how: str, kind: str, keep: float) -> None:
    torchvision = pytest.importorskip("torchvision")
    graph = sc.trace(torchvision.models.resnet18(), torch.zeros(1, 3, 64, 64))
    plan = allocate(random_scores(graph), Budget(**{kind: keep}), how)
    assert dict(plan.achieved)[kind] == pytest.approx(keep, abs=NEAR)
    assert plan.notes == ()
    assert all(len(kept) % 8 == 0 for _, _, kept in plan.keep)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5"])
def test_what_the_plan_promises_is_what_the_compact_model_has(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    net, image = torchvision.models.get_model(name).eval(), torch.zeros(1, 3, 64, 64)
    graph = sc.trace(net, image)
    plan = allocate(random_scores(graph), Budget(macs=0.5))
    small = sc.compact(graph, plan, verify=False).eval()
    achieved = dict(plan.achieved)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        small(image)
    assert counter.get_total_flops() // 2 == round(achieved["macs"] * macs(graph))
    assert sum(p.numel() for p in small.parameters()) == round(achieved["params"] * params(graph))


def test_rounding_goes_up_as_well_as_down() -> None:
    graph = small_graph(WIDE)
    above = below = 0
    for keep in np.linspace(0.2, 0.9, 15):
        plan = allocate(random_scores(graph), Budget(units=float(keep)), "uniform")
        for group, width in zip(graph.groups[:3], widths(plan, graph), strict=False):
            assert abs(width - keep * group.units) <= 8
            above += width > keep * group.units
            below += width < keep * group.units
    assert above > 5
    assert below > 5


def test_steps_count_positions_not_units() -> None:
    graph = small_graph(WIDE)
    assert steps(graph, "auto") == [8, 8, 8, 1]
    assert steps(graph, None) == [1, 1, 1, 1]
    assert steps(graph, 64) == [64, 1, 64, 1]
    heads = tuple(
        replace(m, index=np.arange(64 * k).reshape(64, k))
        for m, k in zip(graph.groups[0].members[:1], (12,), strict=True)
    )
    graph = replace(graph, groups=(replace(graph.groups[0], members=heads),))
    assert steps(graph, "auto") == [2]  # two heads of 12 are 24 positions
    assert steps(small_graph((31, 8, 8)), "auto") == [1, 1, 1, 1]


def test_allowed_widths_hold_the_dense_one_and_never_fewer_than_the_guard() -> None:
    assert allowed(20, 8, 1).tolist() == [8, 16, 20]
    assert allowed(32, 8, 9).tolist() == [16, 24, 32]
    assert allowed(5, 1, 9).tolist() == [5]
    assert nearest(np.array([8, 16, 20]), 12) == 8


def test_keep_and_freeze_by_pattern() -> None:
    graph = small_graph(WIDE)
    plan = allocate(random_scores(graph), Budget(macs=0.2), keep={"0": 0.25}, freeze=("6",))
    assert widths(plan, graph)[0] == 16  # "0" is the module of conv1, "6" the linear layer: it consumes conv2,
    assert widths(plan, graph)[1] < 48  # but only the units that a module produces are meant
    assert widths(plan, graph)[2] == 96
    plan = allocate(random_scores(graph), Budget(units=0.8), freeze=("conv*",))
    assert widths(plan, graph)[:2] == [64, 48]
    assert widths(plan, graph)[2] < 96


def test_exact_only_leaves_inexact_groups_whole() -> None:
    graph = small_graph(WIDE)
    graph = replace(graph, groups=tuple(replace(g, exact=g.name != "fc") for g in graph.groups))
    assert widths(allocate(random_scores(graph), Budget(units=0.7), exact_only=True), graph)[2] == 96
    assert widths(allocate(random_scores(graph), Budget(units=0.7)), graph)[2] < 96


def test_a_budget_that_no_step_comes_near_is_told() -> None:
    graph = small_graph((64, 64, 64))
    plan = allocate(random_scores(graph), Budget(units=0.75), "uniform", round_to=32)
    assert sum(widths(plan, graph)[:3]) in (128, 160)
    assert "asked units=0.75, reached 0." in plan.notes[0]
    assert "steps of up to 32 units" in plan.notes[0]


def test_groups_without_scores_stay_whole_and_are_told() -> None:
    graph = small_graph(WIDE)
    values = dict(random_scores(graph).values)
    del values["fc"]
    plan = allocate(Scores(graph, "BNScale()", values), Budget(units=0.7))
    assert widths(plan, graph)[2] == 96
    assert any("1 groups have no scores from BNScale()" in note for note in plan.notes)


def test_everything_stays_with_a_budget_of_one() -> None:
    graph = small_graph((33, 50, 7))
    for how in ALLOCATIONS:
        assert allocate(random_scores(graph), Budget(macs=1.0), how).keep == ()


def nan_scores(graph: Graph) -> Scores:
    return Scores(graph, "test", {**random_scores(graph).values, "fc": torch.full((12,), float("nan"))})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: allocate(random_scores(g), Budget(macs=0.001)), r"smallest reachable value is 0\.0515"),
        (lambda g: allocate(random_scores(g), Budget(macs=0.5), "best"), "uniform, global, isomorphic"),
        (lambda g: Global("sum"), "mean, l2, none"),
        (lambda g: allocate(random_scores(g), Budget(macs=0.5), round_to=0), "round_to"),
        (lambda g: allocate(random_scores(g), Budget(macs=0.5), round_to="8"), "round_to"),
        (lambda g: allocate(random_scores(g), Budget(macs=0.5), min_units=-1), "min_units"),
        (lambda g: allocate(random_scores(g), Budget(macs=0.5), keep={"conv1": 0}), "fraction in"),
        (lambda g: allocate(random_scores(g), Budget(macs=0.5), keep={"cnv1": 0.5}), "'cnv1' matches no"),
        (lambda g: allocate(random_scores(g), Budget(macs=0.5), freeze=("layer*",)), "matches no"),
        (lambda g: allocate(nan_scores(g), Budget(macs=0.5)), "12 not finite"),
        (lambda g: allocate(Scores(g, "t", {"conv1": torch.zeros(3)}), Budget(macs=0.5)), "8 finite numbers"),
        (lambda g: allocate(random_scores(replace(g, costs=())), Budget(macs=0.5)), "counts no macs"),
        (lambda g: allocate(Scores(g, "t", {}), Budget(macs=0.5)), "nothing can be cut"),
    ],
)
def test_user_errors_are_plan_errors(call, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        call(small_graph())
