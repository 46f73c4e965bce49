"""Fold: idle and constant units go exactly, or stay and say why."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import secateur as sc
from secateur.fold import fold


def kill(model: nn.Module, share: float = 0.4, seed: int = 0) -> nn.Module:
    """Random norms and biases, and whole filters and whole inputs of random convolutions zeroed."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(torch.randn(module.num_features, generator=rng))
                module.running_var.copy_(torch.rand(module.num_features, generator=rng) + 0.5)
                module.weight.copy_(torch.randn(module.num_features, generator=rng))
                module.bias.copy_(torch.randn(module.num_features, generator=rng))
            if isinstance(module, nn.Conv2d):
                out, into = module.weight.shape[:2]
                module.weight[torch.rand(out, generator=rng) < share] = 0
                module.weight[:, torch.rand(into, generator=rng) < share / 2 * (into > 1)] = 0
    return model.eval()


def same(model: nn.Module, small: nn.Module, shape: tuple[int, ...]) -> bool:
    x = 3 * torch.randn(5, *shape)
    with torch.no_grad():
        a, b = model(x), small.eval()(x)
    return bool((a - b).abs().max() <= 1e-5 * a.abs().max().clamp_min(1e-6))


@pytest.mark.parametrize(
    ("name", "arguments", "shape"),
    [
        ("vgg", {"depth": 11, "width": 0.125}, (3, 16, 16)),
        ("resnet20", {"width": 4}, (3, 16, 16)),
        ("wide_resnet", {"depth": 10, "width": 1}, (3, 16, 16)),
        ("densenet", {"depth": 10, "growth": 6}, (3, 16, 16)),
        ("torchvision:resnet50", {"num_classes": 5, "width_per_group": 8}, (3, 32, 32)),
        ("torchvision:mobilenet_v2", {"num_classes": 5, "width_mult": 0.25}, (3, 32, 32)),
        ("torchvision:squeezenet1_1", {"num_classes": 5}, (3, 32, 32)),
    ],
)
def test_idle_filters_of_networks_go_and_nothing_else_changes(name: str, arguments: dict, shape: tuple) -> None:
    model = kill(sc.build(name, **arguments))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = fold(sc.trace(model, torch.randn(2, *shape)))
    assert sum(found.removed.values()) > 0
    assert same(model, found.model, shape)
    assert found.error <= 1e-5
    assert sum(p.numel() for p in found.model.parameters()) < sum(p.numel() for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "gelu": nn.GELU, "softplus": nn.Softplus}


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_random_networks_keep_their_function(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    layers: list[nn.Module] = []
    before = 2
    for _ in range(data.draw(st.integers(2, 4))):
        after = data.draw(st.integers(2, 6))
        mode = data.draw(st.sampled_from(["zeros", "circular", "replicate"]))
        norm = data.draw(st.booleans())
        bias, padding = data.draw(st.booleans()), data.draw(st.integers(0, 1))
        layers.append(nn.Conv2d(before, after, 3, padding=padding, padding_mode=mode, bias=bias))
        layers += [nn.BatchNorm2d(after)] if norm else []
        layers.append(ACTIVATIONS[data.draw(st.sampled_from(sorted(ACTIVATIONS)))]())
        before = after
    model = kill(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * before, 3)))
    found = fold(sc.trace(model, torch.randn(2, 2, 12, 12)))
    assert same(model, found.model, (2, 12, 12))


def chain(padding: int = 0, mode: str = "zeros", bias: bool = True, value: float = 0.5) -> nn.Module:
    """Filter 1 of the first convolution is dead; its constant is ``value``."""
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=padding, padding_mode=mode, bias=bias), nn.Flatten()
    )
    net[0].weight.data[1] = 0
    net[0].bias.data[1] = value
    return net.eval()


@pytest.mark.parametrize(
    ("net", "removed", "why"),
    [
        (chain(), 1, ""),
        (chain(padding=1), 0, "pads with zeros"),
        (chain(padding=1, mode="circular"), 1, ""),
        (chain(padding=1, value=-0.5), 1, ""),
        (chain(bias=False), 0, "neither a bias nor a batch norm"),
    ],
    ids=["bias", "border", "circular", "zero", "nowhere"],
)
def test_a_constant_goes_where_it_is_exact_and_stays_elsewhere(net: nn.Module, removed: int, why: str) -> None:
    found = fold(sc.trace(net, torch.randn(2, 1, 8, 8)))
    assert sum(found.removed.values()) == removed
    assert [reason for _, _, reason in found.stays] == ([] if removed else [found.stays[0][2]])
    assert not why or why in found.stays[0][2]
    assert same(net, found.model, (1, 8, 8))


def test_one_removal_leads_to_the_next() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight[0] = 0  # a constant ...
        net[2].weight[0, 1:] = 0  # ... which alone feeds this one
        net[4].weight[:, 3] = 0  # nobody reads unit 3 ...
        net[2].weight[:3, 3] = 0  # ... which alone reads unit 3 of the first layer
    found = fold(sc.trace(net, torch.randn(2, 3)))
    assert found.removed == {"0": 2, "2": 2}
    assert len(found.plans) == 2
    assert same(net, found.model, (3,))


class Summed(nn.Module):
    """The channels go through a convolution and, without any weight, through a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.one(x))
        return self.two(hidden).mean((2, 3)) + hidden.sum(1).mean((1, 2))[:, None]


def test_units_that_are_read_without_a_weight_are_not_idle() -> None:
    net = Summed().eval()
    net.two.weight.data[:, 2] = 0
    found = fold(sc.trace(net, torch.randn(2, 1, 6, 6)))
    assert found.removed == {}
    assert same(net, found.model, (1, 6, 6))


def test_a_silent_unit_by_chance_is_not_a_constant() -> None:
    """A filter that no example activates has weights all the same."""
    net = chain()
    net[0].weight.data[2] = -1.0
    net[0].bias.data[2] = -100.0
    found = fold(sc.trace(net, torch.rand(2, 1, 8, 8)))
    assert found.removed == {"0": 1}
    x = torch.full((1, 1, 8, 8), -50.0)
    assert torch.allclose(net(x), found.model(x), atol=1e-3)
    assert float(net(x).detach().abs().max()) > 10
