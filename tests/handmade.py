"""A small network and its graph, written by hand: the golden fixture of scores, counts and plans."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from secateur.types import Cost, Graph, Group, Member, Site


def ids(start: int, units: int, repeat: int = 1) -> np.ndarray:
    return np.repeat(np.arange(start, start + units), repeat)


def each(units: int, k: int = 1) -> np.ndarray:
    return np.arange(units * k).reshape(units, k)


def small_net(widths: tuple[int, int, int] = (8, 6, 12), seed: int = 0) -> nn.Sequential:
    """conv - batch norm - relu - conv - relu - flatten - linear - relu - linear, for 3 x 4 x 4 images."""
    a, b, c = widths
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, a, 3, padding=1, bias=False),
        nn.BatchNorm2d(a),
        nn.ReLU(),
        nn.Conv2d(a, b, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(b * 16, c),
        nn.ReLU(),
        nn.Linear(c, 4),
    )
    for tensor in (net[1].weight, net[1].bias, net[1].running_mean):
        nn.init.normal_(tensor, 0.5, 0.3)
    return net.eval()


def small_graph(widths: tuple[int, int, int] = (8, 6, 12), seed: int = 0) -> Graph:
    """Groups: conv1 (a units), conv2 (b, 16 positions each in the linear layer), fc (c), out (frozen)."""
    a, b, c = widths
    net = small_net(widths, seed)
    one, two, three, out = ids(0, a), ids(a, b), ids(a + b, c), ids(a + b + c, 4)
    flat = ids(a, b, 16)
    norm = tuple(
        Member(f"1.{name}", 0, each(a), "along") for name in ("weight", "bias", "running_mean", "running_var")
    )
    conv1 = (Member("0.weight", 0, each(a), "out"), *norm, Member("3.weight", 1, each(a), "in"))
    conv2 = (
        Member("3.weight", 0, each(b), "out"),
        Member("3.bias", 0, each(b), "along"),
        Member("6.weight", 1, each(b, 16), "in"),
    )
    fc = (
        Member("6.weight", 0, each(c), "out"),
        Member("6.bias", 0, each(c), "along"),
        Member("8.weight", 1, each(c), "in"),
    )
    last = (Member("8.weight", 0, each(4), "out"), Member("8.bias", 0, each(4), "along"))
    groups = (
        Group("conv1", 0, a, "channel", conv1, sites=(Site("3", 0, 1, each(a)),), signature="conv"),
        Group("conv2", a, b, "channel", conv2, sites=(Site("6", 0, 1, each(b, 16)),), signature="conv"),
        Group("fc", a + b, c, "neuron", fc, sites=(Site("8", 0, 1, each(c)),), signature="fc"),
        Group("out", a + b + c, 4, "neuron", last, frozen="output of the model"),
    )
    axes = {
        "0.weight": (one, None, None, None),
        "1.weight": (one,),
        "1.bias": (one,),
        "1.running_mean": (one,),
        "1.running_var": (one,),
        "1.num_batches_tracked": (),
        "3.weight": (two, one, None, None),
        "3.bias": (two,),
        "6.weight": (three, flat),
        "6.bias": (three,),
        "8.weight": (out, three),
        "8.bias": (out,),
    }
    costs = (
        Cost("conv", "0", 3 * 9 * 16.0, (one,)),
        Cost("conv", "3", 9 * 16.0, (two, one)),
        Cost("addmm", "6", 1.0, (three, flat)),
        Cost("addmm", "8", 1.0, (out, three)),
    )
    example = (torch.zeros(1, 3, 4, 4),)
    return Graph(net, example, {}, groups, axes, {}, costs, f"hand-{a}-{b}-{c}", 9, 0.0)


def without_sites(graph: Graph) -> Graph:
    return replace(graph, groups=tuple(replace(group, sites=()) for group in graph.groups))


def data(samples: int = 8, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 3, 4, 4, generator=source), torch.randint(0, 4, (samples,), generator=source)
