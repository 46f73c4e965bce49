"""Attention of recent language and vision models."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.suites.awkward.attention import Around
from benchmarks.suites.awkward.collect import awkward, image, sequence


class LatentAttention(nn.Module):
    """DeepSeek: keys and values from a normed latent, one shared rotary key joined to every head's key."""

    def __init__(self, dim=24, heads=4, nope=4, rope=2, v_dim=5, latent=10):
        super().__init__()
        self.n_heads, self.nope, self.rope, self.v_dim, self.latent = heads, nope, rope, v_dim, latent
        self.wq = nn.Linear(dim, heads * (nope + rope), bias=False)
        self.wkv_a, self.kv_norm = nn.Linear(dim, latent + rope, bias=False), nn.RMSNorm(latent)
        self.wkv_b = nn.Linear(latent, heads * (nope + v_dim), bias=False)
        self.wo, self.scale = nn.Linear(heads * v_dim, dim, bias=False), (nope + rope) ** -0.5

    def rotate(self, x):
        t = torch.arange(x.shape[1], dtype=x.dtype, device=x.device).view(1, -1, 1, 1)
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * t.cos() - b * t.sin(), a * t.sin() + b * t.cos()], -1).flatten(-2)

    def forward(self, x):
        b, t, _ = x.size()
        q_nope, q_pe = torch.split(
            self.wq(x).view(b, t, self.n_heads, self.nope + self.rope), [self.nope, self.rope], -1
        )
        kv, k_pe = torch.split(self.wkv_a(x), [self.latent, self.rope], dim=-1)
        k_pe = self.rotate(k_pe.unsqueeze(2))
        kv = self.wkv_b(self.kv_norm(kv)).view(b, t, self.n_heads, self.nope + self.v_dim)
        k_nope, v = torch.split(kv, [self.nope, self.v_dim], dim=-1)
        q = torch.cat([q_nope, self.rotate(q_pe)], dim=-1)
        k = torch.cat([k_nope, k_pe.expand(-1, -1, self.n_heads, -1)], dim=-1)
        scores = torch.einsum("bshd,bthd->bsht", q, k) * self.scale
        return self.wo(torch.einsum("bsht,bthd->bshd", scores.softmax(-1), v).flatten(2))


@awkward(sequence())
def MultiHeadLatent():
    return Around(LatentAttention())


class DifferentialAttention(nn.Module):
    """Two softmax maps per head, subtracted with a learned factor; norm per head."""

    def __init__(self, dim=24, heads=3):
        super().__init__()
        self.heads, self.d = heads, dim // heads // 2
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.l1, self.l2 = nn.Parameter(torch.randn(self.d) * 0.1), nn.Parameter(torch.randn(self.d) * 0.1)
        self.norm = nn.RMSNorm(2 * self.d)

    def forward(self, x):
        b, t, _ = x.shape
        q = self.q(x).view(b, t, 2 * self.heads, self.d).transpose(1, 2)
        k = self.k(x).view(b, t, 2 * self.heads, self.d).transpose(1, 2)
        v = self.v(x).view(b, t, self.heads, 2 * self.d).transpose(1, 2)
        a = (q @ k.transpose(-1, -2) * self.d**-0.5).softmax(-1).view(b, self.heads, 2, t, t)
        lam = torch.exp((self.l1 * self.l2).sum()) - 0.5
        y = self.norm((a[:, :, 0] - lam * a[:, :, 1]) @ v) * 0.2
        return self.o(y.transpose(1, 2).reshape(b, t, 2 * self.heads * self.d))


@awkward(sequence())
def Differential():
    return Around(DifferentialAttention())


