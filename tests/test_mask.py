"""Masks: what is zeroed, what comes back and to the bit, what training in between keeps."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from handmade import small_graph
from secateur.mask import dead_slices, masked, unmasked
from secateur.types import Graph, Plan, PlanError


def plan_of(graph: Graph, **kept: tuple[int, ...]) -> Plan:
    return Plan(graph.fingerprint, tuple((name, graph.group(name).units, keep) for name, keep in kept.items()))


def net() -> tuple[nn.Sequential, Graph]:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 2)).double()
    return model, sc.trace(model, torch.rand(2, 3, dtype=torch.float64))


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[k].view(torch.int64), b[k].view(torch.int64)) for k in a)


def test_what_is_zeroed() -> None:
    model, graph = net()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    sc.mask_(graph, plan_of(graph, **{"0": (0, 3), "2": (1, 2, 3, 4)}))
    assert model[0].weight.tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 0], [1, 1, 1]]
    assert model[0].bias.tolist() == [1, 0, 0, 1]
    assert model[2].weight.tolist() == [[0, 0, 0, 0], *[[1, 0, 0, 1]] * 4]
    assert model[2].bias.tolist() == [0, 1, 1, 1, 1]
    assert model[4].weight.tolist() == [[0, 1, 1, 1, 1]] * 2
    assert model[4].bias.tolist() == [1, 1]


def test_the_positions_of_dead_units_by_hand() -> None:
    graph = small_graph((2, 3, 2))
    plan = plan_of(graph, conv1=(1,), conv2=(0, 2))
    found = {
        name: {axis: p.tolist() for axis, p in parts} for name, parts in dead_slices(graph, plan.kept(graph)).items()
    }
    one = {0: [0]}
    assert found == {
        "0.weight": one, "1.weight": one, "1.bias": one, "1.running_mean": one, "1.running_var": one,
        "3.weight": {0: [1], 1: [0]}, "3.bias": {0: [1]}, "6.weight": {1: list(range(16, 32))},
    }  # fmt: skip


def test_a_dead_unit_changes_nothing_behind_it() -> None:
    model, graph = net()
    x = torch.rand(5, 3, dtype=torch.float64)
    sc.mask_(graph, plan_of(graph, **{"0": (0, 3)}))
    wide = model(x)
    with torch.no_grad():
        hand = torch.sigmoid(x @ model[0].weight[[0, 3]].T + model[0].bias[[0, 3]])
        hand = torch.sigmoid(hand @ model[2].weight[:, [0, 3]].T + model[2].bias)
    torch.testing.assert_close(wide, model[4](hand))


def test_values_come_back_to_the_bit() -> None:
    model, graph = net()
    with torch.no_grad():
        model[0].weight[1] = torch.tensor([-0.0, float("nan"), float("inf")])
        model[2].bias[0] = -0.0
    before = bits(model)
    version = {k: id(v) for k, v in model.named_parameters()}
    sc.mask_(graph, plan_of(graph, **{"0": (0, 3), "2": (2,)}))
    assert not same(before, bits(model))
    assert sc.unmask_(graph) is model
    assert same(before, bits(model))
    assert version == {k: id(v) for k, v in model.named_parameters()}


def test_a_second_mask_replaces_the_first() -> None:
    model, graph = net()
    before = bits(model)
    first, second = plan_of(graph, **{"0": (0,)}), plan_of(graph, **{"0": (1, 2, 3), "2": (0, 1)})
    sc.mask_(graph, second)
    alone = bits(model)
    sc.unmask_(graph)
    sc.mask_(graph, first)
    sc.mask_(graph, second)
    assert same(alone, bits(model))
    sc.unmask_(graph)
    assert same(before, bits(sc.unmask_(graph)))


def test_training_under_a_mask_is_kept() -> None:
    model, graph = net()
    before = bits(model)
    sc.mask_(graph, plan_of(graph, **{"0": (0, 3)}))
    with torch.no_grad():
        for p in model.parameters():
            p += (p != 0) * 1.0
    sc.unmask_(graph)
    dead = torch.zeros(4, dtype=torch.bool)
    dead[[1, 2]] = True
    assert torch.equal(model[0].weight[dead], before["0.weight"][dead])
    assert torch.equal(model[0].weight[~dead], before["0.weight"][~dead] + 1)
    assert torch.equal(model[2].weight[:, dead], before["2.weight"][:, dead])
    assert torch.equal(model[2].weight[:, ~dead], before["2.weight"][:, ~dead] + 1)


def test_masks_for_the_length_of_a_block() -> None:
    model, graph = net()
    before = bits(model)
    outer, inner = plan_of(graph, **{"0": (0, 3)}), plan_of(graph, **{"2": (1,)})
    with pytest.raises(ZeroDivisionError), masked(graph, inner):
        raise ZeroDivisionError
    assert same(before, bits(model))
    sc.mask_(graph, outer)
    under = bits(model)
    with masked(graph, inner):
        assert not same(under, bits(model))
    assert same(under, bits(model))
    with unmasked(model):
        assert same(before, bits(model))
    assert same(under, bits(model))


def test_compact_cuts_the_model_under_its_mask_and_leaves_it_on() -> None:
    model, graph = net()
    small = sc.compact(graph, plan_of(graph, **{"2": (1, 2)}))
    sc.mask_(graph, plan_of(graph, **{"0": (0, 3)}))
    under = bits(model)
    again = sc.compact(graph, plan_of(graph, **{"2": (1, 2)}))
    assert same(bits(small), bits(again))
    assert same(under, bits(model))
    assert "_secateur_masked" not in vars(again)
    sc.trace(again, torch.rand(2, 3, dtype=torch.float64))


def test_a_deep_copy_of_a_masked_model_has_its_own_mask() -> None:
    model, graph = net()
    before = bits(model)
    sc.mask_(graph, plan_of(graph, **{"0": (0, 3)}))
    twin = copy.deepcopy(model)
    sc.unmask_(graph)
    assert same(before, bits(model))
    assert not same(before, bits(twin))
    sc.unmask_(sc.trace(twin, graph.args))
    assert same(before, bits(twin))


def test_shapes_that_change_under_a_mask_are_refused() -> None:
    model, graph = net()
    sc.mask_(graph, plan_of(graph, **{"0": (0, 3)}))
    model[2].weight = nn.Parameter(torch.rand(5, 6, dtype=torch.float64))
    with pytest.raises(PlanError, match=r"2\.weight changed its shape while masked"):
        sc.unmask_(graph)


@pytest.mark.parametrize("granularity", ["weight", "kernel"])
def test_masks_of_weights_and_kernels(granularity: str) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).double()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = float("inf")
    graph = sc.units(sc.trace(model, torch.rand(1, 2, 4, 4, dtype=torch.float64)), granularity)
    before = bits(model)
    first = graph.groups[0]
    plan = Plan(graph.fingerprint, ((first.name, first.units, tuple(range(1, first.units))),), granularity)
    sc.mask_(graph, plan)
    zeros = {k: int((v == 0).sum()) for k, v in bits(model).items()}
    assert sum(zeros.values()) == (1 if granularity == "weight" else 9)
    with pytest.raises(PlanError, match="can be masked, not cut out"):
        sc.compact(graph, plan)
    sc.unmask_(graph)
    assert same(before, bits(model))


def test_plans_for_another_graph_are_refused_and_nothing_is_masked() -> None:
    model, graph = net()
    before = bits(model)
    for plan, words in (
        (Plan("0123456789abcdef", ()), "the plan is for graph 0123456789abcdef, this graph is"),
        (Plan(graph.fingerprint, (("nobody", 4, (0,)),)), "no group is called 'nobody'; nearest:"),
        (Plan(graph.fingerprint, (("0", 7, (0,)),)), "has 4 units, the plan says 7"),
    ):
        with pytest.raises(PlanError, match=words):
            sc.mask_(graph, plan)
    assert same(before, bits(model))


def test_an_empty_plan_masks_nothing() -> None:
    model, graph = net()
    before = bits(model)
    assert same(before, bits(sc.mask_(graph, Plan(graph.fingerprint, ()))))
    assert np.array_equal(Plan(graph.fingerprint, ()).kept(graph), np.ones(graph.units + 1, dtype=bool))
