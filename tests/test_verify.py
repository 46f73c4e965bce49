"""The proofs: what is permuted, that a wrong grouping fails, and that the model is unchanged afterwards."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.graph import verify as proofs
from secateur.types import Graph, Group, Plan, VerificationError


def slow_order(ids: np.ndarray, target: np.ndarray) -> list[int]:
    """The j-th position of unit u reads the j-th position of the unit that takes its place."""
    out = []
    for unit in ids.tolist():
        if unit < 0 or target[unit] == unit:
            out.append(None)
        else:
            mine = [k for k, other in enumerate(ids.tolist()) if other == unit]
            theirs = [k for k, other in enumerate(ids.tolist()) if other == target[unit]]
            out.append(dict(zip(mine, theirs, strict=True)))
    return [k if step is None else step[k] for k, step in enumerate(out)]


@pytest.mark.parametrize("seed", range(50))
def test_the_order_of_positions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    units, times = int(rng.integers(1, 7)), int(rng.integers(1, 4))
    ids = rng.permutation(np.r_[np.repeat(np.arange(units), times), np.full(rng.integers(0, 3), -1)])
    target = np.r_[rng.permutation(units), units]
    order = proofs._order(ids, target)
    expected = slow_order(ids, target)
    assert (list(range(len(ids))) if order is None else order.tolist()) == expected


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_no_unit_keeps_its_place(n: int) -> None:
    moved = [proofs._derangement(n, np.random.default_rng(seed)) for seed in range(50)]
    assert all(sorted(order.tolist()) == list(range(n)) for order in moved)
    assert all((order != np.arange(n)).all() for order in moved)


def network() -> tuple[nn.Module, Graph]:
    """A fresh network: batch norms all one, biases zero: nothing that a wrong permutation would betray."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)
    )
    for p in net.parameters():
        if p.dim() == 1:
            nn.init.zeros_(p) if p.shape[0] != 6 else None
    return net, sc.trace(net, torch.rand(2, 3, 6, 6))


def test_every_prunable_group_has_its_row() -> None:
    _, graph = network()
    proof = sc.verify(graph)
    assert [(r.group, r.kind, r.ok) for r in proof.rows] == [("0", "permutation", True), ("3", "permutation", True)]
    assert proof.ok
    assert all(0 <= r.error <= r.tolerance for r in proof.rows)
    assert [r.group for r in sc.verify(graph, ["3"]).rows] == ["3"]
    assert sc.verify(graph, joint=True).ok
    assert "permutation" in str(proof)
    assert "FAILED" not in str(proof)


def without(graph: Graph, tensor: str, axis: int) -> Graph:
    """The graph of a rule that forgot one slice."""
    axes = dict(graph.axes)
    axes[tensor] = tuple(None if k == axis else ids for k, ids in enumerate(axes[tensor]))
    return replace(graph, axes=axes)


SLICES = [
    ("0.weight", 0), ("0.bias", 0), ("1.weight", 0), ("1.bias", 0), ("1.running_mean", 0), ("1.running_var", 0),
    ("3.weight", 1), ("3.weight", 0), ("3.bias", 0), ("6.weight", 1),
]  # fmt: skip


@pytest.mark.parametrize(("tensor", "axis"), SLICES)
def test_each_forgotten_slice_is_caught(tensor: str, axis: int) -> None:
    net, graph = network()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    broken = without(graph, tensor, axis)
    wrong = [row.group for row in sc.verify(broken).rows if not row.ok]
    assert wrong == ["3" if (tensor, axis) in SLICES[7:] else "0"]
    assert not sc.verify(broken, joint=True).ok
    assert "FAILED" in str(sc.verify(broken))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize(("tensor", "axis"), [s for s in SLICES if s[0] not in ("0.bias", "3.bias")])
def test_compact_refuses_or_shows_each_forgotten_slice(tensor: str, axis: int) -> None:
    """Masked and compact differ, or the small model cannot run: never a silent wrong model."""
    _, graph = network()
    broken = without(graph, tensor, axis)
    plan = Plan(graph.fingerprint, (("0", 6, (1, 2, 5)), ("3", 4, (0, 3))))
    with pytest.raises((VerificationError, RuntimeError)):
        sc.compact(broken, plan)


def test_a_wrong_tie_is_caught() -> None:
    """Two units of the flattened layer that were mixed up."""
    _, graph = network()
    first, second = graph.axes["6.weight"]
    assert second is not None
    mixed = second.copy()
    mixed[[0, -1]] = mixed[[-1, 0]]
    broken = replace(graph, axes={**graph.axes, "6.weight": (first, mixed)})
    assert [r.group for r in sc.verify(broken).rows if not r.ok] == ["3"]
    with pytest.raises(VerificationError, match=r"masked and compact differ by .* after cutting 3; freeze the group"):
        sc.compact(broken, Plan(graph.fingerprint, (("3", 4, (0, 1)),)))


