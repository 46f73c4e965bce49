"""Contribution: the worked example, the slow triple loop, sums to one, streams, and what a consumer may be."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.criteria import Contribution, Evidence, Random, Worst
from secateur.criteria.shares import Shares
from secateur.score import score
from secateur.types import Graph, Group, PlanError, Site

MEAN, TOP = Contribution(1, 0), Contribution(0, 1)
BOTH = {"contributions": MEAN, "contribution_max": TOP}


def triple(a: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """C_avg and C_max of every column of a (F, P) in |a| |w|^T, w (M, P), one share at a time."""
    shares = torch.zeros(len(a), len(w), a.shape[1], dtype=torch.float64)
    for f in range(len(a)):
        for j in range(len(w)):
            total = sum(abs(float(w[j, i])) * abs(float(a[f, i])) for i in range(a.shape[1]))
            for k in range(a.shape[1]):
                shares[f, j, k] = abs(float(w[j, k])) * abs(float(a[f, k])) / total if total else 0.0
    return shares.mean((0, 1)), shares.amax((0, 1))


def shares_of(module: nn.Module, value: Tensor, axis: int = 1) -> Tensor:
    """Shares (P, output elements) of each position of ``axis``: the module alone on one position after the other."""
    module = _bare(module)
    with torch.no_grad():
        whole = module(value.abs())
        alone = []
        for k in range(value.shape[axis]):
            one = torch.zeros_like(value)
            one.select(axis, k).copy_(value.abs().select(axis, k))
            alone.append(module(one))
    return torch.stack([torch.where(whole > 0, part / whole, 0).flatten() for part in alone])


def _bare(module: nn.Module) -> nn.Module:
    import copy

    bare = copy.deepcopy(module).double()
    for name, parameter in bare.named_parameters():
        parameter.data = torch.zeros_like(parameter) if name.endswith("bias") else parameter.data.abs()
    return bare


def consumer(module: nn.Module, positions: int, index: np.ndarray | None = None, axis: int = 1) -> Graph:
    """A graph with one group, whose units are the positions of the input of ``module``."""
    index = np.arange(positions)[:, None] if index is None else index
    group = Group("g", 0, len(index), "channel", (), sites=(Site("0", 0, axis, index),))
    return Graph(nn.Sequential(module), (), {}, (group,), {}, {}, (), "f", 1, 0.0)


def values_of(graph: Graph, batches: list[Tensor], name: str = "g") -> tuple[Tensor, Tensor]:
    pairs = [(x, torch.zeros(len(x))) for x in batches]
    found = [
        score(graph, kind, pairs, loss=lambda m, b: 0 * m(b[0]).sum()).values[name].double() for kind in (MEAN, TOP)
    ]
    return found[0], found[1]


def test_acceptance_05_the_worked_example() -> None:
    net = nn.Linear(2, 2, bias=False)
    net.weight.data = torch.tensor([[1.0, -2.0], [3.0, 1.0]])
    a = torch.tensor([[1.0, 1.0], [2.0, 0.0]])
    mean, top = values_of(consumer(net, 2), [a])
    assert mean.tolist() == pytest.approx([0.770833, 0.229167], abs=1e-6)
    assert top.tolist() == pytest.approx([1, 2 / 3], rel=1e-6)
    assert float(mean.sum()) == pytest.approx(1, rel=1e-6)
    for ours, slow in zip((mean, top), triple(a, net.weight.detach()), strict=True):
        assert ours.tolist() == pytest.approx(slow.tolist(), rel=1e-5)


def test_acceptance_05_silent_units_and_silent_outputs_have_zero_not_nan() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    net[0].weight.data.abs_()
    net[0].bias.data.abs_()
    net[0].weight.data[1], net[0].bias.data[1] = -1.0, -1.0  # negative on positive inputs: silent after the ReLU
    net[2].weight.data[0] = 0.0  # an output that nothing reaches
    graph = sc.trace(net, torch.rand(2, 3))
    (mean, top) = values_of(graph, [torch.rand(5, 3)], "0")
    assert mean[1] == top[1] == 0
    assert torch.isfinite(mean).all()
    assert float(mean.sum()) == pytest.approx(0.5, rel=1e-5)  # one of two outputs is reached
    assert values_of(graph, [torch.zeros(5, 3) - 50], "0")[0].isfinite().all()


def test_acceptance_05_the_product_form_is_the_triple_loop_on_random_networks() -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        p, m, f = (int(n) for n in torch.randint(2, 7, (3,)))
        net, a = nn.Linear(p, m), torch.randn(f, p).relu()
        for ours, slow in zip(values_of(consumer(net, p), [a]), triple(a, net.weight.detach()), strict=True):
            assert ours.tolist() == pytest.approx(slow.tolist(), rel=1e-5, abs=1e-9)


CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "strided, dilated": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2),
    "groups": lambda: nn.Conv2d(4, 6, (3, 1), groups=2, bias=False),
    "reflected": lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"),
    "same": lambda: nn.Conv2d(4, 3, 4, padding="same"),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, dilation=2),
    "transposed groups": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 3, 3)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("make", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
@pytest.mark.parametrize("tied", [False, True], ids=["single", "tied"])
def test_convolutions_agree_with_one_channel_at_a_time(make: Callable[[], nn.Module], tied: bool) -> None:
    torch.manual_seed(1)
    module, x = make(), torch.randn(3, 4, 7, 6).relu()
    index = np.array([[0, 3], [1, 2]]) if tied else np.arange(4)[:, None]
    bare = module
    if hasattr(module, "parametrizations"):
        bare = nn.Conv2d(4, 3, 3)
        bare.weight.data = module.weight.data
    want = shares_of(bare, x.double())[torch.as_tensor(index)].sum(1)
    mean, top = values_of(consumer(module, 4, index), [x[:2], x[2:]])
    assert mean.tolist() == pytest.approx(want.mean(1).tolist(), rel=1e-5)
    assert top.tolist() == pytest.approx(want.amax(1).tolist(), rel=1e-5)
    assert float(mean.sum()) == pytest.approx(float((want.sum(0) > 0).double().mean()), rel=1e-5)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d])
def test_other_dimensions_and_single_maps(kind: type) -> None:
    torch.manual_seed(0)
    module = kind(3, 4, 2)
    x = torch.rand(2, 3, *[4] * len(module.kernel_size))
    want = shares_of(module, x.double())
    assert values_of(consumer(module, 3), [x])[1].tolist() == pytest.approx(want.amax(1).tolist(), rel=1e-5)
    one = values_of(consumer(module, 3, axis=0), [x[0]])
    assert one[0].tolist() == pytest.approx(shares_of(module, x[:1].double()).mean(1).tolist(), rel=1e-5)


class Block(nn.Module):
    """Two branches into one sum, a pool, a norm, a concatenation, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.norm, self.side = nn.BatchNorm2d(4), nn.Conv2d(1, 3, 3)
        self.left, self.right = nn.Linear(28, 5), nn.Linear(28, 2)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        stem = self.stem(x).relu()
        summed = (stem + self.one(stem)).relu()
        inner = self.norm(summed)
        tail = torch.cat([self.two(inner).relu(), self.side(x).relu()], 1)
        return stem, inner, tail, nn.functional.max_pool2d(tail, 3).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        last = self.parts(x)[-1]
        return torch.cat([self.left(last), self.right(last)], 1)


