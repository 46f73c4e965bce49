"""Attention in modules and by hand, in the layouts that users write."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.suites.awkward.collect import awkward, image, sequence, tokens


@awkward(sequence())
class MultiheadSelf(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp = nn.Linear(16, 24)
        self.attn, self.norm = nn.MultiheadAttention(24, 4, batch_first=True), nn.LayerNorm(24)
        self.out = nn.Linear(24, 3)

    def forward(self, x):
        x = self.inp(x)
        return self.out(self.norm(x + self.attn(x, x, x, need_weights=False)[0]))


@awkward(lambda n: torch.randn(5, n, 16))
class MultiheadSequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, bias=False)
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        y, w = self.attn(x, x, x)
        return self.out(x + y), w


@awkward(lambda n: (torch.randn(n, 4, 16), torch.randn(n, 7, 10)))
class MultiheadCross(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4, kdim=10, vdim=10, batch_first=True, add_bias_kv=True)
        self.out = nn.Linear(16, 3)

    def forward(self, q, kv):
        return self.out(self.attn(q, kv, kv)[0])


@awkward(sequence())
class EncoderLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp = nn.Linear(16, 24)
        self.enc = nn.TransformerEncoderLayer(24, 4, 40, dropout=0.0, batch_first=True)
        self.out = nn.Linear(24, 3)

    def forward(self, x):
        return self.out(self.enc(self.inp(x)).mean(1))


@awkward(tokens())
class EncoderStack(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True, norm_first=True, activation="gelu")
        self.enc = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16), enable_nested_tensor=False)
        self.out = nn.Linear(16, 20)

    def forward(self, ids):
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.out(self.enc(self.embed(ids) * 4.0, mask=mask, is_causal=True))


@awkward(lambda n: (torch.randint(0, 20, (n, 6)), torch.randint(0, 20, (n, 4))))
class EncoderDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.net = nn.Transformer(16, 4, 1, 1, 24, dropout=0.0, batch_first=True)
        self.out = nn.Linear(16, 20)

    def forward(self, src, tgt):
        return self.out(self.net(self.embed(src), self.embed(tgt)))


class PackedAttention(nn.Module):
    """The attention of timm's vision transformer: (3, heads, dim) packed in one linear layer."""

    def __init__(self, dim: int = 24, heads: int = 3):
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.scale = self.head_dim**-0.5
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        a = (q * self.scale @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((a @ v).transpose(1, 2).reshape(b, n, c))


class Around(nn.Module):
    """Embed, one residual attention, classify the mean token."""

    def __init__(self, attention: nn.Module, inside: int = 16, dim: int = 24):
        super().__init__()
        self.inp, self.norm, self.attn, self.out = (
            nn.Linear(inside, dim),
            nn.LayerNorm(dim),
            attention,
            nn.Linear(dim, 3),
        )

    def forward(self, x):
        x = self.inp(x)
        return self.out((x + self.attn(self.norm(x))).mean(1))


@awkward(sequence())
def PackedThreeHeadsDim():
    return Around(PackedAttention())


class PackedHeadsFirst(nn.Module):
    """GPT-NeoX: (heads, 3 * dim), chunked after the heads."""

    def __init__(self, dim: int = 24, heads: int = 4):
        super().__init__()
        self.heads, self.head_size = heads, dim // heads
        self.query_key_value, self.dense = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        b, n, _ = x.shape
        qkv = self.query_key_value(x).view(b, n, self.heads, 3 * self.head_size)
        q, k, v = (
            t.transpose(1, 2)
            for t in (
                qkv[..., : self.head_size],
                qkv[..., self.head_size : 2 * self.head_size],
                qkv[..., 2 * self.head_size :],
            )
        )
        a = torch.softmax(q @ k.mT / math.sqrt(self.head_size), -1)
        return self.dense((a @ v).transpose(1, 2).contiguous().view(b, n, self.heads * self.head_size))


@awkward(sequence())
def PackedHeadsThreeDim():
    return Around(PackedHeadsFirst())


class GPTAttention(nn.Module):
    """nanoGPT: split the packed projection by the width, causal buffer, sdpa."""

    def __init__(self, n_embd: int = 24, n_head: int = 4, flash: bool = True):
        super().__init__()
        self.n_embd, self.n_head, self.flash = n_embd, n_head, flash
        self.c_attn, self.c_proj = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)
        self.register_buffer("bias", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        if self.flash:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            y = F.softmax(att, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


@awkward(sequence())
def GPTFlash():
    return Around(GPTAttention())


@awkward(sequence())
def GPTCausalBuffer():
    return Around(GPTAttention(flash=False))


class SeparateAttention(nn.Module):
    """Three projections, heads and size as attributes, Hugging Face style transposes."""

    def __init__(self, dim: int = 24, heads: int = 4, head_size: int = 8):
        super().__init__()
        self.num_attention_heads, self.attention_head_size = heads, head_size
        self.all_head_size = heads * head_size
        self.query, self.key, self.value = (nn.Linear(dim, self.all_head_size) for _ in range(3))
        self.dense = nn.Linear(self.all_head_size, dim)

    def transpose_for_scores(self, x):
        return x.view((*x.size()[:-1], self.num_attention_heads, self.attention_head_size)).permute(0, 2, 1, 3)

    def forward(self, x):
        q, k, v = (self.transpose_for_scores(f(x)) for f in (self.query, self.key, self.value))
        probs = nn.functional.softmax(
            torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.attention_head_size), dim=-1
        )
        y = torch.matmul(probs, v).permute(0, 2, 1, 3).contiguous()
        return self.dense(y.view((*y.size()[:-2], self.all_head_size)))


@awkward(sequence())
def SeparateProjections():
    return Around(SeparateAttention())


@awkward(image())
class NonLocal(nn.Module):
    """Non-local block: convolution projections, spatial attention, batch norm on the way out."""

    def __init__(self, c: int = 16):
        super().__init__()
        self.inter = c // 2
        self.stem = nn.Conv2d(3, c, 3, padding=1)
        self.theta, self.phi, self.g = (nn.Conv2d(c, self.inter, 1) for _ in range(3))
        self.w = nn.Sequential(nn.Conv2d(self.inter, c, 1), nn.BatchNorm2d(c))
        self.out = nn.Conv2d(c, 4, 1)

    def forward(self, x):
        x = F.relu(self.stem(x))
        b = x.size(0)
        g = self.g(x).view(b, self.inter, -1).permute(0, 2, 1)
        theta = self.theta(x).view(b, self.inter, -1).permute(0, 2, 1)
        f = torch.matmul(theta, F.max_pool2d(self.phi(x), 2).view(b, self.inter, -1))
        g = F.max_pool2d(self.g(x), 2).view(b, self.inter, -1).permute(0, 2, 1) + 0 * g[:, :16]
        y = torch.matmul(F.softmax(f, dim=-1), g).permute(0, 2, 1).contiguous()
        return self.out(x + self.w(y.view(b, self.inter, *x.size()[2:])))


@awkward(image())
class LinearAttention2d(nn.Module):
    """Linear attention over pixels with (qkv, heads, dim) packed in a 1x1 convolution."""

    def __init__(self, c: int = 16, heads: int = 2, dim: int = 6):
        super().__init__()
        self.heads, self.scale = heads, dim**-0.5
        self.stem, self.to_qkv = nn.Conv2d(3, c, 3, padding=1), nn.Conv2d(c, heads * dim * 3, 1, bias=False)
        self.to_out, self.last = nn.Conv2d(heads * dim, c, 1), nn.Conv2d(c, 3, 1)

    def forward(self, x):
        x = self.stem(x)
        b, _, h, w = x.shape
        q, k, v = (t.reshape(b, self.heads, -1, h * w) for t in self.to_qkv(x).chunk(3, dim=1))
        context = torch.einsum("bhdn,bhen->bhde", k.softmax(dim=-1), v)
        y = torch.einsum("bhde,bhdn->bhen", context, q.softmax(dim=-2) * self.scale)
        return self.last(x + self.to_out(y.reshape(b, -1, h, w)))


@awkward(image(3, 8))
class WindowAttention(nn.Module):
    """Shifted windows: roll, partition, attend, put back."""

    def __init__(self, dim: int = 24, window: int = 4, shift: int = 2):
        super().__init__()
        self.window, self.shift = window, shift
        self.embed, self.attn, self.out = nn.Conv2d(3, dim, 1), PackedAttention(dim), nn.Linear(dim, 4)

    def forward(self, x):
        x = self.embed(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        k = self.window
        y = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        y = y.view(b, h // k, k, w // k, k, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, k * k, c)
        y = self.attn(y).view(b, h // k, w // k, k, k, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return self.out((x + torch.roll(y, (self.shift, self.shift), (1, 2))).mean((1, 2)))


@awkward(lambda n: (torch.randn(n, 9, 16), torch.rand(n, 9) > 0.3))
class PerceiverLatents(nn.Module):
    """Learned latents attend to the inputs with a padding mask; kv packed in one projection."""

    def __init__(self, d: int = 24, heads: int = 4):
        super().__init__()
        self.heads, self.latents = heads, nn.Parameter(torch.randn(5, d))
        self.to_q, self.to_kv, self.to_out = (
            nn.Linear(d, d, bias=False),
            nn.Linear(16, 2 * d, bias=False),
            nn.Linear(d, 3),
        )

    def forward(self, x, keep):
        b, h = x.shape[0], self.heads
        q = self.to_q(self.latents).unsqueeze(0).repeat(b, 1, 1)
        k, v = self.to_kv(x).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (h, -1)).transpose(1, 2) for t in (q, k, v))
        s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        s = s.masked_fill(~keep[:, None, None, :], torch.finfo(s.dtype).min)
        return self.to_out((s.softmax(-1) @ v).transpose(1, 2).flatten(2)).mean(1)


@awkward(image())
class ChannelAttentionXCA(nn.Module):
    """Cross-covariance attention: the softmax runs over channels."""

    def __init__(self, c: int = 16, heads: int = 2):
        super().__init__()
        self.heads, self.temp = heads, nn.Parameter(torch.ones(heads, 1, 1))
        self.stem, self.qkv = nn.Conv2d(3, c, 1), nn.Conv2d(c, c * 3, 1)
        self.dw, self.out = nn.Conv2d(c * 3, c * 3, 3, padding=1, groups=c * 3), nn.Conv2d(c, 3, 1)

    def forward(self, x):
        x = self.stem(x)
        b, c, h, w = x.shape
        q, k, v = (t.view(b, self.heads, c // self.heads, h * w) for t in self.dw(self.qkv(x)).chunk(3, 1))
        a = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temp).softmax(-1)
        return self.out(x + (a @ v).reshape(b, c, h, w))
