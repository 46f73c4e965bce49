"""Norms over every axis, in modules and by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.suites.awkward.collect import awkward, image, sequence, signal, vector
from benchmarks.suites.awkward.conv import Head


@awkward(sequence())
def LayerNormLast():
    return nn.Sequential(
        nn.Linear(16, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 24), nn.LayerNorm(24), nn.Linear(24, 4)
    )


@awkward(sequence(), cut=None)
class LayerNormHardCoded(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 4)

    def forward(self, x):
        return self.b(F.relu(F.layer_norm(self.a(x), (24,))))


@awkward(sequence())
class LayerNormFunctionalShape(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 4)
        self.w, self.bias = nn.Parameter(torch.ones(24)), nn.Parameter(torch.zeros(24))

    def forward(self, x):
        x = self.a(x)
        return self.b(F.layer_norm(x, x.shape[-1:], self.w, self.bias, 1e-6))


@awkward(sequence())
class LayerNormShapeTuple(nn.Module):
    def __init__(self, width: int = 24):
        super().__init__()
        self.normalized_shape = (width,)
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.a, self.b = nn.Linear(16, width), nn.Linear(width, 4)

    def forward(self, x):
        return self.b(F.layer_norm(self.a(x), self.normalized_shape, self.weight, self.bias))


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of (N, C, H, W)."""

    def forward(self, x):
        return F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps).permute(
            0, 3, 1, 2
        )


@awkward(image())
def LayerNormChannelsFirst():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), LayerNorm2d(16), nn.GELU(), nn.Conv2d(16, 24, 3), LayerNorm2d(24), nn.GELU(), Head(24)
    )


@awkward(image())
class LayerNormByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.weight, self.bias = nn.Parameter(torch.ones(16)), nn.Parameter(torch.zeros(16))
        self.conv2 = nn.Conv2d(16, 12, 1)
        self.head = Head(12)

    def forward(self, x):
        x = self.conv(x)
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + 1e-6)
        x = self.weight[:, None, None] * x + self.bias[:, None, None]
        return self.head(F.relu(self.conv2(x)))


@awkward(image(), cut=None)
def LayerNormWholeImage():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.LayerNorm([16, 6, 6]),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3),
        nn.LayerNorm([8, 4, 4]),
        nn.ReLU(),
        Head(8),
    )


@awkward(image())
def LayerNormSpatialOnly():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.LayerNorm([6, 6]), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(), Head(8))


@awkward(image())
def GroupNorm():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3),
        nn.GroupNorm(8, 24),
        nn.ReLU(),
        Head(24),
    )


@awkward(image())
def GroupNormOneGroup():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.GroupNorm(1, 16),
        nn.ReLU(),
        nn.Conv2d(16, 12, 3),
        nn.GroupNorm(1, 12, affine=False),
        nn.ReLU(),
        Head(12),
    )


@awkward(image())
def GroupNormPerChannel():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.GroupNorm(16, 16), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.ReLU(), Head(12)
    )


@awkward(image())
class GroupNormFunctional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.conv2 = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 12, 3)
        self.w, self.b = nn.Parameter(torch.ones(16)), nn.Parameter(torch.zeros(16))
        self.head = Head(12)

    def forward(self, x):
        return self.head(F.relu(self.conv2(F.relu(F.group_norm(self.conv(x), 4, self.w, self.b)))))


@awkward(image())
class GroupNormTwoWidths(nn.Module):
    """A group norm over a concatenation of unequal branches."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 16, 3, padding=1)
        self.gn, self.c = nn.GroupNorm(6, 24), nn.Conv2d(24, 12, 1)
        self.head = Head(12)

    def forward(self, x):
        return self.head(F.relu(self.c(self.gn(torch.cat([self.a(x), self.b(x)], 1)))))


@awkward(image())
def InstanceNorm():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.InstanceNorm2d(16, affine=True),
        nn.ReLU(),
        nn.Conv2d(16, 12, 3),
        nn.InstanceNorm2d(12, affine=True, track_running_stats=True),
        nn.ReLU(),
        nn.Conv2d(12, 8, 1),
        nn.InstanceNorm2d(8),
        nn.ReLU(),
        Head(8),
    )


@awkward(signal(3, 16))
class InstanceNormFunctional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 12, 3), nn.Conv1d(12, 4, 3)

    def forward(self, x):
        return self.b(F.leaky_relu(F.instance_norm(self.a(x)))).mean(-1)


@awkward(image())
class FunctionalBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, bias=False)
        self.gamma, self.beta = nn.Parameter(torch.ones(16)), nn.Parameter(torch.zeros(16))
        self.register_buffer("running_mean", torch.zeros(16))
        self.register_buffer("running_var", torch.ones(16))
        self.head = Head(16)

    def forward(self, x):
        x = F.batch_norm(
            self.conv(x), self.running_mean, self.running_var, self.gamma, self.beta, self.training, 0.1, 1e-5
        )
        return self.head(F.relu(x))


@awkward(image())
class FrozenBatchNorm(nn.Module):
    """Detection's frozen norm: four buffers folded into scale and shift."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, bias=False)
        for name in ("weight", "bias", "mean", "var"):
            self.register_buffer(name, torch.rand(16) + 0.5)
        self.conv2 = nn.Conv2d(16, 12, 3)
        self.head = Head(12)

    def forward(self, x):
        w = self.weight.reshape(1, -1, 1, 1)
        scale = w * (self.var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        shift = self.bias.reshape(1, -1, 1, 1) - self.mean.reshape(1, -1, 1, 1) * scale
        return self.head(F.relu(self.conv2(F.relu(self.conv(x) * scale + shift))))


@awkward(image())
def BatchNormBare():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16, affine=False),
        nn.ReLU(),
        nn.Conv2d(16, 12, 3),
        nn.BatchNorm2d(12, track_running_stats=False),
        nn.ReLU(),
        nn.Conv2d(12, 8, 1),
        nn.SyncBatchNorm(8),
        nn.ReLU(),
        Head(8),
    )