class GatedAttentionUnit(nn.Module):
    """One head: a shared small projection made query and key by scales and offsets; values gate."""

    def __init__(self, dim=24, expand=40, s=12):
        super().__init__()
        self.uv, self.gamma = nn.Linear(dim, 2 * expand + s), nn.Parameter(torch.rand(2, s))
        self.beta = nn.Parameter(torch.zeros(2, s))
        self.o, self.expand, self.s = nn.Linear(expand, dim), expand, s

    def forward(self, x):
        u, v, base = torch.split(F.silu(self.uv(x)), [self.expand, self.expand, self.s], dim=-1)
        base = torch.einsum("...r,hr->...hr", base, self.gamma) + self.beta
        q, k = torch.unbind(base, dim=-2)
        a = torch.square(F.relu(torch.einsum("bnd,bmd->bnm", q, k) / x.shape[1]))
        return self.o(u * torch.einsum("bnm,bme->bne", a, v))


@awkward(sequence())
def GatedUnit():
    return Around(GatedAttentionUnit())


class ParallelBlock(nn.Module):
    """PaLM: attention and feed-forward from one fused projection, summed; one key head."""

    def __init__(self, dim=24, heads=4, d=6, ff=32):
        super().__init__()
        self.heads, self.sizes = heads, (heads * d, d, d, ff * 2)
        self.fused, self.attn_out = nn.Linear(dim, sum(self.sizes), bias=False), nn.Linear(heads * d, dim)
        self.ff_out = nn.Linear(ff, dim)

    def forward(self, x):
        q, k, v, ff = self.fused(x).split(self.sizes, dim=-1)
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        a = torch.einsum("bhid,bjd->bhij", q * q.shape[-1] ** -0.5, k).softmax(-1)
        y = torch.einsum("bhij,bjd->bhid", a, v).transpose(1, 2).flatten(2)
        u, g = ff.chunk(2, -1)
        return self.attn_out(y) + self.ff_out(F.silu(g) * u)


@awkward(sequence())
def ParallelFused():
    return Around(ParallelBlock())


