"""Scores: the fast probes against slow loops, the identities they rest on, and what a pass must not touch."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from handmade import data, small_graph, without_sites
from secateur.criteria import Costed, Criterion, Evidence, Fisher, Magnitude, Random, Taylor
from secateur.criteria.evidence import unit_slices
from secateur.criteria.gather import unwatched
from secateur.measure import counts
from secateur.score import cross_entropy, score
from secateur.types import Graph, Group, Member, PlanError, Site

SIGNALS = (Taylor(), Taylor("elementwise"), Fisher())


class Seen(Criterion):
    """Keeps the evidence, to look at it."""

    name = "seen"
    wants = frozenset({"unit_grads", "unit_grads_abs", "activations"})

    @property
    def evidence(self) -> frozenset[str]:
        return self.wants

    def __call__(self, evidence: Evidence) -> Tensor:
        kept[evidence.group] = evidence
        return torch.zeros(len(evidence.ids))


kept: dict[str, Evidence] = {}


def seen(graph: Graph, *args, **kwargs) -> dict[str, Evidence]:
    kept.clear()
    score(graph, Seen(), *args, **kwargs)
    return dict(kept)


UNITS = {"conv1": 8, "conv2": 6, "fc": 12}


def slow(net: nn.Sequential, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return group -> a * g (samples, units, positions), one sample at a time, by plain autograd."""
    found: dict[str, list[Tensor]] = {name: [] for name in UNITS}
    for image, label in zip(images, labels, strict=True):
        values = [image[None]]
        for layer in net:
            values.append(layer(values[-1]))
        consumed = {"conv1": values[3], "conv2": values[5], "fc": values[8]}
        loss = nn.functional.cross_entropy(values[-1], label[None])
        grads = torch.autograd.grad(loss, list(consumed.values()))
        for (name, a), g in zip(consumed.items(), grads, strict=True):
            found[name].append((a * g).detach().reshape(UNITS[name], -1))
    return {name: torch.stack(samples) for name, samples in found.items()}


def test_probes_agree_with_one_sample_at_a_time() -> None:
    graph = small_graph()
    x, y = data()
    got = seen(graph, [(x[:5], y[:5]), (x[5:], y[5:])])
    for name, products in slow(graph.model, x, y).items():
        assert got[name].unit_grads.allclose(products.sum(2), rtol=1e-4, atol=1e-7)
        assert got[name].unit_grads_abs.allclose(products.abs().sum(2), rtol=1e-4, atol=1e-7)
        assert set(got[name].positions.tolist()) == {products.shape[2]}
    hidden = graph.model[:3](x).detach()
    assert got["conv1"].activations.allclose(hidden.abs().mean((2, 3)), rtol=1e-5)


def test_a_module_that_is_used_twice_is_seen_twice() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read = nn.Linear(4, 2)

        def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
            return self.read(pair[0]) * 2 - self.read(pair[1])

    group = Group("g", 0, 4, "neuron", (), sites=(Site("read", 0, 1, np.arange(4)[:, None]),))
    graph = Graph(Siamese(), (), {}, (group,), {}, {}, (), "f", 1, 0.0)
    pair, y = (
        (torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)),
        torch.tensor([0, 1, 1]),
    )
    nn.functional.cross_entropy(graph.model(pair), y, reduction="sum").backward()
    want = sum((x * x.grad).detach() for x in pair)
    got = seen(graph, [(tuple(x.detach() for x in pair), y)])["g"]
    assert got.unit_grads.allclose(want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("criterion", SIGNALS, ids=repr)
def test_scores_do_not_depend_on_reduction_order_or_batches(criterion: Criterion) -> None:
    graph = small_graph()
    x, y = data()
    whole = score(graph, criterion, [(x, y)]).values
    order = torch.randperm(8)
    summed = {
        "loss": lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1], reduction="sum"),
        "reduction": "sum",
    }
    each = {"loss": lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1], reduction="none")}
    ways = [
        score(graph, criterion, [(x[:5], y[:5]), (x[5:], y[5:])]),
        score(graph, criterion, [(x[order], y[order])]),
        score(graph, criterion, [(x[i : i + 1], y[i : i + 1]) for i in range(8)]),
        score(graph, criterion, [(x[:5], y[:5]), (x[5:], y[5:])], **summed),
        score(graph, criterion, [(x[:3], y[:3]), (x[3:], y[3:])], **each),
    ]
    for values in (way.values for way in ways):
        for name in whole:
            assert values[name].allclose(whole[name], rtol=1e-4, atol=1e-9), name