def test_through_sums_norms_pools_and_concatenation() -> None:
    torch.manual_seed(0)
    net = Block().eval()
    net.norm.running_mean.uniform_()
    x = torch.randn(3, 1, 8, 8)
    graph = sc.trace(net, x)
    stem, inner, _, flat = (part.detach().double() for part in net.parts(x))
    one, two = shares_of(net.one, stem).mean(1), shares_of(net.two, inner).mean(1)
    groups = {name: group for group in graph.groups if group.prunable for name in (group.name,)}
    assert set(groups) == {"stem", "two", "side"}
    assert values_of(graph, [x], "stem")[0].tolist() == pytest.approx(((one + two) / 2).tolist(), rel=1e-5)
    heads = [shares_of(head, flat).unflatten(0, (7, 4)).sum(1) for head in (net.left, net.right)]
    mean = (5 * heads[0].mean(1) + 2 * heads[1].mean(1)) / 7  # the mean over all next units
    top = torch.maximum(heads[0].amax(1), heads[1].amax(1))
    found = [values_of(graph, [x[:1], x[1:]], name) for name in ("two", "side")]
    assert torch.cat([f[0] for f in found]).tolist() == pytest.approx(mean.tolist(), rel=1e-5)
    assert torch.cat([f[1] for f in found]).tolist() == pytest.approx(top.tolist(), rel=1e-5)
    assert float(sum(f[0].sum() for f in found)) == pytest.approx(1, rel=1e-5)  # all inputs of one consumer


