"""Granularity: kernels and single weights as units, and the choice among channels, heads and neurons."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from handmade import data, small_graph
from secateur.allocate import allocate
from secateur.allocation import Global, Uniform
from secateur.criteria import Magnitude, Taylor
from secateur.granularity import masks, units
from secateur.score import score
from secateur.types import Budget, Graph, Plan, PlanError


def conv_graph() -> Graph:
    """Kernels of several sizes: 7 x 7, 3 x 3, depthwise 3 x 3, transposed 2 x 2 and 1 x 1."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 7),
        nn.Conv2d(8, 8, 3),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ConvTranspose2d(8, 5, 2),
        nn.Conv2d(5, 16, 1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )
    return replace(small_graph(), model=net, groups=(), axes={}, costs=(), fingerprint="convs")


def kernel_plan(graph: Graph, keep: float, **options: object) -> Plan:
    return allocate(score(units(graph, "kernel"), Magnitude(math.inf)), Budget(params=keep), **options)


def test_kernel_scores_are_the_largest_absolute_weight() -> None:
    graph = conv_graph()
    scores = score(units(graph, "kernel"), Magnitude(math.inf)).values
    assert set(scores) == {"0.weight", "1.weight", "2.weight", "3.weight", "4.weight"}  # no linear layer
    for name, values in scores.items():
        weight = graph.model.get_parameter(name).detach()
        slow = [float(weight[o, i].abs().max()) for o in range(weight.shape[0]) for i in range(weight.shape[1])]
        assert values.tolist() == pytest.approx(slow)


@settings(max_examples=40, deadline=None)
@given(keep=st.floats(0.1, 1.0))
def test_the_fraction_of_weights_is_within_one_kernel_of_the_request(keep: float) -> None:
    graph = conv_graph()
    plan = kernel_plan(graph, keep)
    convs = {n: p for n, p in graph.model.named_parameters() if p.dim() == 4}
    found = masks(graph, plan)
    total = sum(p.numel() for p in convs.values())
    kept = total - sum(int((~mask).sum()) for mask in found.values())
    assert abs(kept - keep * total) <= 49
    assert dict(plan.achieved)["params"] == pytest.approx(kept / total)
    kernels = sum(p.shape[0] * p.shape[1] for p in convs.values())
    gone = sum(count - len(stays) for _, count, stays in plan.keep)
    assert dict(plan.achieved)["units"] == pytest.approx(1 - gone / kernels)
    for name, mask in found.items():
        assert mask.shape == convs[name].shape
        per_kernel = mask.flatten(2).float().mean(2)
        assert set(per_kernel.unique().tolist()) <= {0.0, 1.0}  # all or nothing
    # the threshold is global: whatever is gone scores no higher than whatever stays, except in emptied layers
    peaks = {n: p.detach().abs().flatten(2).amax(2) for n, p in convs.items()}
    gone = [peaks[n][~m.flatten(2)[..., 0]] for n, m in found.items()]
    stay = [peaks[n][found[n].flatten(2)[..., 0]] if n in found else peaks[n].flatten() for n in convs]
    if gone:
        safe = [s for s in stay if len(s) > 1]  # one kernel stays in every layer, however small
        assert max(float(g.max()) for g in gone) <= min(float(s.min()) for s in safe)


def test_keeping_all_cuts_nothing_and_keeping_almost_nothing_is_guarded() -> None:
    graph = conv_graph()
    assert kernel_plan(graph, 1.0).keep == ()
    assert masks(graph, kernel_plan(graph, 1.0)) == {}
    smallest = kernel_plan(graph, 0.04)
    assert all(len(kept) >= 1 for _, _, kept in smallest.keep)
    with pytest.raises(PlanError, match="smallest reachable value"):
        kernel_plan(graph, 0.001, min_units=4)


def test_uniform_kernels_keep_the_same_fraction_in_every_layer() -> None:
    plan = kernel_plan(conv_graph(), 0.5, allocation=Uniform())
    assert {name: len(kept) / count for name, count, kept in plan.keep}.values() == pytest.approx([0.5] * 5, abs=0.13)


def test_weights_are_single_entries_of_convolutions_and_linear_layers() -> None:
    graph = conv_graph()
    every = score(units(graph, "weight"), Magnitude(1))
    assert set(every.values) == {f"{i}.weight" for i in (0, 1, 2, 3, 4, 6)}
    plan = allocate(every, Budget(units=0.25), Global("none"))
    found = masks(graph, plan)
    flat = torch.cat([graph.model.get_parameter(n).detach().abs().flatten() for n in every.values])
    mask = torch.cat(
        [found[n].flatten() if n in found else torch.ones_like(every.values[n]).bool() for n in every.values]
    )
    assert int(mask.sum()) == round(0.25 * len(flat))
    assert float(flat[~mask].max()) <= float(flat[mask].min())


def test_gradient_criteria_work_on_kernels_through_the_weights() -> None:
    graph = small_graph()
    x, y = data()
    scores = score(units(graph, "kernel"), Taylor(), [(x, y)]).values["3.weight"]
    weight = graph.model[3].weight
    (grad,) = torch.autograd.grad(nn.functional.cross_entropy(graph.model(x), y), weight)
    assert scores.allclose((weight * grad).detach().sum((2, 3)).flatten().abs(), rtol=1e-4, atol=1e-9)
    scores = score(units(graph, "kernel"), Taylor("elementwise"), [(x, y)]).values["3.weight"]
    assert scores.allclose((weight * grad).detach().abs().sum((2, 3)).flatten(), rtol=1e-4, atol=1e-9)


def test_a_mask_plan_is_a_value() -> None:
    graph = conv_graph()
    plan = kernel_plan(graph, 0.5)
    assert plan.granularity == "kernel"
    assert Plan.from_json(plan.to_json()) == plan


def test_tied_weights_are_one_group_and_parametrised_ones_none() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    net[1].weight = net[0].weight
    nn.utils.parametrizations.weight_norm(net[2])
    graph = units(replace(conv_graph(), model=net), "kernel")
    assert [group.name for group in graph.groups] == ["0.weight"]


def test_channel_head_and_neuron_select_groups() -> None:
    graph = small_graph()
    channels = units(graph, "channel")
    assert [group.prunable for group in channels.groups] == [True, True, False, False]
    assert "neuron" in (channels.group("fc").frozen or "")
    assert channels.group("out").frozen == "output of the model"
    assert [group.name for group in units(graph, "neuron").groups if group.prunable] == ["fc"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: units(g, "filter"), "channel, head, neuron, kernel, weight"),
        (lambda g: units(g, "head"), "no prunable unit"),
        (lambda g: masks(g, Plan(g.fingerprint, ())), "granularity 'unit'"),
        (lambda g: masks(g, Plan("other", (), "kernel")), "the plan is for graph other"),
        (lambda g: masks(g, Plan(g.fingerprint, (("nowhere", 9, (1,)),), "kernel")), "does not have"),
        (lambda g: masks(g, Plan(g.fingerprint, (("0.weight", 9, (1,)),), "kernel")), "does not have"),
        (lambda g: allocate(score(units(g, "kernel"), Magnitude()), Budget(macs=0.5)), "masks"),
    ],
)
def test_user_errors_are_plan_errors(call, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        call(small_graph())
