"""More movement: shortcuts, einsum, gathers, splits with offsets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.suites.awkward.collect import awkward, image, sequence, signal, vector
from benchmarks.suites.awkward.conv import Head, stem


@awkward(image())
class ZeroPaddedShortcut(nn.Module):
    """CIFAR ResNet, option A."""

    def __init__(self):
        super().__init__()
        self.stem = stem(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.head = Head(16)

    def forward(self, x):
        x = self.stem(x)
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.head(F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4), "constant", 0)))


@awkward(image())
class ZeroConcatShortcut(nn.Module):
    """Pyramid shortcut: zeros made in the forward are concatenated."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.head = stem(8), nn.Conv2d(8, 12, 3, padding=1), Head(12)

    def forward(self, x):
        x = self.stem(x)
        y = self.conv(x)
        zeros = torch.zeros(x.size(0), y.size(1) - x.size(1), x.size(2), x.size(3), dtype=x.dtype, device=x.device)
        return self.head(F.relu(y + torch.cat((x, zeros), 1)))


@awkward(image())
class TemporalShift(nn.Module):
    """Shifts an eighth of the channels each way between the frames (TSM)."""

    def __init__(self, frames: int = 1, c: int = 16):
        super().__init__()
        self.stem, self.conv, self.head, self.fold = stem(c), nn.Conv2d(c, 12, 3), Head(12), c // 8

    def forward(self, x):
        x = self.stem(x).unsqueeze(1).repeat(1, 3, 1, 1, 1)
        out = torch.zeros_like(x)
        out[:, :-1, : self.fold] = x[:, 1:, : self.fold]
        out[:, 1:, self.fold : 2 * self.fold] = x[:, :-1, self.fold : 2 * self.fold]
        out[:, :, 2 * self.fold :] = x[:, :, 2 * self.fold :]
        return self.head(F.relu(self.conv(out.flatten(0, 1)))).view(x.size(0), 3, -1).mean(1)


@awkward(image())
class Res2NetSplit(nn.Module):
    """A hierarchy of splits, each added to the next."""

    def __init__(self, width: int = 6, scale: int = 4):
        super().__init__()
        self.width = width
        self.stem = stem(16)
        self.conv1 = nn.Conv2d(16, width * scale, 1)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(scale - 1))
        self.conv3, self.head = nn.Conv2d(width * scale, 16, 1), Head(16)

    def forward(self, x):
        x = self.stem(x)
        spx = torch.split(F.relu(self.conv1(x)), self.width, 1)
        outs, sp = [], None
        for i, conv in enumerate(self.convs):
            sp = F.relu(conv(spx[i] if sp is None else sp + spx[i]))
            outs.append(sp)
        return self.head(F.relu(x + self.conv3(torch.cat([*outs, spx[-1]], 1))))