@awkward(image())
def BatchNormAfterFlatten():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.BatchNorm1d(72),
        nn.Dropout(0.3),
        nn.Linear(72, 20),
        nn.BatchNorm1d(20),
        nn.ReLU(),
        nn.Linear(20, 5, bias=False),
        nn.BatchNorm1d(5, affine=False),
    )


@awkward(image())
class BatchNormAfterConcat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 10, 3), nn.Conv2d(3, 6, 3)
        self.bn, self.c = nn.BatchNorm2d(16), nn.Conv2d(16, 12, 1)
        self.head = Head(12)

    def forward(self, x):
        return self.head(F.relu(self.c(F.relu(self.bn(torch.cat((self.a(x), self.b(x)), 1))))))


@awkward(sequence(5, 12))
class BatchNormOverTime(nn.Module):
    """Batch norm of (N*T, C) and of (N, C, T)."""

    def __init__(self):
        super().__init__()
        self.a, self.bn1 = nn.Linear(12, 16), nn.BatchNorm1d(16)
        self.b, self.bn2 = nn.Linear(16, 20), nn.BatchNorm1d(20)
        self.out = nn.Linear(20, 3)

    def forward(self, x):
        n, t = x.shape[:2]
        x = F.relu(self.bn1(self.a(x).view(n * t, -1))).view(n, t, -1)
        x = F.relu(self.bn2(self.b(x).transpose(1, 2)).transpose(1, 2))
        return self.out(x[:, -1])


class RMSNorm(nn.Module):
    """Llama's norm."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        v = x.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(v + 1e-6)).to(x.dtype)


@awkward(sequence())
def RMSNormByHand():
    return nn.Sequential(nn.Linear(16, 24), RMSNorm(24), nn.SiLU(), nn.Linear(24, 12), RMSNorm(12), nn.Linear(12, 4))


@awkward(sequence())
def RMSNormModule():
    return nn.Sequential(
        nn.Linear(16, 24),
        nn.RMSNorm(24),
        nn.SiLU(),
        nn.Linear(24, 12),
        nn.RMSNorm([12], elementwise_affine=False),
        nn.Linear(12, 4),
    )


@awkward(image())
class RMSNormChannelsFirst(nn.Module):
    """Diffusion's norm: unit length over the channels times sqrt(channels)."""

    def __init__(self):
        super().__init__()
        self.conv, self.g = nn.Conv2d(3, 16, 3), nn.Parameter(torch.ones(1, 16, 1, 1))
        self.head = Head(16)

    def forward(self, x):
        x = self.conv(x)
        return self.head(F.silu(F.normalize(x, dim=1) * self.g * (x.shape[1] ** 0.5)))


@awkward(image())
def LocalResponseNorm():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.LocalResponseNorm(5), nn.Conv2d(16, 12, 3), nn.ReLU(), Head(12)
    )


@awkward(image())
class GlobalResponseNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 8, 1)
        self.gamma, self.beta = nn.Parameter(torch.zeros(1, 16, 1, 1)), nn.Parameter(torch.zeros(1, 16, 1, 1))
        self.head = Head(8)

    def forward(self, x):
        x = F.gelu(self.a(x))
        g = x.norm(p=2, dim=(2, 3), keepdim=True)
        x = x + self.gamma * (x * g / (g.mean(1, keepdim=True) + 1e-6)) + self.beta
        return self.head(self.b(x))


@awkward(image())
class FilterResponseNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.gamma, self.beta, self.tau = (nn.Parameter(torch.zeros(1, 16, 1, 1)) for _ in range(3))
        self.head = Head(16)

    def forward(self, x):
        x = self.conv(x)
        x = x * torch.rsqrt(x.square().mean((2, 3), keepdim=True) + 1e-6)
        return self.head(torch.maximum(self.gamma * x + self.beta, self.tau))


@awkward(vector(16))
class CosineClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 24)
        self.weight, self.scale = nn.Parameter(torch.randn(5, 24)), nn.Parameter(torch.tensor(8.0))

    def forward(self, x):
        x = F.relu(self.fc(x))
        return self.scale * F.linear(F.normalize(x), F.normalize(self.weight, dim=1))
