"""``FittedAttention`` is nn.MultiheadAttention with free sizes: equal uncut, equal to the masked one when cut."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.attention import FittedAttention, fit_attention, swap
from secateur.types import Plan

WIDTH, HEADS, LONG, WIDE = 8, 4, 3, 5  # embedding, heads, queries, keys


class Attends(nn.Module):
    """One attention between two linear layers, so that all its axes carry units."""

    def __init__(self, heads: int = HEADS, **options: Any) -> None:
        super().__init__()
        self.first = options.get("batch_first", False)
        widths = (WIDTH, options.get("kdim", WIDTH), options.get("vdim", WIDTH))
        self.q, self.k, self.v = (nn.Linear(6, width) for width in widths)
        self.attention = nn.MultiheadAttention(WIDTH, heads, **options)
        self.out = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor, y: Tensor, **masks: Any) -> tuple[Tensor, Tensor | None]:
        out, weights = self.attention(self.q(x), self.k(y), self.v(y), **masks)
        return self.out(out), weights


def inputs(first: bool, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    x, y = (torch.randn(batch, n, 6, generator=generator, dtype=torch.float64) for n in (LONG, WIDE))
    return (x, y) if first else (x.transpose(0, 1), y.transpose(0, 1))


def model(heads: int = HEADS, **options: Any) -> Attends:
    torch.manual_seed(1)
    net = Attends(heads, **options).double().eval()
    for p in net.parameters():
        nn.init.normal_(p, std=0.4)
    return net


OPTIONS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "bias_k": {"add_bias_kv": True, "batch_first": True},
    "zero": {"add_zero_attn": True},
    "bias_k and zero": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    "kdim": {"kdim": 7, "vdim": 6, "batch_first": True},
    "kdim, bias_k, not first": {"kdim": 7, "vdim": 6, "add_bias_kv": True},
}


def masks(heads: int, batch: int = 2) -> dict[str, dict[str, Any]]:
    causal = torch.ones(LONG, WIDE).triu(2).bool()
    shift = torch.linspace(-1, 1, LONG * WIDE, dtype=torch.float64).view(LONG, WIDE)
    padding = torch.zeros(batch, WIDE, dtype=torch.bool)
    padding[0, 3:] = True
    each = torch.randn(batch * heads, LONG, WIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {
        "none": {},
        "bool": {"attn_mask": causal},
        "float": {"attn_mask": shift},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": causal, "key_padding_mask": padding},
        "per head": {"attn_mask": each},
        "per head and padding": {"attn_mask": each, "key_padding_mask": padding.double() * -3},
    }


def fitted(net: Attends, x: Tensor, y: Tensor) -> Attends:
    """The same module with nothing cut, but as ``FittedAttention``."""
    graph = sc.trace(net, (x, y))
    whole = {name: tuple(p.shape) for name, p in net.named_parameters()}
    attributes = fit_attention("attention", net.attention, graph, whole, np.ones(graph.units + 1, dtype=bool))
    assert attributes is not None
    twin = model(net.attention.num_heads, **_options_of(net))
    twin.load_state_dict(net.state_dict())
    swap(twin, "attention", attributes)
    assert isinstance(twin.attention, FittedAttention)
    return twin


def _options_of(net: Attends) -> dict[str, Any]:
    a = net.attention
    return {
        "batch_first": a.batch_first, "bias": a.in_proj_bias is not None, "add_bias_kv": a.bias_k is not None,
        "add_zero_attn": a.add_zero_attn, "kdim": a.kdim, "vdim": a.vdim,
    }  # fmt: skip


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("name", OPTIONS)
def test_uncut_it_is_the_library_module(name: str) -> None:
    net = model(**OPTIONS[name])
    x, y = inputs(net.first)
    twin = fitted(net, x, y)
    assert twin.state_dict().keys() == net.state_dict().keys()
    for given, weights, average in itertools.product(masks(HEADS).values(), (True, False), (True, False)):
        options = {**given, "need_weights": weights, "average_attn_weights": average}
        close(twin(x, y, **options), net(x, y, **options))


@pytest.mark.parametrize("name", OPTIONS)
def test_without_a_batch(name: str) -> None:
    net = model(**OPTIONS[name])
    twin = fitted(net, *inputs(net.first))
    x, y = (t[0] if net.first else t[:, 0] for t in inputs(net.first))
    one = masks(HEADS, 1)
    padding = {"key_padding_mask": one["padding"]["key_padding_mask"][0]}
    for given in (one["none"], one["bool"], one["per head"], padding):
        close(twin(x, y, **given), net(x, y, **given))


@pytest.mark.parametrize("name", OPTIONS)
def test_cut_heads_are_masked_heads(name: str) -> None:
    net = model(**OPTIONS[name])
    x, y = inputs(net.first)
    graph = sc.trace(net, {"x": x, "y": y, "need_weights": False})
    (heads,) = [g for g in graph.groups if g.granularity == "head"]
    assert (heads.units, heads.exact, heads.prunable) == (HEADS, True, True)
    plan = Plan(graph.fingerprint, ((heads.name, HEADS, (0, 2)),))
    small = sc.compact(graph, plan)
    assert isinstance(small.attention, nn.MultiheadAttention)
    assert (small.attention.num_heads, small.attention.head_dim, small.attention.embed_dim) == (2, 2, WIDTH)
    sc.mask_(graph, plan)
    for batch, given in itertools.product((2, 5), ("none", "bool", "float", "padding", "both", "per head")):
        a, b = inputs(net.first, batch)
        options = {**masks(HEADS, batch)[given], "average_attn_weights": False}
        out, weights = net(a, b, **options)
        close(small(a, b, **options, need_weights=False), (out, None))
        close(small(a, b, **options), (out, weights[:, [0, 2]]))
    sc.unmask_(graph)


@pytest.mark.parametrize("name", OPTIONS)
def test_embeddings_are_cut_with_their_layers(name: str) -> None:
    net = model(**OPTIONS[name])
    x, y = inputs(net.first)
    graph = sc.trace(net, {"x": x, "y": y, "need_weights": False})
    free = [g for g in graph.groups if g.prunable and g.granularity != "head"]
    packed = "kdim" not in name  # one weight for q, k and v: they share its columns
    assert {g.name for g in free} == {"q", "attention.out_proj"} | (set() if packed else {"k", "v"})
    plan = Plan(graph.fingerprint, tuple((g.name, g.units, tuple(range(1, g.units, 2))) for g in free))
    small = sc.compact(graph, plan)
    assert [small.attention.embed_dim, small.attention.out_proj.out_features] == [4, 4]
    assert small(*inputs(net.first, 3), need_weights=False)[0].shape[-1] == 2


def test_one_head_has_its_inner_dimensions() -> None:
    """Queries with keys, and values, are cut to unequal widths of the packed weight."""
    net = model(1, batch_first=True)
    graph = sc.trace(net, {"x": inputs(True)[0], "y": inputs(True)[1], "need_weights": False})
    inner = [g for g in graph.groups if g.name.startswith("attention.in_proj_weight")]
    assert [{m.role for m in g.members} for g in inner] == [{"out", "along"}, {"out", "along", "in"}]
    assert [(g.units, g.exact) for g in inner] == [(WIDTH, True)] * 2
    plan = Plan(graph.fingerprint, ((inner[0].name, WIDTH, (1, 2, 5)), (inner[1].name, WIDTH, (0, 1, 4, 6, 7))))
    small = sc.compact(graph, plan)
    assert sorted(small.attention.rows) in ([3, 3, 5], [3, 5, 5])
    assert small.attention.scale == WIDTH**-0.5
    sc.mask_(graph, plan)
    close(small(*inputs(True, 4)), net(*inputs(True, 4)))


def test_cut_twice_is_cut_once() -> None:
    net = model(batch_first=True)
    given = {"x": inputs(True)[0], "y": inputs(True)[1], "need_weights": False}
    graph = sc.trace(net, given)
    (heads,) = [g for g in graph.groups if g.granularity == "head"]
    once = sc.compact(graph, Plan(graph.fingerprint, ((heads.name, 4, (1, 3)),)))
    first = sc.compact(graph, Plan(graph.fingerprint, ((heads.name, 4, (0, 1, 3)),)))
    middle = sc.trace(first, given)
    (heads,) = [g for g in middle.groups if g.granularity == "head"]
    twice = sc.compact(middle, Plan(middle.fingerprint, ((heads.name, 3, (1, 2)),)))
    assert (once.attention.kept_heads, twice.attention.kept_heads) == ([1, 3], [1, 3])
    options = masks(HEADS)["per head"]
    close(twice(*inputs(True), **options), once(*inputs(True), **options))


def test_averaged_weights_of_fewer_heads_are_another_number() -> None:
    net = model(batch_first=True)
    x, y = inputs(True)
    (heads,) = [g for g in sc.trace(net, (x, y)).groups if g.granularity == "head"]
    assert not heads.exact
    assert "mean" in heads.why_inexact


def test_dropout_only_in_train_mode() -> None:
    net = model(batch_first=True, dropout=0.5)
    graph = sc.trace(net, {"x": inputs(True)[0], "y": inputs(True)[1], "need_weights": False})
    (heads,) = [g for g in graph.groups if g.granularity == "head"]
    small = sc.compact(graph, Plan(graph.fingerprint, ((heads.name, 4, (0, 2, 3)),)))
    x, y = inputs(True)
    for weights in (True, False):
        runs = [small.train(mode)(x, y, need_weights=weights)[0] for mode in (True, True, False, False)]
        assert not torch.equal(runs[0], runs[1])
        close(runs[2], runs[3])


@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layers(norm_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 4, 12, 0.0, batch_first=True, norm_first=norm_first)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 8)
    graph = sc.trace(net, x)
    free = [g for g in graph.groups if g.prunable]
    assert sorted((g.units, g.granularity) for g in free) == [(4, "head"), (4, "head"), (12, "neuron"), (12, "neuron")]
    assert all(g.exact for g in free)
    plan = Plan(graph.fingerprint, tuple((g.name, g.units, tuple(range(0, g.units, 2))) for g in free))
    small = sc.compact(graph, plan)
    wide = sc.mask_(graph, plan)
    y = torch.randn(3, 7, 8)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 4:] = True
    for options in ({}, {"src_key_padding_mask": padding}, {"mask": nn.Transformer.generate_square_subsequent_mask(7)}):
        with torch.no_grad():
            torch.testing.assert_close(small(y, **options), wide(y, **options), atol=1e-5, rtol=1e-5)
    small.train()(y).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
