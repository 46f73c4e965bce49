"""Random image blocks, (N, C, H, W) -> (N, C', H', W'): one construct each, sizes drawn from the generator."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

WIDTHS = (4, 6, 8, 12)
Rng = random.Random


class Block(nn.Module):
    """A function of (module, x) with its modules, parameters, buffers and sizes as attributes."""

    def __init__(self, out: int, size: int, run: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.run = run
        self.shape = {"out": out, "size": size}  # in a dict: no attribute a size could be read from
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / max(1, int(torch.tensor(shape[1:]).prod())) ** 0.5)


def activation(rng: Rng, c: int) -> nn.Module:
    """Functions with f(0) = 0 and with f(0) != 0."""
    kinds = (nn.ReLU, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Softplus, nn.Tanh, nn.ELU, nn.Hardswish, nn.Hardsigmoid)
    return nn.PReLU(c) if rng.random() < 0.1 else rng.choice(kinds)()


def divisor(rng: Rng, *numbers: int) -> int:
    """A random common divisor above one, or one."""
    found = [d for d in range(2, min(numbers) + 1) if all(n % d == 0 for n in numbers)]
    return rng.choice(found) if found else 1


def conv(rng: Rng, c: int, out: int, groups: int = 1, **options: Any) -> nn.Conv2d:
    k = rng.choice((1, 3))
    return nn.Conv2d(c, out, k, padding=k // 2, groups=groups, bias=rng.random() < 0.5, **options)


def plain(rng: Rng, c: int, s: int) -> Block:
    out = rng.choice(WIDTHS)
    norm = nn.BatchNorm2d(out, affine=rng.random() < 0.8) if rng.random() < 0.7 else nn.Identity()
    return Block(
        out, s, lambda m, x: m.act(m.norm(m.conv(x))), conv=conv(rng, c, out), norm=norm, act=activation(rng, out)
    )


def grouped(rng: Rng, c: int, s: int) -> Block:
    out = rng.choice(WIDTHS)
    return Block(out, s, lambda m, x: F.relu(m.conv(x)), conv=conv(rng, c, out, divisor(rng, c, out)))


def depthwise(rng: Rng, c: int, s: int) -> Block | None:
    times = rng.choice((1, 1, 2, 3))
    if c * times > 24:
        return None
    layer = nn.Conv2d(c, c * times, 3, padding=1, groups=c, bias=rng.random() < 0.5)
    return Block(c * times, s, lambda m, x: F.silu(m.norm(m.conv(x))), conv=layer, norm=nn.BatchNorm2d(c * times))


def transposed(rng: Rng, c: int, s: int) -> Block:
    out = rng.choice(WIDTHS)
    groups = rng.choice((1, divisor(rng, c, out)))
    layer = nn.ConvTranspose2d(c, out, 3, padding=1, groups=groups, bias=rng.random() < 0.5)
    return Block(out, s, lambda m, x: F.relu(m.conv(x)), conv=layer)


def residual(rng: Rng, c: int, s: int) -> Block:
    inner = rng.choice(WIDTHS)
    parts = {"a": conv(rng, c, inner), "n": nn.BatchNorm2d(inner), "b": conv(rng, inner, c), "act": activation(rng, c)}
    return Block(c, s, lambda m, x: m.act(x + m.b(F.relu(m.n(m.a(x))))), **parts)


def padded_shortcut(rng: Rng, c: int, s: int) -> Block:
    more = rng.choice((1, 2, 4))
    before = rng.choice((0, 1, 2))
    run = lambda m, x: F.relu(m.conv(x) + F.pad(x, (0, 0, 0, 0, before, more)))  # noqa: E731
    return Block(c + more + before, s, run, conv=conv(rng, c, c + more + before))


def dense(rng: Rng, c: int, s: int) -> Block | None:
    out = rng.choice((2, 4))
    if c + 2 * out > 24:
        return None
    run = lambda m, x: torch.cat([x, y := m.a(x), m.b(torch.cat([y, x], 1))], 1)  # noqa: E731
    return Block(c + 2 * out, s, run, a=conv(rng, c, out), b=conv(rng, c + out, out))


def twice(rng: Rng, c: int, s: int) -> Block | None:
    return Block(2 * c, s, lambda m, x: torch.cat([x, x], 1)) if c <= 8 else None


def chunk_gate(rng: Rng, c: int, s: int) -> Block | None:
    if c % 2:
        return None
    order = rng.random() < 0.5

    def run(m: Any, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1) if order else x.split(c // 2, dim=1)
        return a * torch.sigmoid(m.conv(b))

    return Block(c // 2, s, run, conv=conv(rng, c // 2, c // 2))


def unequal_split(rng: Rng, c: int, s: int) -> Block:
    k, out = rng.randint(1, c - 1), rng.choice(WIDTHS)

    def run(m: Any, x: Tensor) -> Tensor:
        a, b = torch.split(x, [k, c - k], dim=1)
        return torch.cat([m.a(a), b], 1)

    return Block(out + c - k, s, run, a=conv(rng, k, out))


def slices(rng: Rng, c: int, s: int) -> Block:
    k, out = rng.randint(1, c - 1), rng.choice(WIDTHS)
    run = lambda m, x: m.a(x[:, :k]) + m.b(x[:, k:])  # noqa: E731
    return Block(out, s, run, a=conv(rng, k, out), b=conv(rng, c - k, out))


def overlapping_slices(rng: Rng, c: int, s: int) -> Block:
    k = max(1, c // 2)
    return Block(k, s, lambda m, x: F.relu(x[:, :k]) + m.g(x)[:, -k:], g=conv(rng, c, c))


def strided_slices(rng: Rng, c: int, s: int) -> Block | None:
    if c % 2:
        return None
    step = divisor(rng, c)
    return Block(
        c // step,
        s,
        lambda m, x: torch.relu(x[:, ::step]) * m.scale(x[:, step - 1 :: step]),
        scale=nn.BatchNorm2d(c // step),
    )


def shuffle(rng: Rng, c: int, s: int) -> Block | None:
    g = divisor(rng, c)
    if g in (1, c):
        return None
    if rng.random() < 0.3:
        return Block(c, s, lambda m, x: m.shuffle(x), shuffle=nn.ChannelShuffle(g))

    def run(m: Any, x: Tensor) -> Tensor:
        n, channels, h, w = x.shape
        return x.reshape(n, g, channels // g, h, w).transpose(1, 2).reshape(n, channels, h, w)

    return Block(c, s, run)


def hard_shuffle(rng: Rng, c: int, s: int) -> Block | None:
    g = divisor(rng, c)
    return (
        Block(c, s, lambda m, x: x.reshape(-1, g, c // g, s, s).transpose(1, 2).reshape(-1, c, s, s)) if g > 1 else None
    )


def squeeze_excite(rng: Rng, c: int, s: int) -> Block:
    r = rng.choice((2, 4))
    gate = rng.choice((torch.sigmoid, F.hardsigmoid, torch.tanh))
    if rng.random() < 0.5:
        run = lambda m, x: x * gate(m.b(F.relu(m.a(x.mean((2, 3))))))[:, :, None, None]  # noqa: E731
        return Block(c, s, run, a=nn.Linear(c, r), b=nn.Linear(r, c))
    run = lambda m, x: x * gate(m.b(F.relu(m.a(F.adaptive_avg_pool2d(x, 1)))))  # noqa: E731
    return Block(c, s, run, a=nn.Conv2d(c, r, 1), b=nn.Conv2d(r, c, 1))


def group_norm(rng: Rng, c: int, s: int) -> Block:
    return Block(c, s, lambda m, x: F.relu(m.norm(x)), norm=nn.GroupNorm(rng.choice((1, divisor(rng, c))), c))


def instance_norm(rng: Rng, c: int, s: int) -> Block:
    norm = nn.InstanceNorm2d(c, affine=rng.random() < 0.7, track_running_stats=rng.random() < 0.5)
    # a convolution behind it: torch's gradient of an instance norm right before a batch-first recurrent layer is wrong
    return Block(c, s, lambda m, x: m.conv(m.norm(x)), norm=norm, conv=nn.Conv2d(c, c, 1, groups=c))


def layer_norm(rng: Rng, c: int, s: int) -> Block:
    run = lambda m, x: m.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # noqa: E731
    return Block(c, s, run, norm=nn.LayerNorm(c, bias=rng.random() < 0.7))


def own_norm(rng: Rng, c: int, s: int) -> Block:
    def run(m: Any, x: Tensor) -> Tensor:
        spread = x.var(1, keepdim=True, correction=0)
        return (x - x.mean(1, keepdim=True)) * (spread + 1e-3).rsqrt() * m.w[:, None, None]

    return Block(c, s, run, w=nn.Parameter(torch.ones(c)))


def glu(rng: Rng, c: int, s: int) -> Block:
    out = rng.choice(WIDTHS)
    return Block(out, s, lambda m, x: F.glu(m.conv(x), dim=1), conv=conv(rng, c, 2 * out))


def maxout(rng: Rng, c: int, s: int) -> Block:
    out, k = rng.choice((4, 6)), rng.choice((2, 3))
    first = rng.random() < 0.5

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        shape = (out, k) if first else (k, out)
        return y.reshape(y.shape[0], *shape, s, s).amax(2 if first else 1)

    return Block(out, s, run, conv=conv(rng, c, out * k))


def pixel_shuffle(rng: Rng, c: int, s: int) -> Block | None:
    out = rng.choice((2, 3, 4))
    return Block(out, 2 * s, lambda m, x: F.pixel_shuffle(m.conv(x), 2), conv=conv(rng, c, 4 * out)) if s <= 4 else None


def pixel_unshuffle(rng: Rng, c: int, s: int) -> Block | None:
    if s % 2 or s < 4 or c > 8:
        return None
    out = rng.choice(WIDTHS)
    return Block(out, s // 2, lambda m, x: m.conv(F.pixel_unshuffle(x, 2)), conv=conv(rng, 4 * c, out))


def pool(rng: Rng, c: int, s: int) -> Block | None:
    if s % 2 or s < 4:
        return None
    return Block(c, s // 2, lambda m, x: m.pool(x), pool=rng.choice((nn.MaxPool2d, nn.AvgPool2d))(2))


def upsample(rng: Rng, c: int, s: int) -> Block | None:
    mode = rng.choice(("nearest", "bilinear"))
    return Block(c, 2 * s, lambda m, x: F.interpolate(x, scale_factor=2, mode=mode)) if s <= 4 else None


def shared(rng: Rng, c: int, s: int) -> Block:
    return Block(c, s, lambda m, x: m.conv(F.relu(m.conv(x))) + m.conv(x), conv=conv(rng, c, c))


def raw_conv(rng: Rng, c: int, s: int) -> Block:
    out = rng.choice(WIDTHS)
    run = lambda m, x: F.conv2d(x, m.w, m.b, padding=1)  # noqa: E731
    return Block(out, s, run, w=weight(out, c, 3, 3), b=weight(out))


def standardised(rng: Rng, c: int, s: int) -> Block:
    out = rng.choice(WIDTHS)

    def run(m: Any, x: Tensor) -> Tensor:
        mean, std = m.w.mean((1, 2, 3), keepdim=True), m.w.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (m.w - mean) / (std + 1e-2), padding=1)

    return Block(out, s, run, w=weight(out, c, 3, 3))


def einsum(rng: Rng, c: int, s: int) -> Block:
    out = rng.choice(WIDTHS)
    return Block(out, s, lambda m, x: F.relu(torch.einsum("nchw,oc->nohw", x, m.w)), w=weight(out, c))


def hard_view(rng: Rng, c: int, s: int) -> Block:
    out = rng.choice(WIDTHS)
    run = lambda m, x: torch.matmul(m.w, x.reshape(-1, c, s * s)).view(-1, out, s, s)  # noqa: E731
    return Block(out, s, run, w=weight(out, c))


def buffers(rng: Rng, c: int, s: int) -> Block:
    return Block(
        c,
        s,
        lambda m, x: x * m.scale + m.shift[:, None, None],
        scale=torch.rand(1, c, 1, 1) + 0.5,
        shift=torch.randn(c),
    )


def blur(rng: Rng, c: int, s: int) -> Block:
    kernel = torch.rand(1, 1, 3, 3)
    if rng.random() < 0.5:
        return Block(
            c, s, lambda m, x: F.conv2d(x, m.k.expand(x.shape[1], -1, -1, -1), padding=1, groups=x.shape[1]), k=kernel
        )
    return Block(c, s, lambda m, x: F.conv2d(F.pad(x, (1, 1, 1, 1)), m.k, groups=c), k=kernel.repeat(c, 1, 1, 1))


def flip_roll(rng: Rng, c: int, s: int) -> Block:
    k = rng.randint(1, c - 1)
    return Block(c, s, lambda m, x: torch.roll(m.conv(x), k, 1) + x.flip(1), conv=conv(rng, c, c))


def channel_attention(rng: Rng, c: int, s: int) -> Block:
    run = lambda m, x: x * torch.sigmoid(m.eca(x.mean((2, 3))[:, None]))[:, 0, :, None, None]  # noqa: E731
    return Block(c, s, run, eca=nn.Conv1d(1, 1, 3, padding=1, bias=False))


def selective(rng: Rng, c: int, s: int) -> Block:
    out = rng.choice(WIDTHS)

    def run(m: Any, x: Tensor) -> Tensor:
        both = torch.stack([m.a(x), m.b(x)], 1)
        gate = m.f(both.sum(1).mean((2, 3))).view(-1, 2, out).softmax(1)
        return (both * gate[..., None, None]).sum(1)

    return Block(out, s, run, a=conv(rng, c, out), b=conv(rng, c, out), f=nn.Linear(out, 2 * out))


def repeats(rng: Rng, c: int, s: int) -> Block | None:
    out = rng.choice(WIDTHS)
    return Block(
        out, s, lambda m, x: m.conv(x.repeat_interleave(2, 1) + x.repeat(1, 2, 1, 1)), conv=conv(rng, 2 * c, out)
    )


def normed_weight(rng: Rng, c: int, s: int) -> Block:
    out = rng.choice(WIDTHS)
    wrap = rng.choice((parametrizations.weight_norm, parametrizations.spectral_norm))
    return Block(out, s, lambda m, x: F.relu(m.conv(x)), conv=wrap(conv(rng, c, out)))


def in_place(rng: Rng, c: int, s: int) -> Block:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        y += x
        y.mul_(m.g)
        return F.relu(y, inplace=True)

    return Block(c, s, run, conv=conv(rng, c, c), g=nn.Parameter(torch.rand(c, 1, 1)))


def written_parts(rng: Rng, c: int, s: int) -> Block | None:
    k = rng.randint(1, c - 1)

    def run(m: Any, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, :k] = m.a(x)
        y[:, k:] = x[:, k:]
        return y

    return Block(c, s, run, a=conv(rng, c, k))


def non_local(rng: Rng, c: int, s: int) -> Block:
    d = rng.choice((2, 4))

    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.q(x).flatten(2), m.k(x).flatten(2), m.v(x).flatten(2)
        mixed = v @ torch.softmax(q.transpose(1, 2) @ k, -1)
        return x + m.o(mixed.view(x.shape[0], -1, s, s))

    return Block(c, s, run, q=nn.Conv2d(c, d, 1), k=nn.Conv2d(c, d, 1), v=nn.Conv2d(c, 6, 1), o=nn.Conv2d(6, c, 1))


IMAGE_BLOCKS: tuple[Callable[[Rng, int, int], Block | None], ...] = (
    plain, plain, grouped, depthwise, transposed, residual, residual, padded_shortcut, dense, twice, chunk_gate,
    unequal_split, slices, overlapping_slices, strided_slices, shuffle, hard_shuffle, squeeze_excite, group_norm,
    instance_norm, layer_norm, own_norm, glu, maxout, pixel_shuffle, pixel_unshuffle, pool, upsample, shared,
    raw_conv, standardised, einsum, hard_view, buffers, blur, flip_roll, channel_attention, selective, repeats,
    normed_weight, in_place, written_parts, non_local,
)  # fmt: skip