def test_taylor_is_the_gradient_of_a_gate_on_the_unit() -> None:
    graph = small_graph()
    x, y = data()
    net = graph.model
    gate = torch.ones(8, requires_grad=True)
    hidden = net[2](net[1](net[0](x))) * gate[None, :, None, None]
    nn.functional.cross_entropy(net[3:](hidden), y, reduction="sum").backward()
    assert seen(graph, [(x, y)])["conv1"].unit_grads.sum(0).allclose(gate.grad, rtol=1e-4, atol=1e-7)


def test_fisher_ranks_units_like_the_truth_where_the_loss_is_quadratic() -> None:
    # linear after the gate, squared loss, converged: the residual is noise that no unit explains
    torch.manual_seed(0)
    samples, width = 4000, 12
    features = torch.randn(samples, width) * torch.linspace(0.2, 3, width)[torch.randperm(width)]
    readout = nn.Linear(width, 1, bias=False)
    target = features @ torch.randn(width, 1) + torch.randn(samples, 1)
    solution = torch.linalg.lstsq(features, target).solution
    readout.weight.data.copy_(solution.T)
    group = Group("units", 0, width, "neuron", (), sites=(Site("0", 0, 1, np.arange(width)[:, None]),))
    graph = Graph(nn.Sequential(readout), (features,), {}, (group,), {}, {}, (), "linear", 1, 0.0)
    loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean() / 2  # noqa: E731
    fisher = score(graph, Fisher(), [(features, target)], loss=loss).values["units"]
    base = loss(graph.model, (features, target))
    truth = torch.stack(
        [loss(graph.model, (features * (torch.arange(width) != c), target)) - base for c in range(width)]
    )
    ranks = torch.stack([fisher, truth.detach()]).argsort(1).argsort(1).double()
    assert float(torch.corrcoef(ranks)[0, 1]) >= 0.9


def test_a_group_without_sites_uses_the_weight_identity() -> None:
    graph = small_graph()
    x, y = data()
    bare = without_sites(graph)
    single = [(x[i : i + 1], y[i : i + 1]) for i in range(8)]
    for name, evidence in seen(graph, single).items():
        kept_sums = evidence.unit_grads
        assert sums_of(bare, single)[name].allclose(kept_sums, rtol=1e-3, atol=1e-7)  # exact for one sample
    batch = sums_of(bare, [(x, y)])
    for name, evidence in seen(graph, [(x, y)]).items():
        assert batch[name].allclose(evidence.unit_grads.mean(0).expand(8, -1), rtol=1e-3, atol=1e-7)


def sums_of(graph: Graph, batches: list) -> dict[str, Tensor]:
    kept.clear()
    criterion = type("Sums", (Seen,), {"wants": frozenset({"unit_grads"})})()
    score(graph, criterion, batches)
    return {name: evidence.unit_grads for name, evidence in kept.items()}


def test_a_group_without_consumers_falls_back_on_its_producers() -> None:
    net = nn.Linear(3, 4, bias=False)
    member = Member("weight", 0, np.arange(4)[:, None], "out")
    graph = Graph(net, (), {}, (Group("g", 0, 4, "neuron", (member,)),), {}, {}, (), "f", 1, 0.0)
    x, y = torch.randn(1, 3), torch.tensor([2])
    output = net(x)
    (grad,) = torch.autograd.grad(nn.functional.cross_entropy(output, y), output)
    assert sums_of(graph, [(x, y)])["g"].allclose(output * grad, rtol=1e-4)


