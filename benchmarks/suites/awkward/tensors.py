"""The long tail of operators on tensors, and those for which the order of channels matters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.suites.awkward.collect import awkward, image, sequence, vector
from benchmarks.suites.awkward.conv import Head


@awkward(image())
class InPlaceEverywhere(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1), Head(12)

    def forward(self, x):
        x = self.a(x).relu_()
        y = self.b(x)
        y += x
        y.mul_(0.5).clamp_(-3, 3)
        y[:, :, 0] *= 2
        return self.head(y.add_(1.0))


@awkward(vector())
class TensorMethods(nn.Module):
    """The long tail of pointwise and reducing methods."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.out = nn.Linear(16, 20), nn.Linear(20, 20), nn.Linear(20, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = self.a(x)
        x = torch.where(x > 0, x, torch.expm1(x)).clip(-5, 5)
        y = torch.addcmul(x, x.sin(), x.cos(), value=0.5).type_as(x).contiguous()
        y = torch.lerp(y, self.b(y).erf(), 0.3).nan_to_num() + torch.logaddexp(x, y) - torch.hypot(x, y)
        y = self.c(y.maximum(x).minimum(x.abs() + 1)).masked_fill(torch.zeros(12, dtype=torch.bool), 0.0)
        return self.out(F.threshold(F.softsign(F.softplus(y)), 0.1, 0.0).square().cumsum(0) - y.sort(0).values)


@awkward(sequence(6, 16), cut=None)
class SortedChannels(nn.Module):
    """Top values over the features and a sort of them: their order depends on the data."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(16, 20), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(F.relu(self.b(self.a(x).topk(5, dim=-1).values)))


@awkward(sequence(6, 16), cut=None)
class CumulativeOverChannels(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(16, 12), nn.Linear(12, 20), nn.Linear(20, 3)

    def forward(self, x):
        return self.out(F.relu(self.b(torch.cumsum(self.a(x), dim=-1))))


@awkward(sequence(6, 16), cut=None)
class DifferenceOfChannels(nn.Module):
    """Finite differences along the features: neighbours are not interchangeable."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(16, 12), nn.Linear(11, 20), nn.Linear(20, 3)

    def forward(self, x):
        h = self.a(x)
        return self.out(F.relu(self.b(h[..., 1:] - h[..., :-1])))


@awkward(sequence(6, 16), cut=None)
class DotWithRange(nn.Module):
    """The expected index: a product with arange over the channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(16, 12), nn.Linear(1, 20), nn.Linear(20, 3)

    def forward(self, x):
        p = self.a(x).softmax(-1)
        position = (p * torch.arange(12, dtype=p.dtype)).sum(-1, keepdim=True)
        return self.out(F.relu(self.b(position)))


@awkward(sequence(6, 16), cut=None)
class LinearAlgebra(nn.Module):
    """Solving with, and inverting, a matrix whose axes are channels."""

    def __init__(self):
        super().__init__()
        self.a, self.m, self.b, self.out = nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 20), nn.Linear(20, 3)

    def forward(self, x):
        h = self.a(x)
        gram = h.transpose(1, 2) @ h + torch.eye(8, dtype=x.dtype) * 2
        y = torch.linalg.solve(gram, self.m(h).transpose(1, 2)).transpose(1, 2)
        return self.out(F.relu(self.b(y + h @ torch.linalg.inv(gram))))


@awkward(vector())
class RadialBasis(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.centres = nn.Linear(16, 10), nn.Parameter(torch.randn(12, 10))
        self.width, self.out = nn.Parameter(torch.ones(12)), nn.Linear(12, 3)

    def forward(self, x):
        return self.out(torch.exp(-(torch.cdist(self.inp(x), self.centres) ** 2) * self.width))


@awkward(vector())
class TensorContractions(nn.Module):
    """tensordot, outer, kron and chain products on raw weights."""

    def __init__(self):
        super().__init__()
        self.core, self.u = nn.Parameter(torch.randn(16, 6, 4) * 0.2), nn.Parameter(torch.randn(6, 8))
        self.v, self.out = nn.Parameter(torch.randn(4, 5)), nn.Linear(40, 3)

    def forward(self, x):
        t = torch.tensordot(x, self.core, dims=([1], [0]))
        t = torch.einsum("nab,ac,bd->ncd", t, self.u, self.v).tanh()
        return self.out(t.reshape(-1, 40))