def test_the_blend_is_linear_and_nothing_is_asked_that_is_not_needed() -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    graph, batch = sc.trace(net, torch.rand(2, 3)), (torch.rand(6, 3), torch.zeros(6, dtype=torch.int64))
    mean, top, blend = (score(graph, c, [batch]).values["0"] for c in (MEAN, TOP, Contribution(0.25, 2)))
    assert blend.allclose(0.25 * mean + 2 * top)
    assert MEAN.evidence == {"contributions"}
    assert TOP.evidence == {"contribution_max"}


def test_batches_and_their_order_do_not_matter() -> None:
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    x = torch.randn(8, 1, 8, 8)
    graph = sc.trace(net, x)
    for name in ("0", "2"):
        whole = values_of(graph, [x], name)
        parts = values_of(graph, [x[5:], x[:1], x[1:5]], name)
        for one, other in zip(whole, parts, strict=True):
            assert one.allclose(other, rtol=1e-5)


def test_a_part_of_the_samples_can_be_looked_at_in_any_pass() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    x = torch.randn(9, 1, 8, 8)
    graph = sc.trace(net, x)
    groups = [group for group in graph.groups if group.prunable]
    with Shares(graph, groups, frozenset(BOTH), every=4) as shares:
        net.train()(x).sum().backward()  # a step of training: the gradients are those of the model
    grads = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    net(x).sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, net.parameters(), strict=True))
    for group in groups:
        mean, top = values_of(graph, [x[[0, 4, 8]]], group.name)
        assert shares.read(group)["contributions"].allclose(mean, rtol=1e-5)
        assert shares.read(group)["contribution_max"].allclose(top, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_shares_do_not_depend_on_scale(scale: float) -> None:
    torch.manual_seed(0)
    for net, x in ((nn.Linear(3, 4, bias=False), torch.rand(5, 3)), (nn.Conv2d(3, 4, 2), torch.rand(2, 3, 4, 4))):
        plain = values_of(consumer(net, 3), [x])
        net.weight.data *= scale
        if net.bias is not None:
            net.bias.data.zero_()
        pairs = [(x * scale**0.25, None)]
        found = score(consumer(net, 3), MEAN, pairs, loss=lambda m, b: 0 * m(b[0]).sum()).values["g"]
        assert found.double().allclose(plain[0], rtol=1e-5)


def test_many_chunks_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    cases = [(nn.Conv2d(6, 4, 3, groups=2), torch.rand(5, 6, 5, 5)), (nn.Linear(6, 4), torch.rand(9, 6))]
    for net, x in cases:
        whole = values_of(consumer(net, 6), [x])
        monkeypatch.setattr("secateur.criteria.ratios.CHUNK", 7)
        assert all(a.allclose(b) for a, b in zip(whole, values_of(consumer(net, 6), [x]), strict=True))
        monkeypatch.undo()


def test_recurrent_layers_count_by_their_gates() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.read = nn.Linear(3, 5), nn.LSTM(5, 4, batch_first=True)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.read(self.embed(x).relu())[0][:, -1])

    torch.manual_seed(0)
    net = Reader()
    x = torch.randn(3, 6, 3)
    rows = net.embed(x).relu().detach().flatten(0, 1)
    graph = sc.trace(net, x)
    slow = triple(rows, net.read.weight_ih_l0.detach())
    for ours, want in zip(values_of(graph, [x], "embed"), slow, strict=True):
        assert ours.tolist() == pytest.approx(want.tolist(), rel=1e-4)


def test_groups_that_no_module_consumes_stay_whole() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 6), nn.Linear(6, 4)
            self.weight = nn.Parameter(torch.randn(2, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x).relu()).relu() @ self.weight.T

    graph = sc.trace(Raw(), torch.rand(2, 3))
    assert {g.name for g in graph.groups if g.prunable} == {"one", "two"}
    found = score(graph, Contribution(), [(torch.rand(4, 3), torch.zeros(4, dtype=torch.int64))])
    assert found.values.keys() == {"one"}
    assert "1 groups have no scores" in " ".join(sc.allocate(found, sc.Budget(units=0.5)).notes)


def test_the_pass_leaves_the_model_as_it_was_and_needs_data() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 6), nn.Flatten())
    x = torch.randn(4, 1, 8, 8)
    graph = sc.trace(net.train(), x)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    score(graph, Contribution(), [(x, torch.zeros(4, dtype=torch.int64))])
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert net.training
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_pre_hooks for m in net.modules())
    with pytest.raises(PlanError, match="needs data"):
        score(graph, Contribution())


def test_the_worst_control_is_the_order_turned_round() -> None:
    evidence = Evidence("g", torch.arange(5))
    assert torch.equal(Worst(Random(3))(evidence), -Random(3)(evidence))
    with pytest.raises(PlanError, match="not both 0"):
        Contribution(0, 0)
