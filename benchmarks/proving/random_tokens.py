"""Random token blocks, (N, T, C) -> (N, T, C'): attention in the ways people write it, recurrent layers, mixing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.proving.random_blocks import WIDTHS, Block, Rng, weight


def mlp(rng: Rng, c: int, t: int) -> Block:
    inner = rng.choice(WIDTHS)
    run = lambda m, x: x + m.b(F.gelu(m.a(m.norm(x))))  # noqa: E731
    return Block(c, t, run, norm=nn.LayerNorm(c), a=nn.Linear(c, inner), b=nn.Linear(inner, c))


def gated_mlp(rng: Rng, c: int, t: int) -> Block:
    inner = rng.choice(WIDTHS)
    run = lambda m, x: x + m.down(F.silu(m.gate(y := m.norm(x))) * m.up(y))  # noqa: E731
    parts = {k: nn.Linear(c, inner, bias=False) for k in ("gate", "up")}
    return Block(c, t, run, norm=nn.RMSNorm(c), down=nn.Linear(inner, c), **parts)


def packed(rng: Rng, c: int, t: int) -> Block:
    """One projection for q, k, v, viewed as (3, heads, dim); sizes from an attribute, from C, or literal."""
    heads, dim = rng.choice((2, 3, 4)), rng.choice((2, 3, 4))
    style = rng.choice(("attribute", "infer", "literal"))

    def run(m: Any, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        if style == "attribute":
            qkv = m.qkv(x).reshape(n, length, 3, m.heads, m.dim)
        elif style == "infer":
            qkv = m.qkv(x).reshape(n, length, 3, heads, -1)
        else:
            qkv = m.qkv(x).reshape(n, length, 3, heads, dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = (q * dim**-0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        out = mixed.transpose(1, 2).reshape(n, length, heads * dim if style == "literal" else -1)
        return x + m.proj(out)

    inner = heads * dim
    qkv = nn.Linear(c, 3 * inner, bias=rng.random() < 0.5)
    return Block(c, t, run, qkv=qkv, proj=nn.Linear(inner, c), heads=heads, dim=dim)


def separate(rng: Rng, c: int, t: int) -> Block:
    """Own projections; the product by ``scaled_dot_product_attention``; head size from C // heads or heads from -1."""
    heads, dim = rng.choice((2, 4)), rng.choice((2, 4))
    how = rng.choice(("heads", "dim", "derived"))

    def run(m: Any, x: Tensor) -> Tensor:
        def cut(y: Tensor) -> Tensor:
            shape = {"heads": (heads, y.shape[-1] // heads), "dim": (-1, dim), "derived": (-1, y.shape[-1] // heads)}
            return y.view(*y.shape[:2], *shape[how]).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(cut(m.q(x)), cut(m.k(x)), cut(m.v(x)))
        return m.proj(mixed.transpose(1, 2).flatten(2)) + x

    parts = {name: nn.Linear(c, heads * dim) for name in "qkv"}
    return Block(c, t, run, proj=nn.Linear(heads * dim, c), **parts)


def grouped_query(rng: Rng, c: int, t: int) -> Block:
    """Fewer heads of keys and values, repeated by expand or ``repeat_interleave``."""
    kv, times, dim = rng.choice((1, 2, 3)), rng.choice((2, 3)), rng.choice((2, 4))
    expand = rng.random() < 0.5

    def run(m: Any, x: Tensor) -> Tensor:
        n, length, _ = x.shape

        def more(y: Tensor) -> Tensor:
            y = y.view(n, length, -1, dim).transpose(1, 2)
            if not expand:
                return y.repeat_interleave(times, 1)
            return y[:, :, None].expand(n, y.shape[1], times, length, dim).reshape(n, y.shape[1] * times, length, dim)

        q = m.q(x).view(n, length, -1, dim).transpose(1, 2)
        scores = q @ more(m.k(x)).transpose(2, 3) / dim**0.5
        return x + m.proj((scores.softmax(-1) @ more(m.v(x))).transpose(1, 2).reshape(n, length, -1))

    parts = {name: nn.Linear(c, kv * dim, bias=False) for name in "kv"}
    return Block(c, t, run, q=nn.Linear(c, kv * times * dim), proj=nn.Linear(kv * times * dim, c), **parts)


def chunked(rng: Rng, c: int, t: int) -> Block:
    """One head: q, k, v by chunk of the last axis."""
    d = rng.choice((2, 4, 6))

    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).chunk(3, dim=-1)
        return x + m.proj((q @ k.transpose(1, 2)).softmax(-1) @ v)

    return Block(c, t, run, qkv=nn.Linear(c, 3 * d), proj=nn.Linear(d, c))


def multihead(rng: Rng, c: int, t: int) -> Block | None:
    heads = rng.choice((2, 3, 4))
    if c % heads:
        return None
    layer = nn.MultiheadAttention(c, heads, batch_first=rng.random() < 0.6, bias=rng.random() < 0.7)
    weights = rng.random() < 0.5

    def run(m: Any, x: Tensor) -> Tensor:
        y = x if m.layer.batch_first else x.transpose(0, 1)
        out = m.layer(y, y, y, need_weights=weights)[0]
        return m.norm(x + (out if m.layer.batch_first else out.transpose(0, 1)))

    return Block(c, t, run, layer=layer, norm=nn.LayerNorm(c))


def encoder(rng: Rng, c: int, t: int) -> Block | None:
    if c % 2:
        return None
    layer = nn.TransformerEncoderLayer(c, 2, 8, 0.0, batch_first=True, norm_first=rng.random() < 0.5)
    return Block(c, t, lambda m, x: m.layer(x), layer=layer)


def recurrent(rng: Rng, c: int, t: int) -> Block:
    hidden, both = rng.choice((4, 6)), rng.random() < 0.3
    kind = rng.choice((nn.LSTM, nn.GRU, nn.RNN))
    layer = kind(c, hidden, num_layers=rng.choice((1, 2)), batch_first=True, bidirectional=both)
    return Block(hidden * (1 + both), t, lambda m, x: m.layer(x)[0], layer=layer)


def cell(rng: Rng, c: int, t: int) -> Block:
    hidden = rng.choice((4, 6))

    def run(m: Any, x: Tensor) -> Tensor:
        state, out = x.new_zeros(x.shape[0], hidden), []
        for k in range(x.shape[1]):
            state = m.cell(x[:, k], state)
            out.append(state)
        return torch.stack(out, 1)

    return Block(hidden, t, run, cell=nn.GRUCell(c, hidden))


def mixing(rng: Rng, c: int, t: int) -> Block:
    return Block(c, t, lambda m, x: x + m.mix(x.transpose(1, 2)).transpose(1, 2), mix=nn.Linear(t, t))


def position(rng: Rng, c: int, t: int) -> Block:
    return Block(c, t, lambda m, x: m.norm(x + m.where), where=nn.Parameter(torch.randn(1, t, c)), norm=nn.LayerNorm(c))


def bilinear(rng: Rng, c: int, t: int) -> Block:
    out = rng.choice((4, 6))
    return Block(out, t, lambda m, x: m.mix(x, m.a(x)), mix=nn.Bilinear(c, 3, out), a=nn.Linear(c, 3))


def experts(rng: Rng, c: int, t: int) -> Block:
    """A soft mixture: (experts, in, out) weights in one batched product."""
    n, inner = rng.choice((2, 3)), rng.choice((4, 6))

    def run(m: Any, x: Tensor) -> Tensor:
        gate = m.gate(x).softmax(-1)
        inside = torch.relu(torch.einsum("ntc,eci->ntei", x, m.up))
        return torch.einsum("ntei,eio,nte->nto", inside, m.down, gate)

    return Block(c, t, run, gate=nn.Linear(c, n), up=weight(n, c, inner), down=weight(n, inner, c))


TOKEN_BLOCKS: tuple[Callable[[Rng, int, int], Block | None], ...] = (
    mlp, mlp, gated_mlp, packed, packed, separate, separate, grouped_query, grouped_query, chunked, multihead,
    multihead, encoder, recurrent, recurrent, cell, mixing, position, bilinear, experts,
)  # fmt: skip