def test_the_proof_leaves_no_trace() -> None:
    net, graph = network()
    net.train()
    net[1].eval()
    before, version = {k: v.clone() for k, v in net.state_dict().items()}, [id(p) for p in net.parameters()]
    generator = torch.random.get_rng_state()
    sc.verify(graph)
    sc.verify(graph, joint=True)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert version == [id(p) for p in net.parameters()]
    assert [m.training for m in net.children()] == [True, False, *[True] * 5]
    assert torch.equal(torch.random.get_rng_state(), generator)


def test_restored_when_the_model_fails_half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    net, graph = network()
    before, calls = {k: v.clone() for k, v in net.state_dict().items()}, []
    run = proofs.outputs

    def fails(model: nn.Module, graph: Graph) -> list[Tensor]:
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError
        return run(model, graph)

    monkeypatch.setattr(proofs, "outputs", fails)
    with pytest.raises(ZeroDivisionError):
        sc.verify(graph)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_distance() -> None:
    one, two = torch.tensor([1.0, -4.0]), torch.tensor([1.0, -4.4])
    nan = torch.tensor([float("nan"), 2.0])
    assert proofs.distance([one], [one]) == 0
    assert proofs.distance([one], [two]) == pytest.approx(0.1)
    assert proofs.distance([one, one], [one]) == float("inf")
    assert proofs.distance([one], [one[None]]) == float("inf")
    assert proofs.distance([one], [nan]) == float("inf")
    assert proofs.distance([nan], [nan]) == 0
    assert proofs.distance([torch.tensor([float("inf")])], [torch.tensor([-float("inf")])]) == float("inf")
    assert proofs.distance([], []) == 0
    assert proofs.distance([torch.zeros(0)], [torch.zeros(0)]) == 0
    assert proofs.distance([torch.zeros(2)], [torch.full((2,), 1e-3)]) > 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_models_of_every_float_type(dtype: torch.dtype) -> None:
    net, _ = network()
    graph = sc.trace(net.to(dtype), torch.rand(2, 3, 6, 6).to(dtype))
    proof = sc.verify(graph)
    assert proof.ok
    assert {r.tolerance for r in proof.rows} <= {proofs.TOLERANCE[dtype], 1e-10}
    small = sc.compact(graph, Plan(graph.fingerprint, (("0", 6, (1, 2, 5)),)))
    assert {p.dtype for p in small.parameters()} == {dtype}


def test_a_float32_group_is_judged_again_in_float64() -> None:
    """Sums of huge and tiny numbers: float32 rounding exceeds the tolerance although the grouping is right."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 64), nn.Linear(64, 2))
    with torch.no_grad():
        net[0].weight[::2] *= 1e4
        net[1].weight[:, 1::2] *= 1e4
        net[2].weight.mul_(1.0)
        net[2].weight -= net[2].weight.mean(1, keepdim=True)
    graph = sc.trace(net, torch.rand(3, 4))
    judged = {r.tolerance for r in sc.verify(graph).rows}
    assert sc.verify(graph).ok
    assert judged <= {1e-5, 1e-10}


class Twisted(nn.Module):
    """A flip tied to itself and then rolled: no exchange of whole units, yet they can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.c(h + h.flip(1) + torch.roll(self.b(h), 1, 1))


def test_units_without_a_common_order_are_proved_by_cutting() -> None:
    torch.manual_seed(0)
    graph = sc.trace(Twisted(), torch.rand(4, 3))
    (row,) = sc.verify(graph).rows
    assert (row.kind, row.ok) == ("compact", True)
    broken = without(graph, "b.weight", 0)
    assert not any(row.ok for row in sc.verify(broken).rows)


def test_inexact_groups_need_only_run() -> None:
    net = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    graph = sc.trace(net, torch.rand(2, 3))
    (group,) = [g for g in graph.groups if g.prunable]
    assert (group.exact, sc.verify(graph).ok) == (False, True)
    small = sc.compact(graph, Plan(graph.fingerprint, ((group.name, 6, (0, 4)),)))
    assert small[1].normalized_shape == (2,)


def test_a_model_that_returns_no_number_cannot_be_judged_wrong() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x))).argmax(-1)

    graph = sc.trace(Words(), torch.rand(2, 3))
    names = [g.name for g in graph.groups if isinstance(g, Group) and g.prunable]
    assert "a" in names
    assert sc.verify(graph).ok


class Chaos(nn.Module):
    """A logistic map: after sixty steps no digit of the input is left."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.w = nn.Linear(4, 300), nn.Parameter(torch.randn(3, 300))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.sigmoid((torch.relu(self.a(x))[:, None] * self.w).sum(-1))
        for _ in range(80):
            y = 3.99 * y * (1 - y)
        return y


def test_a_chaotic_model_is_not_called_wrong_for_its_rounding() -> None:
    graph = sc.trace(Chaos().eval(), torch.randn(3, 4))
    group = graph.group("a")
    assert group.prunable
    small = sc.compact(graph, Plan(graph.fingerprint, (("a", 300, tuple(range(0, 300, 7))),)))
    assert small.a.out_features == 43