@awkward(image())
class CrossStagePartial(nn.Module):
    """CSP: half bypasses the blocks, the rest is split off at each step (C2f)."""

    def __init__(self, c: int = 8):
        super().__init__()
        self.c, self.stem, self.cv1 = c, stem(12), nn.Conv2d(12, 2 * c, 1)
        self.m = nn.ModuleList(nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.SiLU()) for _ in range(2))
        self.cv2, self.head = nn.Conv2d(4 * c, 12, 1), Head(12)

    def forward(self, x):
        y = list(self.cv1(self.stem(x)).split((self.c, self.c), 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.head(F.silu(self.cv2(torch.cat(y, 1))))


@awkward(image())
class ResidualOnSlice(nn.Module):
    """The branch is added to the first channels only."""

    def __init__(self):
        super().__init__()
        self.stem, self.b, self.c, self.head = stem(16), nn.Conv2d(16, 6, 3, padding=1), nn.Conv2d(16, 10, 1), Head(10)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([x[:, :6] + self.b(x), x[:, 6:]], 1)
        return self.head(F.relu(self.c(x)))


@awkward(image())
class DualPath(nn.Module):
    """DPN: part of the output is a residual sum, part is concatenated."""

    def __init__(self):
        super().__init__()
        self.stem, self.c1, self.c2, self.head = stem(16), nn.Conv2d(16, 20, 1), nn.Conv2d(20, 20, 1), Head(20)

    def forward(self, x):
        x = self.stem(x)
        y = F.relu(self.c1(x))
        x = torch.cat([x[:, :12] + y[:, :12], x[:, 12:], y[:, 12:16]], dim=1)
        z = self.c2(F.relu(x))
        return self.head(torch.cat([x[:, :12] + z[:, :12, :, :], z[:, 12:, :, :]], dim=1))


@awkward(sequence())
class EinsumEverywhere(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(16, 4, 6) * 0.2), nn.Parameter(torch.randn(4, 6, 20) * 0.2)
        self.w3 = nn.Parameter(torch.randn(20, 3) * 0.2)

    def forward(self, x):
        h = F.gelu(torch.einsum("btc,chd->bthd", x, self.w1))
        return torch.einsum("bthd,hdo->bto", h, self.w2).relu() @ self.w3


@awkward(vector())
class MatmulRawWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(16, 24) * 0.2), nn.Parameter(torch.zeros(24))
        self.w2, self.w3 = nn.Parameter(torch.randn(12, 24) * 0.2), nn.Parameter(torch.randn(12, 3))

    def forward(self, x):
        h = torch.relu(x @ self.w1 + self.b1)
        h = torch.mm(h, self.w2.t()).clamp(min=0)
        return torch.addmm(torch.zeros(3, dtype=x.dtype), h, self.w3)


@awkward(vector())
class FunctionalLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.params = nn.ParameterDict(
            {
                "w1": torch.randn(24, 16) * 0.2,
                "b1": torch.zeros(24),
                "w2": torch.randn(12, 24) * 0.2,
                "w3": torch.randn(3, 12),
            }
        )

    def forward(self, x):
        p = self.params
        return F.linear(F.relu(F.linear(F.relu(F.linear(x, p["w1"], p["b1"])), p["w2"])), p["w3"])


@awkward(vector())
class WeightSlices(nn.Module):
    """One raw matrix holds two layers, cut apart by slicing (packed projections)."""

    def __init__(self):
        super().__init__()
        self.packed, self.bias = nn.Parameter(torch.randn(36, 16) * 0.2), nn.Parameter(torch.zeros(36))
        self.out = nn.Linear(12, 3)

    def forward(self, x):
        a = F.linear(x, self.packed[:12], self.bias[:12])
        b = F.linear(x, self.packed[12:24], self.bias[12:24])
        c = F.linear(x, self.packed[24:], self.bias[24:])
        return self.out(a * torch.sigmoid(b) + c)


@awkward(image())
class ChannelsAsBatch(nn.Module):
    """Every channel is filtered by the same one-channel convolution (channels folded into the batch)."""

    def __init__(self):
        super().__init__()
        self.stem, self.f, self.c, self.head = stem(12), nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(12, 16, 1), Head(16)

    def forward(self, x):
        x = self.stem(x)
        n, c, h, w = x.shape
        x = self.f(x.reshape(n * c, 1, h, w)).reshape(n, c, h, w)
        return self.head(F.relu(self.c(x)))


@awkward(image())
class GroupsAsBatch(nn.Module):
    """Four groups of channels share one convolution (groups folded into the batch)."""

    def __init__(self):
        super().__init__()
        self.stem, self.f, self.c, self.head = stem(16), nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(24, 10, 1), Head(10)

    def forward(self, x):
        x = self.stem(x)
        b, _, h, w = x.shape
        x = F.relu(self.f(x.view(b * 4, 4, h, w))).view(b, 24, h, w)
        return self.head(F.relu(self.c(x)))


@awkward(image())
class ShuffleAttention(nn.Module):
    """SA-Net: groups into the batch, halves attended with raw parameters, shuffle back."""

    def __init__(self, c: int = 16, g: int = 2):
        super().__init__()
        self.g, self.stem, self.head = g, stem(c), Head(c)
        k = c // (2 * g)
        self.cw, self.cb, self.sw, self.sb = (nn.Parameter(torch.rand(1, k, 1, 1)) for _ in range(4))
        self.gn = nn.GroupNorm(k, k)

    def forward(self, x):
        x = self.stem(x)
        b, _c, h, w = x.shape
        x0, x1 = x.reshape(b * self.g, -1, h, w).chunk(2, dim=1)
        x0 = x0 * torch.sigmoid(self.cw * x0.mean((2, 3), keepdim=True) + self.cb)
        x1 = x1 * torch.sigmoid(self.sw * self.gn(x1) + self.sb)
        out = torch.cat([x0, x1], dim=1).reshape(b, -1, h, w)
        return self.head(out.reshape(b, 2, -1, h, w).permute(0, 2, 1, 3, 4).reshape(b, -1, h, w))


@awkward(sequence(), cut=None)
class FourierMix(nn.Module):
    """FNet: a two-dimensional Fourier transform over tokens and channels."""

    def __init__(self):
        super().__init__()
        self.inp, self.n1 = nn.Linear(16, 16), nn.LayerNorm(16)
        self.up, self.down, self.out = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.inp(x)
        x = self.n1(x + torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real)
        return self.out(x + self.down(F.gelu(self.up(x))))


@awkward(signal(4, 16), cut=None)
class SpectralConv(nn.Module):
    """Fourier neural operator: complex weights on the low frequencies."""

    def __init__(self, c: int = 8, modes: int = 4):
        super().__init__()
        self.modes, self.lift = modes, nn.Conv1d(4, c, 1)
        self.weight = nn.Parameter(torch.randn(c, c, modes, dtype=torch.cfloat) * 0.2)
        self.skip, self.up, self.out = nn.Conv1d(c, c, 1), nn.Conv1d(c, 20, 1), nn.Conv1d(20, 1, 1)

    def forward(self, x):
        x = self.lift(x)
        f = torch.fft.rfft(x)
        low = torch.einsum("bix,iox->box", f[..., : self.modes], self.weight.to(f.dtype))
        low = F.pad(torch.view_as_real(low), (0, 0, 0, f.shape[-1] - self.modes))
        return self.out(
            F.gelu(self.up(F.gelu(torch.fft.irfft(torch.view_as_complex(low), n=x.shape[-1]) + self.skip(x))))
        )


@awkward(image())
class HaarDownsample(nn.Module):
    """A wavelet written with slices, joined over channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.c, self.head = stem(6), nn.Conv2d(24, 12, 1), Head(12)

    def forward(self, x):
        x = self.stem(x)
        a, b, c, d = x[:, :, 0::2, 0::2], x[:, :, 1::2, 0::2], x[:, :, 0::2, 1::2], x[:, :, 1::2, 1::2]
        return self.head(F.relu(self.c(torch.cat([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d], 1) / 2)))


@awkward(signal(3, 8))
class ExpandAcrossTime(nn.Module):
    """A pooled vector is expanded over time and joined to every step (PointNet segmentation)."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv1d(3, 12, 1), nn.Conv1d(12, 20, 1), nn.Conv1d(32, 4, 1)
        self.bn = nn.BatchNorm1d(20)

    def forward(self, x):
        local = F.relu(self.a(x))
        top = torch.max(F.relu(self.bn(self.b(local))), 2, keepdim=True)[0].expand(-1, -1, x.size(2))
        return self.c(torch.cat([local, top], 1))


@awkward(vector())
class OuterProduct(nn.Module):
    """Compact interaction: the outer product of two embeddings, flattened."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 6), nn.Linear(16, 8), nn.Linear(48, 4)

    def forward(self, x):
        u, v = F.relu(self.a(x)), torch.tanh(self.b(x))
        return self.c((u.unsqueeze(2) * v.unsqueeze(1)).flatten(1))


@awkward(image())
class BilinearPooling(nn.Module):
    """B-CNN: the Gram matrix of the features, signed root, unit length."""

    def __init__(self):
        super().__init__()
        self.a, self.fc = nn.Sequential(stem(8), nn.Conv2d(8, 6, 3), nn.ReLU()), nn.Linear(36, 4)

    def forward(self, x):
        x = self.a(x).flatten(2)
        g = torch.bmm(x, x.transpose(1, 2)) / x.shape[2]
        g = g.view(-1, 36)
        return self.fc(F.normalize(torch.sign(g) * torch.sqrt(g.abs() + 1e-5)))


@awkward(vector(8), cut=None)
class TrilInteractions(nn.Module):
    """DLRM: pairwise dot products of embeddings, lower triangle only."""

    def __init__(self):
        super().__init__()
        self.fs = nn.ModuleList(nn.Linear(8, 10) for _ in range(4))
        self.top = nn.Linear(6 + 10, 12)
        self.out = nn.Linear(12, 1)

    def forward(self, x):
        e = [f(x) for f in self.fs]
        t = torch.stack(e, 1)
        i, j = torch.tril_indices(4, 4, -1)
        z = torch.bmm(t, t.transpose(1, 2))[:, i, j]
        return self.out(F.relu(self.top(torch.cat([e[0], z], 1))))
