"""Counts: against the plain sums, an independent FLOP counter, and networks of the narrower widths."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import secateur as sc
from handmade import small_graph, small_net
from secateur.measure.counts import Counter, macs, params


def flops(net: nn.Module, *args: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(*args)
    return counter.get_total_flops() // 2


def test_dense_counts_are_those_of_the_network() -> None:
    graph = small_graph()
    assert params(graph) == sum(p.numel() for p in graph.model.parameters()) == 1886
    assert macs(graph) == flops(graph.model, *graph.args) == 3 * 8 * 144 + 8 * 6 * 144 + 96 * 12 + 48


@settings(max_examples=30, deadline=None)
@given(a=st.integers(1, 8), b=st.integers(1, 6), c=st.integers(1, 12), seed=st.integers(0, 99))
def test_counts_under_a_keep_vector_are_those_of_the_narrow_network(a: int, b: int, c: int, seed: int) -> None:
    graph, narrow = small_graph(), small_net((a, b, c))
    random = np.random.default_rng(seed)
    kept = np.ones(graph.units + 1, dtype=bool)
    for group, width in zip(graph.groups, (a, b, c, 4), strict=True):
        gone = random.permutation(group.units)[: group.units - width]
        kept[group.offset + gone] = False
    assert params(graph, kept) == sum(p.numel() for p in narrow.parameters())
    assert macs(graph, kept) == flops(narrow, *graph.args)
    counter, widths = Counter.of(graph), np.array([[a, b, c, 4], [8, 6, 12, 4]])
    assert counter("params", widths).tolist() == [params(graph, kept), params(graph)]
    assert counter("macs", widths).tolist() == [macs(graph, kept), macs(graph)]


def test_buffers_do_not_count_and_unknown_parameters_count_whole() -> None:
    graph = small_graph()
    buffers = sum(b.numel() for b in graph.model.buffers())
    assert buffers == 17
    axes = {name: ids for name, ids in graph.axes.items() if name != "8.weight"}
    bare = replace(graph, axes=axes)
    kept = np.zeros(graph.units + 1, dtype=bool)
    kept[-1] = True
    assert params(graph, kept) == 0
    assert params(bare, kept) == 48 == Counter.of(bare)("params", np.zeros(4))


def test_tied_parameters_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.mix = nn.Linear(8, 8)
            self.read = nn.Linear(8, 11, bias=False)
            self.read.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.read(torch.relu(self.mix(self.embed(x))))

    graph = sc.trace(Tied(), torch.zeros(2, 3, dtype=torch.long))
    assert params(graph) == 88 + 72
    dense = np.array([group.units for group in graph.groups])
    assert float(Counter.of(graph)("params", dense)) == 160
    # whichever name of the tied tensor the graph lists, its axes are found
    renamed = {"read.weight" if name == "embed.weight" else name: ids for name, ids in graph.axes.items()}
    kept = np.ones(graph.units + 1, dtype=bool)
    kept[:3] = False
    other = replace(graph, axes=renamed, aliases={"embed.weight": "read.weight"})
    assert params(other, kept) == params(graph, kept) < 160


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "squeezenet1_1"])
def test_traced_counts_agree_with_the_flop_counter(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    net = torchvision.models.get_model(name).eval()
    image = torch.zeros(1, 3, 64, 64)
    graph = sc.trace(net, image)
    assert params(graph) == sum(p.numel() for p in net.parameters())
    assert macs(graph) == flops(net, image)
    dense = np.array([group.units for group in graph.groups])
    assert float(Counter.of(graph)("macs", dense)) == macs(graph)