@pytest.mark.parametrize("sites", [True, False])
def test_the_pass_leaves_everything_as_it_was(sites: bool) -> None:
    graph = small_graph() if sites else without_sites(small_graph())
    net = graph.model
    net.train()
    net[1].eval()
    net.append(nn.Dropout(0.5))
    net[3].weight.requires_grad_(False)
    net[0].weight.grad = torch.ones_like(net[0].weight)
    net[6].register_forward_hook(lambda module, args, output: output + 0 * net[1].running_mean.add_(1).sum())
    before = copy.deepcopy(net.state_dict())
    modes = [module.training for module in net.modules()]
    random = torch.get_rng_state()
    hooks = sum(len(module._forward_pre_hooks) for module in net.modules())
    draw = lambda model, batch: cross_entropy(model, batch) + 0 * torch.rand(()).sum()  # noqa: E731
    with torch.no_grad():
        values = score(graph, Fisher(), [data()], loss=draw).values
    assert all(float(v.max()) > 0 for v in values.values())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert net[0].weight.grad.eq(1).all()
    assert [p.grad is None for p in net.parameters()].count(False) == 1
    assert not net[3].weight.requires_grad
    assert net[6].weight.requires_grad
    assert sum(len(module._forward_pre_hooks) for module in net.modules()) == hooks


def test_an_error_inside_the_pass_also_restores_the_model() -> None:
    graph = small_graph()
    graph.model.train()

    def failing(model: nn.Module, batch: object) -> Tensor:
        raise ValueError("from the user's loss")

    with pytest.raises(ValueError, match="user's loss"):
        score(graph, Fisher(), [data()], loss=failing)
    assert graph.model.training
    assert not any(module._forward_pre_hooks for module in graph.model.modules())


def test_a_fully_frozen_model_can_be_scored() -> None:
    graph, live = small_graph(), small_graph()
    graph.model.requires_grad_(False)
    assert not any(p.requires_grad for p in graph.model.parameters())
    for name, values in score(live, Taylor(), [data()]).values.items():
        assert score(graph, Taylor(), [data()]).values[name].allclose(values)


