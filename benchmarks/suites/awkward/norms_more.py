"""Norms that share, gate or mix statistics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from benchmarks.suites.awkward.collect import awkward, image, sequence, signal, vector
from benchmarks.suites.awkward.conv import Head, stem


@awkward(sequence())
class ScaleNorm(nn.Module):
    """One learned length for the whole vector."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.g = nn.Linear(16, 24), nn.Linear(24, 4), nn.Parameter(torch.tensor(24.0**0.5))

    def forward(self, x):
        x = self.a(x)
        return self.b(x * (self.g / torch.norm(x, dim=-1, keepdim=True).clamp(min=1e-5)))


@awkward(image())
class SwitchableNorm(nn.Module):
    """Instance, layer and batch statistics mixed by a softmax."""

    def __init__(self, c: int = 12):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, c, 3), Head(c)
        self.weight, self.bias = nn.Parameter(torch.ones(1, c, 1, 1)), nn.Parameter(torch.zeros(1, c, 1, 1))
        self.mean_weight, self.var_weight = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        self.register_buffer("running_mean", torch.zeros(1, c, 1))
        self.register_buffer("running_var", torch.ones(1, c, 1))

    def forward(self, x):
        x = self.conv(x)
        n, c, h, w = x.size()
        x = x.view(n, c, -1)
        mean_in, var_in = x.mean(-1, keepdim=True), x.var(-1, keepdim=True)
        temp = var_in + mean_in**2
        mean_ln = mean_in.mean(1, keepdim=True)
        var_ln = temp.mean(1, keepdim=True) - mean_ln**2
        m, v = self.mean_weight.softmax(0), self.var_weight.softmax(0)
        mean = m[0] * mean_in + m[1] * mean_ln + m[2] * self.running_mean
        var = v[0] * var_in + v[1] * var_ln + v[2] * self.running_var
        x = ((x - mean) / (var + 1e-5).sqrt()).view(n, c, h, w)
        return self.head(F.relu(x * self.weight + self.bias))


@awkward(image())
def GroupNormPairs():
    """Return a model whose groups of the norm and of the convolution do not coincide."""
    return nn.Sequential(
        stem(24),
        nn.Conv2d(24, 24, 3, groups=2, padding=1),
        nn.GroupNorm(3, 24),
        nn.ReLU(),
        nn.Conv2d(24, 12, 1),
        Head(12),
    )


@awkward(signal(3, 12))
def NormsInOneDimension():
    return nn.Sequential(
        nn.Conv1d(3, 12, 3),
        nn.BatchNorm1d(12),
        nn.ELU(),
        nn.Conv1d(12, 16, 3),
        nn.GroupNorm(2, 16),
        nn.Mish(),
        nn.Conv1d(16, 8, 1),
        nn.InstanceNorm1d(8, affine=True),
        nn.Hardswish(),
        nn.AdaptiveAvgPool1d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


@awkward(sequence())
class PostNormResidual(nn.Module):
    """Post-norm residual stack: the stream itself passes through the norms."""

    def __init__(self):
        super().__init__()
        self.inp = nn.Linear(16, 24)
        self.fs = nn.ModuleList(nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 24)) for _ in range(2))
        self.ns = nn.ModuleList(nn.LayerNorm(24) for _ in range(2))
        self.out = nn.Linear(24, 3)

    def forward(self, x):
        x = self.inp(x)
        for f, n in zip(self.fs, self.ns, strict=True):
            x = n(x + f(x))
        return self.out(x)


@awkward(image())
class MeanOnlyOverChannels(nn.Module):
    """CBAM's spatial gate: mean and maximum over the channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.gate, self.c, self.head = (
            stem(16),
            nn.Conv2d(2, 1, 3, padding=1),
            nn.Conv2d(16, 12, 1),
            Head(12),
        )

    def forward(self, x):
        x = self.stem(x)
        s = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
        return self.head(F.relu(self.c(x * torch.sigmoid(self.gate(s)))))


@awkward(image())
class PositionalNorm(nn.Module):
    """Moments over channels are removed, kept and injected later (PONO)."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 16, 3, padding=1), Head(16)

    def forward(self, x):
        x = self.a(x)
        m, s = x.mean(dim=1, keepdim=True), x.std(dim=1, keepdim=True) + 1e-5
        return self.head(F.relu(self.b((x - m) / s) * s + m))


