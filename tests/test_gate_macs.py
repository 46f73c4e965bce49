"""Acceptance check 17, the counting half: multiply-accumulates of gated networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gated_nets import curious, lived, varied
from secateur.graph.groups import trace
from secateur.measure.counts import macs as dense_macs
from secateur.models.cifar_resnet import resnet20
from secateur.models.cifarnet import cifarnet
from secateur.runtime.gates import acting, gate, watch
from secateur.runtime.macs import macs, overhead

TABLE = {1.0: 174_301_824, 0.9: 142_817_906, 0.8: 113_437_234, 0.7: 86_497_200}
TABLE |= {0.6: 64_008_629, 0.5: 43_964_736, 0.4: 28_933_682, 0.3: 16_644_370}


@pytest.mark.parametrize("density", TABLE)
def test_acceptance_17_cifarnet(density: float) -> None:
    x = torch.rand(1, 3, 32, 32)
    assert macs(gate(cifarnet(), density, x).model, x).tolist() == [TABLE[density]]


def test_acceptance_17_layers_without_products_change_nothing() -> None:
    x = torch.rand(2, 3, 32, 32)
    layers = list(cifarnet())
    odd = [nn.Identity(), *layers[:6], nn.Dropout(0.3), nn.Identity(), *layers[6:9], nn.MaxPool2d(1), *layers[9:]]
    assert macs(gate(nn.Sequential(*odd), 0.5, x).model, x).tolist() == [TABLE[0.5]] * 2


def test_a_sum_computes_the_union_of_its_branches() -> None:
    x = varied(3)
    model = curious(gate(lived(resnet20(width=8, depth=8)), 0.5, x).model, x)
    found = macs(model, x)
    with watch(model) as choices:
        model(x)
    masks = {path: choice.mask for path, choice in choices.items()}
    stem, first, second = masks["0"], masks["3.conv1"], masks["3.conv2"]
    expected = 3 * stem.sum(1) + stem.sum(1) * first.sum(1) + first.sum(1) * second.sum(1)
    stream = stem | second
    a, b, c = masks["4.conv1"], masks["4.conv2"], masks["4.shortcut.0"]
    quarter = (stream.sum(1) * a.sum(1) + a.sum(1) * b.sum(1)) * 9 + stream.sum(1) * c.sum(1)
    stream = b | c
    a, b, c = masks["5.conv1"], masks["5.conv2"], masks["5.shortcut.0"]
    last = (stream.sum(1) * a.sum(1) + a.sum(1) * b.sum(1)) * 9 + stream.sum(1) * c.sum(1)
    total = expected * 9 * 1024 + quarter * 256 + last * 64 + (b | c).sum(1) * 10
    assert torch.equal(found, total.double())
    assert len(set(found.tolist())) > 1


def test_dense_networks_cost_what_their_graph_says() -> None:
    x = torch.rand(1, 3, 32, 32)
    model = resnet20(width=8, depth=14)
    assert macs(model, x).item() == dense_macs(trace(model, x))


def test_prefixes_cost_the_product_of_their_groups() -> None:
    x = torch.rand(2, 3, 32, 32)
    done = gate(cifarnet(), None, x, groups=4)
    with acting(done.model, {path: torch.tensor([1, 4]) for path in done.gated}):
        found = macs(done.model, x).tolist()
    inner = (TABLE[1.0] - 1_555_200 - 1_920) / 16
    assert found == [inner + (1_555_200 + 1_920) / 4, TABLE[1.0]]


def test_the_predictors_are_an_overhead() -> None:
    x = torch.rand(1, 3, 32, 32)
    assert overhead(gate(cifarnet(), {"3": 0.5, "6": 0.5}, x).model) == 64 * 64 + 64 * 128