class Layouts(nn.Module):
    """The same units as (n, c), (n, t, c), (t, n, c), (n * windows, t, c), (n, c, t), by keyword, ..."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.ModuleDict(
            {k: nn.Linear(6, 2) for k in ("flat", "tokens", "sequence", "windows", "keyword", "twice")}
        )
        self.conv = nn.Conv1d(6, 2, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:  # (n, 4, 6)
        n = len(x)
        total = self.read["flat"](x[:, 0]) + self.read["tokens"](x).sum(1)
        total = total + self.read["sequence"](x.transpose(0, 1)).sum(0)
        total = total + self.read["windows"](x.reshape(n * 2, 2, 6)).reshape(n, 4, 2).sum(1)
        total = total + self.conv(x.transpose(1, 2)).sum(2) + self.read["keyword"](input=x).sum(1)
        total = total + self.read["twice"](x[:, 0]) + self.read["twice"](x[:, 1])
        return total + self.relu(x - 0.5).sum((1, 2)).outer(torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize(
    ("module", "axis"),
    [
        ("flat", 1),
        ("tokens", 2),
        ("sequence", 2),
        ("windows", 2),
        ("conv", 1),
        ("keyword", 2),
        ("twice", 1),
        ("relu", 2),
    ],
)
def test_samples_are_told_apart_in_every_layout(module: str, axis: int) -> None:
    torch.manual_seed(0)
    net = Layouts()
    path = module if module in ("conv", "relu") else f"read.{module}"
    group = Group("g", 0, 3, "channel", (), sites=(Site(path, 0, axis, np.arange(6).reshape(3, 2)),))
    graph = Graph(net, (), {}, (group,), {}, {}, (), "f", 1, 0.0)
    x, y = torch.randn(5, 4, 6), torch.randint(0, 2, (5,))
    together = seen(graph, [(x, y)])["g"]
    apart = seen(graph, [(x[i : i + 1], y[i : i + 1]) for i in range(5)])["g"]
    assert together.unit_grads.abs().amax(0).min() > 0  # every unit has something to say
    for name in ("unit_grads", "unit_grads_abs", "activations", "positions"):
        assert getattr(together, name).allclose(getattr(apart, name), rtol=1e-4, atol=1e-7), name


def test_samples_that_cannot_be_told_apart_count_with_their_mean() -> None:
    class Routed(nn.Module):
        """A token dispatcher: the expert sees some tokens of the whole batch."""

        def __init__(self) -> None:
            super().__init__()
            self.expert = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            rows = x.flatten(0, 1)
            chosen = torch.arange(len(rows)) % 3 == 0
            out = rows.new_zeros(len(rows), 2)
            out[chosen] = self.expert(rows[chosen])
            return out.reshape(*x.shape[:2], 2).sum(1)

    torch.manual_seed(0)
    group = Group("g", 0, 6, "neuron", (), sites=(Site("expert", 0, 1, np.arange(6)[:, None]),))
    graph = Graph(Routed(), (), {}, (group,), {}, {}, (), "f", 1, 0.0)
    x, y = torch.randn(5, 4, 6), torch.randint(0, 2, (5,))
    rows = seen(graph, [(x, y)])["g"].unit_grads
    assert rows.shape == (5, 6)
    assert rows.eq(rows[0]).all()
    hidden = x.clone().requires_grad_()
    nn.functional.cross_entropy(graph.model(hidden), y).backward()
    assert rows[0].allclose((hidden * hidden.grad).detach().sum((0, 1)), rtol=1e-4, atol=1e-7)


def test_several_sites_are_summed_per_sample_before_abs_and_square() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 2, bias=False), nn.Linear(4, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    net = Two()
    net.b.weight.data.copy_(-net.a.weight)  # what one consumer adds, the other takes away
    index = np.arange(4)[:, None]
    group = Group("g", 0, 4, "neuron", (), sites=(Site("a", 0, 1, index), Site("b", 0, 1, index)))
    graph = Graph(net, (), {}, (group,), {}, {}, (), "f", 1, 0.0)
    batch = (torch.randn(3, 4), torch.randint(0, 2, (3,)))
    assert score(graph, Fisher(), [batch]).values["g"].max() < 1e-12
    assert score(replace_sites(graph, 1), Fisher(), [batch]).values["g"].min() > 1e-6


def replace_sites(graph: Graph, count: int) -> Graph:
    return replace(graph, groups=tuple(replace(g, sites=g.sites[:count]) for g in graph.groups))


class Mixed(nn.Module):
    """One consumer is a module, the other a raw weight in a function."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2, bias=False)
        self.raw = nn.Parameter(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + nn.functional.linear(x, self.raw)


def test_consumers_without_a_site_add_their_weight_identity() -> None:
    index = np.arange(4)[:, None]
    members = (Member("layer.weight", 1, index, "in"), Member("raw", 1, index, "in"))
    group = Group("g", 0, 4, "neuron", members, sites=(Site("layer", 0, 1, index),))
    graph = Graph(Mixed(), (), {}, (group,), {}, {}, (), "f", 1, 0.0)
    assert [member.tensor for member in unwatched(graph, group)] == ["raw"]
    x, y = torch.randn(5, 4, requires_grad=True), torch.tensor([0, 1, 1, 0, 1])
    nn.functional.cross_entropy(graph.model(x), y, reduction="sum").backward()
    for batches in ([(x.detach(), y)], [(x.detach()[i : i + 1], y[i : i + 1]) for i in range(5)]):
        rows = sums_of(graph, batches)["g"]
        assert rows.sum(0).allclose((x * x.grad).detach().sum(0), rtol=1e-4, atol=1e-6)
    assert rows.allclose((x * x.grad).detach(), rtol=1e-4, atol=1e-6)  # exact one sample at a time
    tied = replace(graph, aliases={"layer.weight": "raw"})
    assert unwatched(tied, group) == []  # the raw weight is the layer's own, under another name


def test_a_unit_that_did_not_run_in_a_batch_counts_as_zero() -> None:
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.expert = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.read(x) + (self.expert(x) if x.sum() > 0 else 0)

    index = np.arange(4)[:, None]
    group = Group("g", 0, 4, "neuron", (), sites=(Site("expert", 0, 1, index),))
    graph = Graph(Expert(), (), {}, (group,), {}, {}, (), "f", 1, 0.0)
    on, off, y = torch.rand(3, 4), -torch.rand(3, 4), torch.tensor([0, 1, 1])
    alone = score(graph, Fisher(), [(on, y)]).values["g"]
    assert score(graph, Fisher(), [(on, y), (off, y)]).values["g"].allclose(alone / 2)
    with pytest.raises(PlanError, match="applies to none"):
        score(graph, Fisher(), [(off, y)])


@pytest.mark.parametrize("name", ["resnet18", "swin_t", "vit_b_32", "shufflenet_v2_x0_5", "densenet121"])
def test_rows_of_traced_networks_sum_to_the_weight_identity(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    net = torchvision.models.get_model(name).eval()
    nn.init.normal_([m for m in net.modules() if isinstance(m, nn.Linear)][-1].weight, std=0.02)  # ViT's is zero
    x, y = torch.randn(2, 3, *[224 if name == "vit_b_32" else 64] * 2), torch.tensor([3, 5])
    graph = sc.trace(net, x)
    rows = sums_of(graph, [(x, y)])
    tensors = dict(net.named_parameters())
    loss = nn.functional.cross_entropy(net(x), y, reduction="sum")
    grads = dict(zip(tensors, torch.autograd.grad(loss, list(tensors.values())), strict=True))
    checked = 0
    for group in graph.groups:
        consumers = [m for m in group.members if m.role == "in" and m.tensor in tensors]
        if group.prunable and consumers:
            slices = [unit_slices(m, (tensors[m.tensor] * grads[m.tensor]).detach()) for m in consumers]
            want, size = sum(s.sum(1) for s in slices), sum(s.abs().sum(1) for s in slices)
            assert float(((rows[group.name].sum(0) - want).abs() / size.max()).max()) < 1e-3, group.name
            checked += 1
    assert checked > 10


def test_batches_of_any_form_with_a_loss() -> None:
    graph = small_graph()
    x, y = data()
    want = score(graph, Fisher(), [(x, y)]).values["fc"]
    by_dict = lambda model, batch: nn.functional.cross_entropy(model(batch["x"]), batch["y"])  # noqa: E731
    assert score(graph, Fisher(), [{"x": x, "y": y}], loss=by_dict).values["fc"].allclose(want)
    wrapped = lambda model, batch: cross_entropy(lambda v: SimpleNamespace(logits=model(v)), batch)  # noqa: E731
    assert score(graph, Fisher(), [(x, y)], loss=wrapped).values["fc"].allclose(want)
    stopped = score(graph, Fisher(), [(x[:4], y[:4]), (x[4:], y[4:])], samples=4).values["fc"]
    assert stopped.allclose(score(graph, Fisher(), [(x[:4], y[:4])]).values["fc"])


def test_costs_are_the_fractions_that_one_unit_saves() -> None:
    graph = small_graph()
    keep = np.ones(graph.units + 1, dtype=bool)
    keep[graph.group("conv2").offset] = False
    saved = {"macs": 1 - counts.macs(graph, keep) / counts.macs(graph)}
    saved["params"] = 1 - counts.params(graph, keep) / counts.params(graph)
    plain = score(graph, Random()).values["conv2"]
    for kind, fraction in saved.items():
        costed = score(graph, Costed(Random(), **{kind: 2.0})).values["conv2"]
        assert (plain - costed).tolist() == pytest.approx([2 * fraction] * 6, rel=1e-4)


def test_only_prunable_groups_are_scored() -> None:
    assert set(score(small_graph(), Magnitude()).values) == {"conv1", "conv2", "fc"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: score(g, Taylor()), "needs data"),
        (lambda g: score(g, Taylor(), []), "empty"),
        (lambda g: score(g, Taylor(), [data()], reduction="max"), "mean, sum"),
        (lambda g: score(g, Taylor(), [{"x": data()[0]}]), "default loss"),
        (lambda g: score(g, Taylor(), [(data()[0] * float("nan"), data()[1])]), "loss of batch 0 is nan"),
        (lambda g: score(replace(g, groups=g.groups[3:]), Magnitude()), "applies to none"),
        (lambda g: score(g, Taylor(), [3], loss=lambda m, b: m(data()[0]).sum()), "no tensor"),
    ],
)
def test_user_errors_are_plan_errors(call, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        call(small_graph())


def test_hand_made_and_traced_graphs_give_the_same_scores() -> None:
    hand = small_graph()
    traced = sc.trace(hand.model, torch.zeros(2, 3, 4, 4))
    for criterion in (Magnitude(1), *SIGNALS):
        mine = score(hand, criterion, [data()]).values
        theirs = score(traced, criterion, [data()]).values
        for a, b in zip(mine.values(), theirs.values(), strict=True):
            assert a.allclose(b, rtol=1e-4, atol=1e-9)
