"""Attention whose heads share keys, carry positions or are mixed."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.suites.awkward.attention import Around, PackedAttention, SeparateAttention
from benchmarks.suites.awkward.collect import awkward, sequence, tokens


class GroupedQuery(nn.Module):
    """Llama's grouped-query attention with repeat_kv and rotary positions."""

    def __init__(self, dim: int = 24, heads: int = 6, kv_heads: int = 2, head_dim: int = 4, rotary: bool = True):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim, self.rotary = heads, kv_heads, head_dim, rotary
        self.num_key_value_groups = heads // kv_heads
        self.q_proj, self.o_proj = (
            nn.Linear(dim, heads * head_dim, bias=False),
            nn.Linear(heads * head_dim, dim, bias=False),
        )
        self.k_proj, self.v_proj = (
            nn.Linear(dim, kv_heads * head_dim, bias=False),
            nn.Linear(dim, kv_heads * head_dim, bias=False),
        )
        self.register_buffer(
            "inv_freq", 1.0 / 10000 ** (torch.arange(0, head_dim, 2).float() / head_dim), persistent=False
        )

    @staticmethod
    def repeat_kv(x, n):
        b, kv, t, d = x.shape
        return x if n == 1 else x[:, :, None].expand(b, kv, n, t, d).reshape(b, kv * n, t, d)

    def rotate(self, x):
        half = x.shape[-1] // 2
        angles = torch.arange(x.shape[2], device=x.device, dtype=x.dtype)[:, None] * self.inv_freq.to(x.dtype)
        angles = torch.cat((angles, angles), -1)
        return x * angles.cos() + torch.cat((-x[..., half:], x[..., :half]), -1) * angles.sin()

    def forward(self, x):
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(b, t, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, t, self.num_kv_heads, self.head_dim).transpose(1, 2)
        if self.rotary:
            q, k = self.rotate(q), self.rotate(k)
        k, v = self.repeat_kv(k, self.num_key_value_groups), self.repeat_kv(v, self.num_key_value_groups)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))


@awkward(sequence())
def GroupedQueryRotary():
    return Around(GroupedQuery())


@awkward(sequence())
def GroupedQueryRatioTwo():
    return Around(GroupedQuery(heads=4, kv_heads=2, rotary=False))


@awkward(sequence())
def GroupedQueryRatioOne():
    return Around(GroupedQuery(heads=4, kv_heads=4))


@awkward(sequence())
def MultiQuery():
    return Around(GroupedQuery(heads=4, kv_heads=1, head_dim=6))


class GroupedQueryFive(nn.Module):
    """Grouped-query scores in five dimensions, without repeating the keys."""

    def __init__(self, dim: int = 24, kv: int = 2, group: int = 3, head_dim: int = 4):
        super().__init__()
        self.kv, self.group, self.head_dim = kv, group, head_dim
        self.wq, self.wkv = nn.Linear(dim, kv * group * head_dim), nn.Linear(dim, 2 * kv * head_dim)
        self.wo = nn.Linear(kv * group * head_dim, dim)

    def forward(self, x):
        b, t, _ = x.shape
        q = self.wq(x).view(b, t, self.kv, self.group, self.head_dim)
        k, v = self.wkv(x).view(b, t, 2, self.kv, self.head_dim).unbind(2)
        s = torch.einsum("btkgd,bskd->bkgts", q, k) * self.head_dim**-0.5
        y = torch.einsum("bkgts,bskd->btkgd", s.softmax(-1), v)
        return self.wo(y.reshape(b, t, -1))


@awkward(sequence())
def GroupedQueryEinsum():
    return Around(GroupedQueryFive())


class RelativeBias(PackedAttention):
    """Swin: a table of relative biases per head, gathered by a buffer."""

    def __init__(self, dim: int = 24, heads: int = 3, length: int = 6):
        super().__init__(dim, heads)
        self.table = nn.Parameter(torch.randn(2 * length - 1, heads))
        i = torch.arange(length)
        self.register_buffer("index", i[:, None] - i[None, :] + length - 1)

    def forward(self, x):
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
        a = (q * self.scale @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(-1)
        return self.proj((a @ v).transpose(1, 2).reshape(b, n, c))


@awkward(sequence())
def RelativePositionBias():
    return Around(RelativeBias())


@awkward(sequence())
class LearnedPosition(nn.Module):
    """A class token and a positional parameter."""

    def __init__(self):
        super().__init__()
        self.inp = nn.Linear(16, 24)
        self.cls, self.pos = nn.Parameter(torch.randn(1, 1, 24)), nn.Parameter(torch.randn(1, 7, 24) * 0.1)
        self.attn, self.out = PackedAttention(), nn.Linear(24, 3)

    def forward(self, x):
        x = self.inp(x)
        x = torch.cat((self.cls.expand(x.shape[0], -1, -1), x), dim=1) + self.pos
        return self.out((x + self.attn(x))[:, 0])


@awkward(tokens())
class SinusoidalBuffer(nn.Module):
    """A positional buffer that carries the width of the stream."""

    def __init__(self, d: int = 24):
        super().__init__()
        self.embed, self.attn, self.out = nn.Embedding(20, d), SeparateAttention(d), nn.Linear(d, 20)
        pos, div = torch.arange(16).unsqueeze(1), torch.exp(torch.arange(0, d, 2) * (-math.log(10000.0) / d))
        pe = torch.zeros(16, d)
        pe[:, 0::2], pe[:, 1::2] = torch.sin(pos * div), torch.cos(pos * div)
        self.register_buffer("pe", pe.unsqueeze(0))

    def forward(self, ids):
        x = self.embed(ids) + self.pe[:, : ids.size(1)].requires_grad_(False)
        return self.out(x + self.attn(x))


@awkward(sequence())
class TalkingHeads(nn.Module):
    """Linear maps over the head axis before and after the softmax."""

    def __init__(self, dim: int = 16, heads: int = 4):
        super().__init__()
        self.h = heads
        self.q, self.kv, self.o = nn.Linear(dim, 24), nn.Linear(dim, 48), nn.Linear(24, 3)
        self.pre, self.post = nn.Linear(heads, heads), nn.Linear(heads, heads)

    def forward(self, x):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.h, -1).transpose(1, 2)
        k, v = self.kv(x).view(b, n, 2, self.h, -1).permute(2, 0, 3, 1, 4)
        a = self.pre((q @ k.mT).permute(0, 2, 3, 1)).softmax(2)
        a = self.post(a).permute(0, 3, 1, 2)
        return self.o((a @ v).transpose(1, 2).reshape(b, n, -1))


@awkward(sequence())
class QKNormAttention(nn.Module):
    """Norms per head on queries and keys, learned temperature, heads fixed in the forward."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 72), nn.Linear(24, 3)
        self.q_norm, self.k_norm = nn.LayerNorm(6), nn.LayerNorm(6)
        self.temperature = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, 4, 6).permute(2, 0, 3, 1, 4)
        a = (self.q_norm(q) @ self.k_norm(k).transpose(2, 3) * self.temperature).softmax(-1)
        return self.proj((a @ v).transpose(1, 2).reshape(b, n, 24))