@awkward(image())
class SoftmaxOverChannels(nn.Module):
    """The hidden features are a distribution over channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = stem(12), nn.Conv2d(12, 16, 3), Head(16)

    def forward(self, x):
        return self.head(F.relu(self.b(self.a(x).softmax(dim=1) * 12)))


@awkward(image())
class NetVLAD(nn.Module):
    """Soft assignment to clusters; residual sums; two norms; raw centroids."""

    def __init__(self, k: int = 4, d: int = 8):
        super().__init__()
        self.k, self.d = k, d
        self.stem, self.assign = stem(d), nn.Conv2d(d, k, 1)
        self.centroids, self.fc = nn.Parameter(torch.rand(k, d)), nn.Linear(k * d, 6)

    def forward(self, x):
        x = F.normalize(self.stem(x), p=2, dim=1)
        n, c = x.shape[:2]
        a = F.softmax(self.assign(x).view(n, self.k, -1), dim=1)
        r = x.view(n, 1, c, -1) - self.centroids.view(1, self.k, self.d, 1)
        v = F.normalize((r * a.unsqueeze(2)).sum(-1), p=2, dim=2)
        return self.fc(F.normalize(v.view(n, -1), p=2, dim=1))


@awkward(image())
class GeM(nn.Module):
    """Generalised mean pooling with a learned power, whitening, unit length out."""

    def __init__(self):
        super().__init__()
        self.stem, self.p, self.fc = stem(16), nn.Parameter(torch.ones(1) * 3), nn.Linear(16, 8)

    def forward(self, x):
        x = self.stem(x).clamp(min=1e-6).pow(self.p)
        x = F.avg_pool2d(x, (x.size(-2), x.size(-1))).pow(1.0 / self.p)
        return F.normalize(self.fc(x.flatten(1)), dim=-1)


@awkward(vector())
def WeightNormMLP():
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(16, 24)),
        nn.ReLU(),
        parametrizations.weight_norm(nn.Linear(24, 12), dim=None),
        nn.ReLU(),
        nn.Linear(12, 3),
    )


@awkward(vector(), cut=None)
def WeightNormOverInputs():
    return nn.Sequential(
        nn.Linear(16, 24),
        nn.ReLU(),
        parametrizations.weight_norm(nn.Linear(24, 12), dim=1),
        nn.ReLU(),
        nn.Linear(12, 3),
    )


@awkward(vector(), cut=None)
def OrthogonalParametrization():
    return nn.Sequential(
        nn.Linear(16, 12), nn.ReLU(), parametrizations.orthogonal(nn.Linear(12, 12)), nn.ReLU(), nn.Linear(12, 3)
    )


@awkward(image())
class InputNormalisation(nn.Module):
    """Mean and standard deviation buffers of the image channels, and learned per-channel statistics inside."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.conv, self.head = nn.Conv2d(3, 12, 3), Head(12)
        self.register_buffer("inner_mean", torch.rand(12))
        self.register_buffer("inner_std", torch.rand(12) + 0.5)

    def forward(self, x):
        x = F.relu(self.conv((x - self.mean) / self.std))
        return self.head((x - self.inner_mean[None, :, None, None]) / self.inner_std[None, :, None, None])


@awkward(image())
class SimAM(nn.Module):
    """Parameter-free attention from spatial moments; n is h * w - 1."""

    def __init__(self):
        super().__init__()
        self.stem, self.c, self.head = stem(12), nn.Conv2d(12, 16, 1), Head(16)

    def forward(self, x):
        x = self.stem(x)
        n = x.shape[2] * x.shape[3] - 1
        d = (x - x.mean(dim=[2, 3], keepdim=True)).pow(2)
        e = d / (4 * (d.sum(dim=[2, 3], keepdim=True) / n + 1e-4)) + 0.5
        return self.head(F.relu(self.c(x * torch.sigmoid(e))))


@awkward(sequence())
class GroupRMSHeads(nn.Module):
    """A norm per head after a view (retention): statistics within each head."""

    def __init__(self, heads: int = 4):
        super().__init__()
        self.heads, self.a, self.g, self.b = heads, nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 3)

    def forward(self, x):
        y = self.a(x).view(x.size(0), x.size(1), self.heads, -1)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.b(y.flatten(2) * F.silu(self.g(x)))


@awkward(image())
class BatchStatsByHand(nn.Module):
    """Running statistics updated in the forward with copy_ and lerp_."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 12, 3), Head(12)
        self.register_buffer("mean", torch.zeros(12))
        self.register_buffer("var", torch.ones(12))
        self.gain = nn.Parameter(torch.ones(12))

    def forward(self, x):
        x = self.conv(x)
        if self.training:
            m, v = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
            self.mean.lerp_(m.detach(), 0.1)
            self.var.copy_(0.9 * self.var + 0.1 * v.detach())
        else:
            m, v = self.mean, self.var
        x = (x - m[None, :, None, None]) * (self.gain / (v + 1e-5).sqrt())[None, :, None, None]
        return self.head(F.relu(x))