class SlopedAttention(nn.Module):
    """Linear biases with one slope per head in a buffer, soft-capped logits, a sink logit per head."""

    def __init__(self, dim=24, heads=4):
        super().__init__()
        self.h, self.q, self.k, self.v, self.o = heads, *(nn.Linear(dim, dim) for _ in range(4))
        self.register_buffer("slopes", torch.tensor([2.0 ** -(i + 1) for i in range(heads)]))
        self.sinks = nn.Parameter(torch.zeros(heads))

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (f(x).reshape(b, t, self.h, c // self.h).permute(0, 2, 1, 3) for f in (self.q, self.k, self.v))
        i = torch.arange(t, device=x.device)
        bias = -(i[:, None] - i[None]).abs()[None] * self.slopes[:, None, None]
        s = 5 * torch.tanh(q @ k.mT / (c // self.h) ** 0.5 / 5) + bias.to(x.dtype)
        s = torch.cat([s, self.sinks.view(1, -1, 1, 1).expand(b, -1, t, 1)], -1).softmax(-1)[..., :-1]
        return self.o((s @ v).permute(0, 2, 1, 3).reshape(b, t, c))


@awkward(sequence())
def SlopesAndSinks():
    return Around(SlopedAttention())


class Retention(nn.Module):
    """Decays per head, rotation by complex numbers, group norm over heads, swish gate."""

    def __init__(self, dim=24, heads=3):
        super().__init__()
        self.h, self.q, self.k, self.v, self.g, self.o = heads, *(nn.Linear(dim, dim, bias=False) for _ in range(5))
        self.register_buffer("decay", torch.log(1 - 2.0 ** (-2 - torch.arange(heads).float())))
        self.norm = nn.GroupNorm(heads, dim)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (f(x).view(b, t, self.h, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        i = torch.arange(t, dtype=x.dtype)
        d = torch.exp((i[:, None] - i[None]) * self.decay[:, None, None].to(x.dtype)).tril()
        y = ((q @ k.transpose(-1, -2)) * d) @ v
        y = self.norm(y.transpose(1, 2).reshape(b * t, c)).view(b, t, c)
        return self.o(F.silu(self.g(x)) * y)


@awkward(sequence())
def RetentionHeads():
    return Around(Retention())


class RandomFeatures(nn.Module):
    """Performer: a fixed random projection of each head in a buffer of the head's width."""

    def __init__(self, dim=24, heads=4, features=7):
        super().__init__()
        self.heads, self.dim_head = heads, dim // heads
        self.to_q, self.to_k, self.to_v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.register_buffer("projection", torch.randn(features, self.dim_head))

    def feature(self, x):
        x = x * self.dim_head**-0.25
        return torch.exp(x @ self.projection.t() - x.square().sum(-1, keepdim=True) / 2) + 1e-4

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (
            f(x).view(b, n, self.heads, self.dim_head).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v)
        )
        q, k = self.feature(q), self.feature(k)
        den = 1 / torch.einsum("bhnf,bhf->bhn", q, k.sum(2))
        y = torch.einsum("bhnf,bhfd,bhn->bhnd", q, torch.einsum("bhnf,bhnd->bhfd", k, v), den)
        return self.out(y.transpose(1, 2).reshape(b, n, -1))


@awkward(sequence())
def RandomFeatureAttention():
    return Around(RandomFeatures())


class LowRankTokens(nn.Module):
    """Linformer: keys and values are projected over tokens by raw parameters."""

    def __init__(self, dim=24, heads=4, n=6, k=3):
        super().__init__()
        self.h, self.qkv, self.e = heads, nn.Linear(dim, 3 * dim), nn.Parameter(torch.randn(n, k) * 0.4)
        self.f, self.o = nn.Parameter(torch.randn(n, k) * 0.4), nn.Linear(dim, dim)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        k, v = torch.einsum("bnd,nk->bkd", k, self.e), torch.einsum("bnd,nk->bkd", v, self.f)
        q, k, v = (t.reshape(b, -1, self.h, c // self.h).transpose(1, 2) for t in (q, k, v))
        a = (q @ k.transpose(2, 3) * (c // self.h) ** -0.5).softmax(-1)
        return self.o((a @ v).transpose(1, 2).reshape(b, n, c))


@awkward(sequence())
def LowRankTokenAttention():
    return Around(LowRankTokens())


class RelativeShift(nn.Module):
    """Transformer-XL: two learned biases per head and dim, relative shift by padding and viewing."""

    def __init__(self, dim=24, heads=4):
        super().__init__()
        self.h, self.d = heads, dim // heads
        self.qkv, self.r = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.o = nn.Linear(dim, dim)
        self.u, self.v = nn.Parameter(torch.randn(heads, self.d) * 0.2), nn.Parameter(torch.randn(heads, self.d) * 0.2)
        self.pos = nn.Parameter(torch.randn(16, dim) * 0.3)

    def forward(self, x):
        b, t, _c = x.shape
        q, k, v = (y.view(b, t, self.h, self.d) for y in torch.chunk(self.qkv(x), 3, dim=-1))
        r = self.r(self.pos[:t]).view(t, self.h, self.d)
        ac = torch.einsum("bihd,bjhd->bhij", q + self.u, k)
        bd = F.pad(torch.einsum("bihd,jhd->bhij", q + self.v, r), (1, 0))
        bd = bd.view(b, self.h, t + 1, t)[:, :, 1:].view(b, self.h, t, t)
        y = torch.einsum("bhij,bjhd->bihd", ((ac + bd) / self.d**0.5).softmax(-1), v)
        return self.o(y.contiguous().view(b, t, self.h * self.d))


@awkward(sequence())
def RelativeShiftAttention():
    return Around(RelativeShift())


class ComplexRotary(nn.Module):
    """Llama's first code: rotary positions as complex products of viewed pairs."""

    def __init__(self, dim=24, heads=4):
        super().__init__()
        self.h, self.wq, self.wk, self.wv, self.wo = heads, *(nn.Linear(dim, dim, bias=False) for _ in range(4))
        f = 1.0 / 100 ** (torch.arange(0, dim // heads, 2).float() / (dim // heads))
        self.register_buffer("freqs", torch.polar(torch.ones(16, f.numel()), torch.outer(torch.arange(16.0), f)))

    def turn(self, x):
        z = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * self.freqs[: x.shape[1], None].to(
            torch.complex128 if x.dtype == torch.float64 else torch.complex64
        )
        return torch.view_as_real(z).flatten(3)

    def forward(self, x):
        b, t, _c = x.shape
        q, k, v = (f(x).view(b, t, self.h, -1) for f in (self.wq, self.wk, self.wv))
        q, k, v = (y.transpose(1, 2) for y in (self.turn(q), self.turn(k), v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(y.transpose(1, 2).contiguous().view(b, t, -1))


@awkward(sequence())
def ComplexRotaryPairs():
    return Around(ComplexRotary())


@awkward(image())
class StripedHeads(nn.Module):
    """CSWin: half of the channels attend in rows, half in columns, a depthwise convolution on the values."""

    def __init__(self, dim=24, heads=2):
        super().__init__()
        self.h, self.embed = heads, nn.Conv2d(3, dim, 1)
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)
        self.lepe = nn.ModuleList(nn.Conv2d(dim // 2, dim // 2, 3, 1, 1, groups=dim // 2) for _ in range(2))
        self.out = nn.Linear(dim, 3)

    def attend(self, qkv, i, b, h, w):
        q, k, v = qkv[0], qkv[1], qkv[2]
        c = q.shape[-1]

        def stripes(t):
            t = t.view(b, h, w, c) if i == 0 else t.view(b, h, w, c).transpose(1, 2)
            return t.reshape(b * t.shape[1], t.shape[2], self.h, c // self.h).transpose(1, 2)

        extra = self.lepe[i](v.transpose(1, 2).reshape(b, c, h, w)).flatten(2).transpose(1, 2)
        y = F.scaled_dot_product_attention(stripes(q), stripes(k), stripes(v)).transpose(1, 2).reshape(b, h, w, c)
        y = y if i == 0 else y.transpose(1, 2)
        return y.reshape(b, h * w, c) + extra

    def forward(self, x):
        x = self.embed(x)
        b, c, h, w = x.shape
        x = x.flatten(2).transpose(1, 2)
        qkv = self.qkv(x).reshape(b, -1, 3, c).permute(2, 0, 1, 3)
        y = torch.cat([self.attend(qkv[..., : c // 2], 0, b, h, w), self.attend(qkv[..., c // 2 :], 1, b, h, w)], dim=2)
        return self.out(x + self.proj(y)).mean(1)


@awkward(image())
class ReducedKeys(nn.Module):
    """PVT: keys and values from a strided convolution of the tokens; kv packed as (2, heads, dim)."""

    def __init__(self, dim=24, heads=3):
        super().__init__()
        self.h, self.embed, self.q, self.kv = heads, nn.Conv2d(3, dim, 1), nn.Linear(dim, dim), nn.Linear(dim, dim * 2)
        self.sr, self.norm = nn.Conv2d(dim, dim, 2, 2), nn.LayerNorm(dim)
        self.proj, self.out = nn.Linear(dim, dim), nn.Linear(dim, 3)

    def forward(self, x):
        x = self.embed(x)
        B, C, H, W = x.shape
        x = x.flatten(2).transpose(1, 2)
        q = self.q(x).reshape(B, H * W, self.h, C // self.h).permute(0, 2, 1, 3)
        y = self.norm(self.sr(x.permute(0, 2, 1).reshape(B, C, H, W)).reshape(B, C, -1).permute(0, 2, 1))
        kv = self.kv(y).reshape(B, -1, 2, self.h, C // self.h).permute(2, 0, 3, 1, 4)
        k, v = kv[0], kv[1]
        a = ((q @ k.transpose(-2, -1)) * (C // self.h) ** -0.5).softmax(dim=-1)
        return self.out(x + self.proj((a @ v).transpose(1, 2).reshape(B, H * W, C)))


@awkward(image())
class RelativeHeightWidth(nn.Module):
    """BoTNet: convolution projections, positions per row and column added to the keys."""

    def __init__(self, c=16, heads=4):
        super().__init__()
        self.h, self.stem = heads, nn.Conv2d(3, c, 1)
        self.qkv, self.out = nn.Conv2d(c, c * 3, 1, bias=False), nn.Conv2d(c, 3, 1)
        self.rh = nn.Parameter(torch.randn(1, heads, c // heads, 1, 8))
        self.rw = nn.Parameter(torch.randn(1, heads, c // heads, 8, 1))

    def forward(self, x):
        x = self.stem(x)
        n, c, w, h = x.size()
        q, k, v = (t.view(n, self.h, c // self.h, -1) for t in self.qkv(x).split(c, 1))
        pos = (self.rh + self.rw).view(1, self.h, c // self.h, -1).permute(0, 1, 3, 2)
        e = torch.matmul(q.permute(0, 1, 3, 2), k) + torch.matmul(pos, q)
        return self.out(x + torch.matmul(v, e.softmax(-1).permute(0, 1, 3, 2)).view(n, c, w, h))


@awkward(image())
class CosineAttentionMeta(nn.Module):
    """SwinV2: unit queries and keys, clamped learned scale, biases from a small network of positions."""

    def __init__(self, dim=24, heads=3):
        super().__init__()
        self.h, self.embed, self.qkv = heads, nn.Conv2d(3, dim, 4, 4), nn.Linear(dim, dim * 3, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones(heads, 1, 1)))
        self.cpb = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, heads, bias=False))
        self.register_buffer("table", torch.rand(9, 2))
        self.register_buffer("index", torch.randint(0, 9, (4, 4)))
        self.out = nn.Linear(dim, 3)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        b, n, c = x.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias, requires_grad=False), self.v_bias))
        qkv = F.linear(input=x, weight=self.qkv.weight, bias=bias).reshape(b, n, 3, self.h, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        a = (
            F.normalize(q, dim=-1)
            @ F.normalize(k, dim=-1).transpose(-2, -1)
            * self.logit_scale.clamp(max=math.log(100)).exp()
        )
        rel = 16 * torch.sigmoid(self.cpb(self.table)[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1))
        return self.out(((a + rel).softmax(-1) @ v).transpose(1, 2).reshape(b, n, c)).mean(1)


@awkward(image())
class RecursiveGates(nn.Module):
    """HorNet: gates of growing widths, each projected to the next."""

    def __init__(self, dim=16, order=3):
        super().__init__()
        self.dims = [dim // 2**i for i in range(order)][::-1]
        self.embed, self.proj_in = nn.Conv2d(3, dim, 1), nn.Conv2d(dim, 2 * dim, 1)
        self.proj_out = nn.Conv2d(dim, dim, 1)
        self.dw = nn.Conv2d(sum(self.dims), sum(self.dims), 3, padding=1, groups=sum(self.dims))
        self.pws = nn.ModuleList(nn.Conv2d(self.dims[i], self.dims[i + 1], 1) for i in range(order - 1))
        self.out = nn.Conv2d(dim, 3, 1)

    def forward(self, x):
        x = self.embed(x)
        pwa, abc = torch.split(self.proj_in(x), (self.dims[0], sum(self.dims)), dim=1)
        parts = torch.split(self.dw(abc) * 0.5, self.dims, dim=1)
        y = pwa * parts[0]
        for pw, part in zip(self.pws, parts[1:], strict=True):
            y = pw(y) * part
        return self.out(x + self.proj_out(y))
