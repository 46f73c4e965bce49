"""Convolutions whose weights are computed: fixed filters, standardised, normed, mixed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from benchmarks.suites.awkward.collect import awkward, image
from benchmarks.suites.awkward.conv import Head, stem


class BlurPool(nn.Module):
    """Anti-aliased stride 2 with a fixed filter kept per channel in a buffer."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        row = torch.tensor([1.0, 2.0, 1.0])
        kernel = row[:, None] * row[None, :] / 16
        self.register_buffer("filt", kernel[None, None].repeat(channels, 1, 1, 1))

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.filt, stride=2, groups=self.channels)


@awkward(image())
def BlurPooling():
    return nn.Sequential(stem(16), BlurPool(16), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), BlurPool(24), Head(24))


@awkward(image())
class BlurPoolingExpanded(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = stem(16)
        self.register_buffer("kernel", torch.ones(1, 1, 3, 3) / 9, persistent=False)
        self.conv = nn.Conv2d(16, 12, 1)
        self.head = Head(12)

    def forward(self, x):
        x = self.stem(x)
        c = x.shape[1]
        x = F.conv2d(x, self.kernel.expand(c, 1, 3, 3), stride=2, padding=1, groups=c)
        return self.head(F.relu(self.conv(x)))


class StdConv2d(nn.Conv2d):
    """Weight-standardised convolution."""

    def forward(self, x):
        v, m = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        return F.conv2d(x, (self.weight - m) / torch.sqrt(v + 1e-5), self.bias, self.stride, self.padding)


@awkward(image())
def WeightStandardisation():
    return nn.Sequential(
        StdConv2d(3, 16, 3),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        StdConv2d(16, 24, 3),
        nn.GroupNorm(4, 24),
        nn.ReLU(),
        Head(24),
    )


@awkward(image())
class WeightStandardisationByBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = stem(12)
        self.conv = nn.Conv2d(12, 16, 3)
        self.gain = nn.Parameter(torch.full((16, 1, 1, 1), 0.3))
        self.head = Head(16)

    def forward(self, x):
        weight = F.batch_norm(
            self.conv.weight.reshape(1, 16, -1), None, None, weight=self.gain.view(-1), training=True, momentum=0.0
        ).reshape_as(self.conv.weight)
        return self.head(F.relu(F.conv2d(self.stem(x), weight, self.conv.bias)))


@awkward(image())
def WeightNormParametrization():
    return nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(3, 16, 3)),
        nn.ReLU(),
        parametrizations.weight_norm(nn.Conv2d(16, 24, 3)),
        nn.ReLU(),
        nn.Flatten(),
        parametrizations.weight_norm(nn.Linear(24 * 16, 10)),
        nn.ReLU(),
        nn.Linear(10, 3),
    )


@awkward(image(), cut=None)
def SpectralNormParametrization():
    return nn.Sequential(
        parametrizations.spectral_norm(nn.Conv2d(3, 16, 3)),
        nn.LeakyReLU(0.2),
        parametrizations.spectral_norm(nn.Conv2d(16, 24, 3)),
        nn.LeakyReLU(0.2),
        Head(24),
    )


class Symmetric(nn.Module):
    """Parametrization that keeps a kernel left-right symmetric."""

    def forward(self, w):
        return (w + w.flip(-1)) / 2


@awkward(image())
def CustomParametrization():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(), Head(8))
    parametrize.register_parametrization(model[2], "weight", Symmetric())
    return model


@awkward(image(), cut=None)
class CondConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = stem(8)
        self.route = nn.Linear(8, 3)
        self.experts = nn.Parameter(torch.randn(3, 12, 8, 3, 3) * 0.1)
        self.head = Head(12)

    def forward(self, x):
        x = self.stem(x)
        b, c, h, w = x.shape
        r = torch.sigmoid(self.route(x.mean((2, 3))))
        weight = torch.einsum("be,eocij->bocij", r, self.experts).reshape(b * 12, c, 3, 3)
        y = F.conv2d(x.reshape(1, b * c, h, w), weight, padding=1, groups=b)
        return self.head(F.relu(y.view(b, 12, h, w)))
