"""Convolutions in every form that users write."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import DeformConv2d, deform_conv2d

from benchmarks.suites.awkward.collect import awkward, image, signal


class Head(nn.Module):
    """Global average pooling and a classifier."""

    def __init__(self, width: int, classes: int = 5):
        super().__init__()
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


def stem(width: int = 16) -> nn.Sequential:
    """Return a 3x3 convolution with batch norm and ReLU."""
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())


@awkward(image())
class FunctionalConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(16, 3, 3, 3) * 0.2)
        self.b1 = nn.Parameter(torch.randn(16) * 0.1)
        self.w2 = nn.Parameter(torch.randn(24, 16, 3, 3) * 0.1)
        self.w3 = nn.Parameter(torch.randn(5, 24) * 0.1)

    def forward(self, x):
        x = F.relu(F.conv2d(x, self.w1, self.b1, padding=1))
        x = F.relu(F.conv2d(x, self.w2, stride=2))
        return F.linear(x.mean((2, 3)), self.w3)


@awkward(signal(4, 12))
class FunctionalConv1d(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(12, 4, 3) * 0.3, torch.randn(8, 12, 3) * 0.2])
        self.gain = nn.Parameter(torch.ones(1, 12, 1))
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.tanh(F.conv1d(x, self.weights[0], padding=1) * self.gain)
        return self.out(F.conv1d(x, self.weights[1]).amax(-1))


@awkward(lambda n: torch.randn(n, 2, 6, 6, 6))
def Conv3d():
    return nn.Sequential(
        nn.Conv3d(2, 8, 3, padding=1),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(8, 12, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


@awkward(image())
def GroupedConv():
    return nn.Sequential(
        stem(16),
        nn.Conv2d(16, 24, 3, groups=4, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 12, 1, groups=2),
        nn.ReLU(),
        Head(12),
    )


@awkward(image())
def GroupedConvUnequalRatio():
    return nn.Sequential(
        stem(12),
        nn.Conv2d(12, 36, 3, groups=6),
        nn.BatchNorm2d(36),
        nn.SiLU(),
        nn.Conv2d(36, 18, 3, groups=9),
        Head(18),
    )


@awkward(image())
def DepthwiseConv():
    return nn.Sequential(
        stem(16),
        nn.Conv2d(16, 16, 3, groups=16, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
        nn.Conv2d(16, 24, 1),
        nn.ReLU(),
        Head(24),
    )


@awkward(image())
def DepthwiseMultiplier():
    return nn.Sequential(
        stem(8), nn.Conv2d(8, 24, 3, groups=8, padding=1), nn.BatchNorm2d(24), nn.GELU(), nn.Conv2d(24, 10, 1), Head(10)
    )


@awkward(image(6), cut=None)
def DepthwiseOnInput():
    return nn.Sequential(nn.Conv2d(6, 12, 3, groups=6), nn.ReLU(), nn.Conv2d(12, 8, 1), nn.ReLU(), Head(8))


@awkward(image())
def TransposedConv():
    return nn.Sequential(
        stem(16),
        nn.Conv2d(16, 24, 4, 2, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(24, 12, 4, 2, 1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 3, 3, 1, 1),
    )


@awkward(image())
def GroupedTransposedConv():
    return nn.Sequential(
        stem(16),
        nn.ConvTranspose2d(16, 24, 2, 2, groups=4),
        nn.ReLU(),
        nn.ConvTranspose2d(24, 8, 2, 2, groups=2, bias=False),
        nn.ReLU(),
        Head(8),
    )


@awkward(image())
def DepthwiseTransposedConv():
    return nn.Sequential(
        stem(16),
        nn.ConvTranspose2d(16, 16, 2, 2, groups=16),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 32, 2, 2, groups=16),
        Head(32),
    )


@awkward(signal(3, 16))
def Transposed1d():
    return nn.Sequential(
        nn.Conv1d(3, 12, 4, 4), nn.LeakyReLU(), nn.ConvTranspose1d(12, 8, 4, 4), nn.LeakyReLU(), nn.Conv1d(8, 1, 1)
    )


@awkward(image())
class DeformableConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = stem(16)
        self.offset = nn.Conv2d(16, 2 * 9, 3, padding=1)
        self.mask = nn.Conv2d(16, 9, 3, padding=1)
        self.conv = DeformConv2d(16, 24, 3, padding=1)
        self.head = Head(24)

    def forward(self, x):
        x = self.stem(x)
        return self.head(F.relu(self.conv(x, self.offset(x), torch.sigmoid(self.mask(x)))))


@awkward(image(), cut=None)
class FunctionalDeformable(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = stem(8)
        self.offset = nn.Conv2d(8, 2 * 9 * 2, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(12, 4, 3, 3) * 0.1)
        self.head = Head(12)

    def forward(self, x):
        x = self.stem(x)
        return self.head(deform_conv2d(x, self.offset(x), self.weight, padding=1))


@awkward(image())
class ChannelConvECA(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = stem(16)
        self.eca = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.conv = nn.Conv2d(16, 24, 3)
        self.head = Head(24)

    def forward(self, x):
        x = self.stem(x)
        y = self.eca(F.adaptive_avg_pool2d(x, 1).squeeze(-1).transpose(-1, -2))
        x = x * torch.sigmoid(y.transpose(-1, -2).unsqueeze(-1)).expand_as(x)
        return self.head(F.relu(self.conv(x)))


@awkward(image())
class PartialConv(nn.Module):
    """FasterNet: only the first quarter of the channels is convolved."""

    def __init__(self):
        super().__init__()
        self.stem = stem(16)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.pw = nn.Conv2d(16, 32, 1)
        self.head = Head(32)

    def forward(self, x):
        x1, x2 = torch.split(self.stem(x), [4, 12], dim=1)
        return self.head(F.relu(self.pw(torch.cat((self.conv(x1), x2), 1))))


@awkward(image())
class PartialConvSliceAssign(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = stem(16)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.pw = nn.Conv2d(16, 32, 1)
        self.head = Head(32)

    def forward(self, x):
        x = self.stem(x).clone()
        x[:, :4, :, :] = self.conv(x[:, :4, :, :])
        return self.head(F.relu(self.pw(x)))


@awkward(image())
class MixConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = stem(16)
        self.splits = [6, 5, 5]
        self.convs = nn.ModuleList(
            nn.Conv2d(c, c, k, padding=k // 2, groups=c) for c, k in zip(self.splits, (3, 5, 7), strict=True)
        )
        self.pw = nn.Conv2d(16, 12, 1)
        self.head = Head(12)

    def forward(self, x):
        parts = torch.split(self.stem(x), self.splits, 1)
        return self.head(F.relu(self.pw(torch.cat([c(p) for c, p in zip(self.convs, parts, strict=True)], 1))))


@awkward(image())
class OctaveConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.high, self.low = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.hh, self.hl = nn.Conv2d(12, 10, 3, padding=1), nn.Conv2d(12, 6, 3, padding=1)
        self.lh, self.ll = nn.Conv2d(4, 10, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        h, low = F.relu(self.high(x)), F.relu(self.low(F.avg_pool2d(x, 2)))
        y = F.relu(self.hh(h) + F.interpolate(self.lh(low), scale_factor=2, mode="nearest"))
        z = F.relu(self.ll(low) + self.hl(F.avg_pool2d(h, 2)))
        return self.fc(torch.cat([y.mean((2, 3)), z.mean((2, 3))], 1))


@awkward(image())
class RepVGGBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = stem(16)
        self.c3, self.b3 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.c1, self.b1 = nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.identity = nn.BatchNorm2d(16)
        self.last = nn.Conv2d(16, 20, 1)
        self.head = Head(20)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(self.b3(self.c3(x)) + self.b1(self.c1(x)) + self.identity(x))
        return self.head(F.relu(self.last(x)))


@awkward(image())
class GhostModule(nn.Module):
    def __init__(self, out: int = 20):
        super().__init__()
        self.out = out
        self.primary = nn.Sequential(nn.Conv2d(3, out // 2, 1), nn.BatchNorm2d(out // 2), nn.ReLU())
        self.cheap = nn.Conv2d(out // 2, out // 2, 3, padding=1, groups=out // 2)
        self.head = Head(out - 2)

    def forward(self, x):
        a = self.primary(x)
        x = torch.cat([a, F.relu(self.cheap(a))], dim=1)
        return self.head(x[:, : self.out - 2, :, :])


@awkward(signal(1, 20))
class GatedCausalConv(nn.Module):
    """WaveNet: gated activation, residual and skip sums, causal padding."""

    def __init__(self):
        super().__init__()
        self.inp = nn.Conv1d(1, 8, 1)
        self.dil = nn.ModuleList(nn.Conv1d(8, 16, 2, dilation=2**i) for i in range(3))
        self.res = nn.ModuleList(nn.Conv1d(8, 8, 1) for _ in range(3))
        self.skip = nn.ModuleList(nn.Conv1d(8, 12, 1) for _ in range(3))
        self.out = nn.Conv1d(12, 4, 1)

    def forward(self, x):
        x, skips = self.inp(x), 0
        for i, (d, r, s) in enumerate(zip(self.dil, self.res, self.skip, strict=True)):
            y = d(F.pad(x, (2**i, 0)))
            y = torch.tanh(y[:, :8]) * torch.sigmoid(y[:, 8:])
            skips = skips + s(y)
            x = x + r(y)
        return self.out(F.relu(skips))
