"""The small model: what it keeps of its parent, its optimiser, size patches, cutting again."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.compact import LINEAGE, Surgery
from secateur.patch import Patch, SizedForward, put
from secateur.types import CheckpointError, PlanError, VerificationError


class Net(nn.Module):
    """A convolution tied to itself, a norm, and a head with sizes in its code."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.b(torch.relu(self.norm(self.a(x))))
        return self.head(x.mean((2, 3)))


class Fixed(nn.Module):
    """Sixteen is written in the code, and half of it too."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(6, 16), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.inp(x).view(-1, 2, 8).split(1, 1)
        return self.out(F.silu(a.reshape(-1, 8)) * b.reshape(-1, 8))


def image(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 6, 6)


def half(graph: Any, *names: str) -> sc.Plan:
    groups = [g for g in graph.groups if g.prunable and (not names or g.name in names)]
    return sc.Plan(graph.fingerprint, tuple((g.name, g.units, tuple(range(0, g.units, 2))) for g in groups))


def test_what_stays_as_it_was() -> None:
    model = Net().to(memory_format=torch.channels_last)
    model.norm.eval()
    model.b.bias.requires_grad_(False)
    seen: list[int] = []
    model.a.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    before = copy.deepcopy(model.state_dict())
    graph = sc.trace(model, image())
    seen.clear()
    small = sc.compact(graph, half(graph), verify=False)
    assert type(small) is Net
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert small.training
    assert not small.norm.training
    assert [n for n, p in small.named_parameters() if not p.requires_grad] == ["b.bias"]
    assert small.a.weight.is_contiguous(memory_format=torch.channels_last)
    assert (small.a.out_channels, small.norm.num_features, small.b.in_channels, small.head.in_features) == (8, 8, 8, 4)
    small(image(3))
    assert seen == [8]


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mid, self.head = nn.Embedding(9, 12), nn.Linear(12, 12), nn.Linear(12, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.mid(self.embed(x))))

    graph = sc.trace(Tied(), torch.randint(0, 9, (2, 4)))
    small = sc.compact(graph, half(graph))
    assert small.head.weight is small.embed.weight
    assert small.embed.embedding_dim == small.embed.weight.shape[1] == 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_type_of_the_weights_stays(dtype: torch.dtype) -> None:
    graph = sc.trace(Net().eval().to(dtype), image().to(dtype))
    assert {p.dtype for p in sc.compact(graph, half(graph)).parameters()} == {dtype}


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_the_optimiser_goes_on_where_it_was(kind: str) -> None:
    """A step of the small model with the carried state is the masked model's step at what stays."""
    torch.manual_seed(3)
    model = Net().eval()
    make = {"sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), "adam": lambda p: torch.optim.Adam(p, 0.01)}[kind]
    optimizer = make([{"params": [model.a.weight, model.a.bias]}, {"params": list(model.parameters())[2:], "lr": 0.02}])
    x = image(4)

    def step(net: nn.Module, opt: torch.optim.Optimizer) -> None:
        opt.zero_grad()
        net(x).square().sum().backward()
        opt.step()

    step(model, optimizer)
    graph = sc.trace(model, x)
    plan = half(graph, "a")
    small = sc.compact(graph, plan)
    carried = sc.compact_optimizer(optimizer, graph, small)
    assert [g["lr"] for g in carried.param_groups] == [g["lr"] for g in optimizer.param_groups]
    step(small, carried)
    sc.mask_(graph, plan)
    step(model, optimizer)
    kept = list(range(0, 16, 2))
    torch.testing.assert_close(small.a.weight, model.a.weight[kept])
    torch.testing.assert_close(small.norm.weight, model.norm.weight[kept])
    torch.testing.assert_close(small.b.weight, model.b.weight[:, kept])


def test_the_optimiser_needs_a_model_cut_here() -> None:
    model = Net()
    with pytest.raises(PlanError, match=r"call sc\.compact first"):
        sc.compact_optimizer(torch.optim.SGD(model.parameters(), 0.1), sc.trace(model, image()), Net())


def test_sizes_in_the_code_are_patched() -> None:
    model = Fixed().eval()
    graph = sc.trace(model, torch.randn(2, 6))
    small = sc.compact(graph, half(graph))
    assert type(small) is Fixed
    assert isinstance(vars(small)["forward"], SizedForward)
    assert small.inp.out_features < 16
    twin = copy.deepcopy(small)
    x = torch.randn(5, 6, requires_grad=True)
    torch.testing.assert_close(small(x), twin(x))
    twin(x).sum().backward()
    with torch.no_grad():
        twin.inp.weight.zero_()  # the copy runs on its own weights
    assert not torch.equal(small(x), twin(x))
    sc.mask_(graph, half(graph))
    torch.testing.assert_close(model(x), small(x))


def test_cutting_twice_is_cutting_once() -> None:
    model = Fixed().eval()
    x = torch.randn(2, 6)
    graph = sc.trace(model, x)
    (group,) = (g for g in graph.groups if g.prunable)
    kept = [0, 1, 3, 4, 6]
    first = sc.compact(graph, sc.Plan(graph.fingerprint, ((group.name, group.units, tuple(kept)),)))
    again = sc.trace(first, x)
    (rest,) = (g for g in again.groups if g.prunable)
    twice = sc.compact(again, sc.Plan(again.fingerprint, ((rest.name, rest.units, (0, 2, 3)),)))
    once = sc.compact(graph, sc.Plan(graph.fingerprint, ((group.name, group.units, (0, 3, 4)),)))
    assert torch.equal(once(x), twice(x))
    assert twice.__dict__[LINEAGE] == once.__dict__[LINEAGE]


def test_the_lineage_is_data() -> None:
    graph = sc.trace(Fixed(), torch.randn(2, 6))
    surgery = sc.compact(graph, half(graph)).__dict__[LINEAGE]
    assert Surgery.from_json(surgery.to_json()) == surgery
    with pytest.raises(CheckpointError, match="not one written by secateur"):
        Surgery.from_json('{"shapes": [1]}')


def test_a_plan_of_another_graph_is_refused() -> None:
    graph, other = sc.trace(Net(), image()), sc.trace(Fixed(), torch.randn(2, 6))
    with pytest.raises(PlanError, match="the plan is for graph"):
        sc.compact(graph, half(other))


def test_kernels_and_weights_are_masked_only() -> None:
    graph = sc.trace(Net(), image())
    with pytest.raises(PlanError, match="can be masked, not cut out"):
        sc.compact(graph, sc.Plan(graph.fingerprint, (), "kernel"))


def test_a_wrong_cut_is_noticed() -> None:
    graph = sc.trace(Net().eval(), image())
    plan = half(graph, "a")
    name, axes = "b.weight", graph.axes["b.weight"]
    ids = axes[1].copy()
    ids[:2] = ids[1::-1]  # the first two channels read in the wrong order
    graph.axes[name] = (axes[0], ids, *axes[2:])
    with pytest.raises(VerificationError, match=r"masked and compact differ .* after cutting a"):
        sc.compact(graph, plan)


def test_numbers_from_sizes_keep_their_meaning_and_numbers_from_data_move() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 15), nn.Linear(15, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.relu(self.a(x))
            h = h * (h.shape[-1] // 2) ** -0.5  # 7, not 7.5
            return self.b(h * float(h.detach().abs().max()))

    model = Scaled().eval()
    x = torch.randn(4, 6)
    graph = sc.trace(model, x)
    (group,) = (g for g in graph.groups if g.prunable)
    plan = sc.Plan(graph.fingerprint, ((group.name, 15, (1, 4, 5, 9, 12)),))
    small = sc.compact(graph, plan)
    sc.mask_(graph, plan)
    for inputs in (x, 3 * torch.randn(7, 6)):
        torch.testing.assert_close(model(inputs), small(inputs))


def test_a_refused_width_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.a(x)
            if h.shape[1] != 16:
                raise ValueError("sixteen or nothing")
            return self.b(torch.relu(h))

    x = torch.randn(2, 6)
    (frozen,) = (g for g in sc.trace(Strict(), x).groups if g.name == "a")
    assert "forward of 'Strict' cannot run with the new widths (ValueError: sixteen or nothing)" in (
        frozen.frozen or ""
    )
    monkeypatch.setattr("secateur.trial.foreign", lambda model: False)
    graph = sc.trace(Strict(), x)
    with pytest.raises(VerificationError, match="sixteen or nothing"):
        sc.compact(graph, half(graph))


def test_put_replaces_deep_inside() -> None:
    assert put(({"a": [1, 2]}, 3), (0, "a", 1), 9) == ({"a": [1, 9]}, 3)
    assert put((slice(0, 4), 1), (0, "stop"), 2) == (slice(0, 2), 1)
    with pytest.raises(VerificationError, match="compact the model again"):
        put(5, (0,), 1)


def test_patches_are_values() -> None:
    a, b = (Patch("m", 0, "view", (((0, 1), n),)) for n in (4, 4))
    assert a == b


def test_state_goes_through_a_file() -> None:
    graph = sc.trace(Fixed(), torch.randn(2, 6))
    small, other = (sc.compact(graph, half(graph)) for _ in range(2))
    buffer = io.BytesIO()
    torch.save(small.state_dict(), buffer)
    buffer.seek(0)
    with torch.no_grad():
        other.inp.weight.zero_()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(2, 6)
    assert torch.equal(small(x), other(x))


@pytest.mark.parametrize("keep", [0.5, sc.Budget(params=0.4)])
def test_prune_in_one_line(keep: Any) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5)
    )
    small = sc.prune(model, image(), keep=keep)
    assert small(image(3)).shape == (3, 5)
    count = [sum(p.numel() for p in m.parameters()) for m in (small, model)]
    assert np.divide(*count) < 0.65
    assert [m.out_channels % 8 for m in small if isinstance(m, nn.Conv2d)] == [0, 0]


def test_a_patch_outlives_the_units_it_was_for() -> None:
    """Cut to a single hidden unit, the zeros of the first state have no units; their patch stays in a second cut."""

    class Unrolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.cell, self.out = nn.Linear(5, 8), nn.GRUCell(8, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x, state = torch.relu(self.inp(x)), x.new_zeros(x.shape[0], 4)
            for k in range(x.shape[1]):
                state = self.cell(x[:, k], state)
            return self.out(state)

    x = torch.randn(2, 6, 5)
    graph = sc.trace(Unrolled().eval(), x)
    (cell,) = (g for g in graph.groups if g.prunable and g.units == 4)
    small = sc.compact(graph, sc.Plan(graph.fingerprint, ((cell.name, 4, (2,)),)))
    again = sc.trace(small, x)
    smaller = sc.compact(again, half(again, "inp"))
    assert (smaller.inp.out_features, smaller.cell.weight_hh.shape) == (4, (3, 1))
