"""How units pass through operators: golden tables, one line per construct (the notation is golden.py's).

Between a product with ``a`` (n units out) and one with ``c`` (units in) stands the construct, with parameters p, q.
``=`` exact, ``~`` inexact.  Each line is also proved: by permutation, and by cutting every group.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import secateur as sc
from golden import between
from secateur.compact import compact
from secateur.graph.rules.table import RULES, rule
from secateur.types import Plan

Row = tuple[str, str, str, int, Callable[..., Tensor], tuple[tuple[int, ...], ...]]
cat = torch.cat


def row(name: str, expected: str, n: int, run: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Any:
    return pytest.param(expected, n, run, shapes, id=name)


def check(kind: str, expected: str, n: int, run: Callable[..., Tensor], shapes: Any) -> None:
    text, mark, graph = between(kind, n, run, *shapes)
    assert f"{text} {mark}" == expected
    assert sc.verify(graph).ok
    for group in graph.groups:
        for drop in {0, group.units - 1} if group.prunable else ():
            kept = tuple(k for k in range(group.units) if k != drop)
            compact(graph, Plan(graph.fingerprint, ((group.name, group.units, kept),)))


POINTWISE = [
    row("function of one", "abcd abcd =", 4, lambda h: h.sigmoid() * 2 + 1),
    row("with a vector", "abcd abcd abcd =", 4, lambda h, p: h + p, (4,)),
    row("with one number", "abcd - abcd =", 4, lambda h, p: h * p, (1,)),
    row("with fixed positions", ".... .... frozen", 4, lambda h: h + torch.arange(4.0)),
    row("with a uniform constant", "abcd abcd =", 4, lambda h: h + torch.ones(4)),
    row("in place", "abcd abcd abcd =", 4, lambda h, p: h.clone().mul_(p).add_(1), (4,)),
    row("where", "abcd abcd =", 4, lambda h: torch.where(h > 0, h, torch.zeros(()))),
    row("masked_fill", "abcd abcd =", 4, lambda h: h.masked_fill(h < 0, 0.0)),
    row("glu", "abcabc abc =", 6, lambda h: F.glu(h, 1)),
    row("prelu", "abc abc abc =", 3, F.prelu, (3,)),
]

MOVEMENT = [
    row("chunk", "abcabc abc =", 6, lambda h: torch.mul(*h.chunk(2, 1))),
    row("split, unequal", "abcdef cdefab =", 6, lambda h: cat([*reversed(h.split([2, 4], 1))], 1)),
    row("slice from the front", "abcde abc =", 5, lambda h: h[:, :3]),
    row("slice from the end", "abcde de =", 5, lambda h: h[:, -2:]),
    row("slices that overlap", "..... ... frozen", 5, lambda h: h[:, :3] + h[:, 2:]),
    row("strided slice", "aabbcc abc =", 6, lambda h: h[:, ::2]),
    row("strided slices", "aabbcc abc =", 6, lambda h: h[:, ::2] * h[:, 1::2]),
    row("narrow", "abcde bcd =", 5, lambda h: h.narrow(1, 1, 3)),
    row("one position", "a.bc - =", 4, lambda h: h[:, 1:2]),
    row("unbind and stack", "... ... frozen", 3, lambda h: torch.stack(h.unbind(1), 1)),
    row("shuffle by view", "aabb abab =", 4, lambda h: h.view(-1, 2, 2).transpose(1, 2).reshape(-1, 4)),
    row("sum of a factor", "abcabc abc =", 6, lambda h: h.view(-1, 2, 3).sum(1)),
    row("cat with itself", "abc abcabc =", 3, lambda h: cat([h, h * 2], 1)),
    row("cat with a parameter", "abc de abcde =", 3, lambda h, p: cat([h, p.expand(2, -1)], 1), (2,)),
    row("cat with a constant", "abc abcde =", 3, lambda h: cat([h, torch.ones(2, 2)], 1)),
    row("cat with fixed positions", "abc abc.. =", 3, lambda h: cat([h, torch.arange(4.0).view(2, 2)], 1)),
    row("cat of rows", "abc -|abc abc =", 3, lambda h, p: cat([h, p], 0), (1, 3)),
    row("stack and sum", "abc abc =", 3, lambda h: torch.stack([h, h.relu()]).sum(0)),
    row("flip", "abcd dcba =", 4, lambda h: h.flip(1)),
    row("flip and add", "abba abba =", 4, lambda h: h.flip(1) + h),
    row("roll", "abcde deabc =", 5, lambda h: h.roll(2, 1)),
    row("roll and add", "abab abab =", 4, lambda h: h.roll(2, 1) + h),
    row("repeat", "abc abcabc =", 3, lambda h: h.repeat(1, 2)),
    row("repeat_interleave", "abc aabbcc =", 3, lambda h: h.repeat_interleave(2, 1)),
    row("pad behind", "abc abcde abcde =", 3, lambda h, p: F.pad(h, (0, 2)) + p, (5,)),
    row("pad before", "abc .abc =", 3, lambda h: F.pad(h, (1, 0))),
    row("index", ".... .... frozen", 4, lambda h: h[:, [3, 1, 0, 2]]),
    row("index_select", ".... .. frozen", 4, lambda h: h.index_select(1, torch.tensor([1, 2]))),
    row("sort", ".... .... frozen", 4, lambda h: h.sort(1)[0]),
    row("topk", ".... .. frozen", 4, lambda h: h.topk(2, 1)[0]),
    row("cumsum", ".... .... frozen", 4, lambda h: h.cumsum(1)),
    row("write a slice", "abcd ab abcd =", 4, lambda h, p: write(h.clone(), p), (2,)),
    row("write one position", ".abc - .abc =", 4, lambda h, p: write(h.clone(), p), (1,)),
]

REDUCTIONS = [
    row("sum of zeros", "abcd abcd =", 4, lambda h: h * h.sum(1, keepdim=True)),
    row("sum of halves", "abcd abcd ~", 4, lambda h: h * h.sigmoid().sum(1, keepdim=True)),
    row("mean", "abcd abcd ~", 4, lambda h: h - h.mean(1, keepdim=True)),
    row("maximum", "abcd abcd ~", 4, lambda h: h - h.amax(1, keepdim=True)),
    row("argmax", ".... .... frozen", 4, lambda h: h + h.argmax(1, keepdim=True)),
    row("softmax", "abcd abcd ~", 4, lambda h: h.softmax(1)),
    row("norm", "abcd abcd =", 4, lambda h: F.normalize(h, dim=1)),
    row("over the batch", "abcd abcd =", 4, lambda h: h - h.mean(0)),
]

PRODUCTS = [
    row("linear", "abcd efg|abcd efg =", 4, lambda h, p: F.linear(h, p), (3, 4)),
    row("there and back", "abc abc|de abc =", 3, lambda h, p: h @ p @ p.T, (3, 2)),
    row("of activations", "abc abc =", 3, lambda h: h @ (h.T @ h)),
    row("einsum", "abc abc|de de =", 3, lambda h, p: torch.einsum("ni,io->no", h, p), (3, 2)),
    row("outer", "- abc abcabc =", 2, lambda h, p: torch.einsum("ni,j->nij", h, p).flatten(1), (3,)),
    row("bilinear", "abc de|abc|abc de =", 3, lambda h, p: F.bilinear(h, h.relu(), p), (2, 3, 3)),
]

MAPS = [
    row("convolution", "abcd efg|abcd|-|- efg =", 4, lambda h, p: F.conv2d(h, p), (3, 4, 1, 1)),
    row("grouped, widths", "abab cdecde|ab|-|- cdecde =", 4, lambda h, p: F.conv2d(h, p, groups=2), (6, 2, 1, 1)),
    row("grouped, groups", "aabb ab|-|-|- ab =", 4, lambda h, p: F.conv2d(h, p, groups=2), (2, 2, 1, 1)),
    row("depthwise", "abc abc|-|-|- abc =", 3, lambda h, p: F.conv2d(h, p, padding=1, groups=3), (3, 1, 3, 3)),
    row("multiplier", "abc aabbcc|-|-|- aabbcc =", 3, lambda h, p: F.conv2d(h, p, groups=3), (6, 1, 1, 1)),
    row("transposed", "abc abc|de|-|- de =", 3, lambda h, p: F.conv_transpose2d(h, p), (3, 2, 1, 1)),
    row(
        "transposed, grouped", "abab abab|cde|-|- cdecde =", 4,
        lambda h, p: F.conv_transpose2d(h, p, groups=2), (4, 3, 1, 1),
    ),
    row(
        "transposed, depthwise", "abc abc|-|-|- abc =", 3,
        lambda h, p: F.conv_transpose2d(h, p, groups=3), (3, 1, 1, 1),
    ),
    row(
        "standardised", "abc defg|abc|-|- defg =~", 3,
        lambda h, p: F.conv2d(h, p - p.mean((1, 2, 3), True)), (4, 3, 1, 1),
    ),
    row(
        "batch norm", "abc abc abc abc =", 3,
        lambda h, p, q: F.batch_norm(h, h.new_zeros(3), h.new_ones(3), p, q), (3,), (3,),
    ),
    row("group norm, widths", "abcabc abcabc abcabc ~", 6, lambda h, p: F.group_norm(h, 2, p), (6,)),
    row("group norm, groups", "aabbcc aabbcc aabbcc =", 6, lambda h, p: F.group_norm(h, 3, p), (6,)),
    row("group norm, one group", "abcd abcd abcd ~", 4, lambda h, p: F.group_norm(h, 1, p), (4,)),
    row("instance norm", "abcd abcd =", 4, lambda h: F.instance_norm(h)),
    row("layer norm of all", "ab ab|....|.... ab ~", 2, lambda h, p: F.layer_norm(h, (2, 4, 4), p), (2, 4, 4)),
    row("local response", ".... .... frozen", 4, lambda h: F.local_response_norm(h, 2)),
    row("channel shuffle", "abcabc aabbcc =", 6, lambda h: F.channel_shuffle(h, 2)),
    row("pixel shuffle", "aaaabbbb ab =", 8, lambda h: F.pixel_shuffle(h, 2)),
    row("pixel unshuffle", "ab aaaabbbb =", 2, lambda h: F.pixel_unshuffle(h, 2)),
    row("patches", "ab aaaabbbb =", 2, lambda h: F.unfold(h, 2, stride=2).view(-1, 8, 2, 2)),
    row("pooling", "abc abc =", 3, lambda h: F.max_pool2d(F.interpolate(h, scale_factor=2), 2)),
    row("maxout", "aabb ab =", 4, lambda h: h.view(-1, 2, 2, 4, 4).amax(2)),
    row("gate", "abc abc|de de|abc abc =", 3, lambda h, p, q: h * spread(h.mean((2, 3)) @ p @ q), (3, 2), (2, 3)),
    row("over channels", ".... -|-|- .... frozen", 4, lambda h, p: h * spread(eca(h, p)), (1, 1, 3)),
    row("spatial softmax", "abc abc =", 3, lambda h: h.flatten(2).softmax(2).view_as(h)),
    row("of two maps", "abc abc =", 3, lambda h: (h.flatten(2) @ h.flatten(2).mT @ h.flatten(2)).view_as(h)),
]  # fmt: skip

TOKENS = [
    row("layer norm", "abcd abcd abcd abcd ~", 4, lambda h, p, q: F.layer_norm(h, (4,), p, q), (4,), (4,)),
    row("rms norm", "abcd abcd abcd ~", 4, lambda h, p: F.rms_norm(h, (4,), p), (4,)),
    row("positions", "abcd .....|abcd abcd =", 4, lambda h, p: h + p, (5, 4)),
    row("token mixing", "abcd .....|..... abcd =", 4, lambda h, p: (h.mT @ p).mT, (5, 5)),
    row("class token", "abcd -|-|abcd abcd =", 4, lambda h, p: cat([p.expand(2, -1, -1), h], 1), (1, 1, 4)),
    row("embedding", "abcd -|abcd abcd =", 4, lambda h, p: h + F.embedding(torch.tensor([[0, 1, 2, 3, 0]]), p), (4, 4)),
    row("one head", "ababcd cd =", 6, lambda h: attend(*h.chunk(3, -1))),
    row("linear attention", "ababcd cd =", 6, lambda h: (lambda q, k, v: q @ (k.mT @ v))(*h.chunk(3, -1))),
    row("packed heads", "aabbaabbaabb aabb =", 12, lambda h: joined(attend(*packed(h)))),
    row("packed heads, fused", "aabbaabbaabb aabb =", 12, lambda h: joined(F.scaled_dot_product_attention(*packed(h)))),
    row("grouped queries", "aaaabbbbaabbaabb aaaabbbb =", 16, lambda h: joined(attend(*grouped(h)))),
    row("rotary", "abab abab =", 4, lambda h: h * 0.5 + cat([-h[..., 2:], h[..., :2]], -1)),
    row(
        "experts", "abc -|abc|defg -|defg|hij hij =", 3,
        lambda h, p, q: torch.einsum("ntei,eio->nto", torch.einsum("ntc,eci->ntei", h, p).relu(), q),
        (2, 3, 4), (2, 4, 3),
    ),
]  # fmt: skip


def write(y: Tensor, p: Tensor) -> Tensor:
    y[:, : p.shape[0]] = p
    return y


def spread(gate: Tensor) -> Tensor:
    return gate.sigmoid()[:, :, None, None]


def eca(h: Tensor, p: Tensor) -> Tensor:
    return F.conv1d(h.mean((2, 3))[:, None], p, padding=1)[:, 0]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def packed(h: Tensor) -> Tensor:
    return h.view(*h.shape[:2], 3, 2, 2).permute(2, 0, 3, 1, 4)


def grouped(h: Tensor) -> list[Tensor]:
    """Four heads of queries, two of keys and values."""
    q, k, v = (t.view(*t.shape[:2], -1, 2).transpose(1, 2) for t in h.split([8, 4, 4], -1))
    return [q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)]


def joined(h: Tensor) -> Tensor:
    return h.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("expected", "n", "run", "shapes"), [*POINTWISE, *MOVEMENT, *REDUCTIONS, *PRODUCTS])
def test_rows(expected: str, n: int, run: Callable[..., Tensor], shapes: Any) -> None:
    check("rows", expected, n, run, shapes)


@pytest.mark.parametrize(("expected", "n", "run", "shapes"), MAPS)
def test_maps(expected: str, n: int, run: Callable[..., Tensor], shapes: Any) -> None:
    check("maps", expected, n, run, shapes)


@pytest.mark.parametrize(("expected", "n", "run", "shapes"), TOKENS)
def test_tokens(expected: str, n: int, run: Callable[..., Tensor], shapes: Any) -> None:
    check("tokens", expected, n, run, shapes)


def test_the_proof_catches_a_wrong_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule for ``flip`` that forgets to flip: the permutation proof and compact both say so."""

    def forgets(flow: Any, op: Any) -> None:
        flow.set(flow.of(op.args[0]))

    monkeypatch.setitem(RULES, "aten::flip", forgets)
    (group,) = (g for g in between("rows", 4, lambda h: h.flip(1))[2].groups if g.name == "a")
    assert group.frozen is not None
    assert re.match(r"in a trial cut masked and compact differ by .* after cutting a", group.frozen)
    monkeypatch.setattr("secateur.trial.foreign", lambda model: False)
    text, _, graph = between("rows", 4, lambda h: h.flip(1))
    assert text == "abcd abcd"
    (row,) = sc.verify(graph).rows
    assert not row.ok
    assert row.error > 0.01
    assert not sc.verify(graph, joint=True).ok
    with pytest.raises(sc.SecateurError, match=r"masked and compact differ by .* after cutting a"):
        compact(graph, Plan(graph.fingerprint, (("a", 4, (0, 1)),)))


def test_operators_without_a_rule_freeze_what_they_touch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(RULES, "aten::flip")
    text, mark, graph = between("rows", 4, lambda h: h.flip(1))
    assert (text, mark) == (".... ....", "frozen")
    assert graph.group("a").frozen == "no rule for operator aten::flip in the model"


def test_an_operator_has_one_rule() -> None:
    with pytest.raises(ValueError, match="aten::flip has two rules"):
        rule("flip")(lambda flow, op: None)


def test_ids_of_a_group_are_consecutive_and_in_order() -> None:
    _, _, graph = between("tokens", 12, lambda h: joined(attend(*packed(h))))
    starts = [g.offset for g in graph.groups]
    assert starts == list(np.cumsum([0, *(g.units for g in graph.groups)])[:-1])
    for group in graph.groups:
        for member in group.members:
            ids = graph.axes[member.tensor][member.axis]
            assert ids is not None
            assert (ids[member.index] == np.arange(group.offset, group.offset + group.units)[:, None]).all()
