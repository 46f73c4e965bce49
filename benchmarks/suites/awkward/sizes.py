"""Sizes in every place where users write them: literals, attributes, tuples, lists, closures, checks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.suites.awkward.collect import awkward, image, sequence, vector
from benchmarks.suites.awkward.conv import Head, stem

WIDTH = 16


@awkward(image())
class LiteralReshapeThenConv(nn.Module):
    """A decoder: x.view(-1, 12, 4, 4)."""

    def __init__(self):
        super().__init__()
        self.enc, self.fc = nn.Linear(3 * 64, 20), nn.Linear(20, 12 * 4 * 4)
        self.up, self.out = nn.ConvTranspose2d(12, 8, 2, 2), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        z = F.relu(self.enc(x.flatten(1)))
        x = F.relu(self.fc(z)).view(-1, 12, 4, 4)
        return torch.tanh(self.out(F.relu(self.up(x))))


@awkward(vector())
def UnflattenModule():
    return nn.Sequential(
        nn.Linear(16, 8 * 9),
        nn.ReLU(),
        nn.Unflatten(1, (8, 3, 3)),
        nn.ConvTranspose2d(8, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 2, 1),
        nn.Flatten(2),
        nn.Flatten(1),
        nn.Linear(50, 4),
    )


class Reshape(nn.Module):
    """A module that keeps its target shape in a tuple."""

    def __init__(self, *shape):
        super().__init__()
        self.shape = shape

    def forward(self, x):
        return x.view(x.size(0), *self.shape)


@awkward(vector())
def ReshapeModule():
    return nn.Sequential(
        nn.Linear(16, 10 * 4),
        nn.BatchNorm1d(40),
        nn.ReLU(),
        Reshape(10, 2, 2),
        nn.Conv2d(10, 6, 2),
        nn.ReLU(),
        Reshape(-1),
        nn.Linear(6, 3),
    )


@awkward(image())
class SizesInList(nn.Module):
    def __init__(self, dims=(12, 20)):
        super().__init__()
        self.dims = list(dims)
        self.a, self.b = nn.Conv2d(3, dims[0], 3), nn.Conv2d(dims[0], dims[1], 3)
        self.fc = nn.Linear(dims[1] * 16, 4)

    def forward(self, x):
        x = F.relu(self.a(x)).view(x.shape[0], self.dims[0], 6, 6)
        return self.fc(F.relu(self.b(x)).reshape(-1, self.dims[-1] * 4 * 4))


@dataclass
class Settings:
    """A configuration object shared by modules."""

    width: int = 24
    heads: int = 4


@awkward(sequence())
class SizesInConfig(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = Settings()
        w = self.config.width
        self.q, self.k, self.v, self.out = nn.Linear(16, w), nn.Linear(16, w), nn.Linear(16, w), nn.Linear(w, 3)

    def forward(self, x):
        c = self.config
        shape = (x.shape[0], x.shape[1], c.heads, c.width // c.heads)
        q, k, v = (f(x).reshape(shape).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], c.width))


@awkward(image())
class SizeInClosure(nn.Module):
    def __init__(self, width: int = 16):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, width, 3, stride=3), nn.Linear(width * 4, 3)

        def flat(t):
            return t.permute(0, 2, 3, 1).reshape(-1, 4 * width)

        self.flat = flat

    def forward(self, x):
        return self.fc(self.flat(F.relu(self.conv(x))))


@awkward(image())
class SizeInGlobal(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 2 * WIDTH, 3), nn.Conv2d(WIDTH, 10, 3)
        self.head = Head(10)

    def forward(self, x):
        x = self.a(x)
        return self.head(F.relu(self.b(x[:, :WIDTH] * torch.sigmoid(x[:, WIDTH : 2 * WIDTH]))))


@awkward(image())
class SizeInProperty(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 12, 3), nn.Linear(12 * 36, 4)

    @property
    def features(self):
        return self.conv.out_channels * 6 * 6

    def forward(self, x):
        return self.fc(F.relu(self.conv(x)).view(-1, self.features))


@awkward(image())
class SizeFromNumpyProduct(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.shape = nn.Conv2d(3, 12, 3), (12, 6, 6)
        self.fc = nn.Linear(math.prod(self.shape), 4)

    def forward(self, x):
        x = F.relu(self.conv(x))
        return self.fc(x.view(x.size(0), math.prod(self.shape))) + self.fc(
            x.reshape(-1, x.shape[1] * x.shape[2] * x.shape[3])
        )


@awkward(image())
class LiteralSplit(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.head = stem(24), nn.Conv2d(8, 6, 1), nn.Conv2d(16, 6, 1), Head(6)

    def forward(self, x):
        y, z = torch.split(self.stem(x), [8, 16], dim=1)
        return self.head(F.relu(self.a(y) + self.b(z)))


@awkward(image())
class LiteralSlices(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.head = stem(24), nn.Conv2d(10, 6, 1), nn.Conv2d(14, 6, 1), Head(6)

    def forward(self, x):
        x = self.stem(x)
        return self.head(F.relu(self.a(x[:, 0:10, :, :]) + self.b(x[:, 10:24])))


@awkward(image())
class LiteralDepthwise(nn.Module):
    """A functional depthwise convolution with its number of groups as a literal."""

    def __init__(self):
        super().__init__()
        self.stem, self.w, self.c, self.head = (
            stem(16),
            nn.Parameter(torch.randn(16, 1, 3, 3) * 0.3),
            nn.Conv2d(16, 12, 1),
            Head(12),
        )

    def forward(self, x):
        return self.head(F.relu(self.c(F.conv2d(self.stem(x), self.w, padding=1, groups=16))))


@awkward(image())
class LiteralZerosAdded(nn.Module):
    """State of a fixed width made in the forward, then summed into the features."""

    def __init__(self):
        super().__init__()
        self.conv, self.back, self.head = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 1), Head(12)

    def forward(self, x):
        h = torch.zeros(x.shape[0], 12, 6, 6, dtype=x.dtype)
        for _ in range(2):
            h = torch.tanh(self.conv(x) + self.back(h))
        return self.head(h)


@awkward(image())
class LiteralExpand(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.gate, self.c, self.head = stem(16), nn.Conv2d(16, 1, 1), nn.Conv2d(16, 12, 1), Head(12)

    def forward(self, x):
        x = self.stem(x)
        return self.head(F.relu(self.c(x * self.gate(x).sigmoid().expand(-1, 16, -1, -1))))


@awkward(sequence())
class AssertedWidth(nn.Module):
    """Checks of the width in the forward, as libraries do."""

    def __init__(self, dim: int = 24):
        super().__init__()
        self.dim, self.inp, self.up, self.down, self.out = (
            dim,
            nn.Linear(16, dim),
            nn.Linear(dim, 40),
            nn.Linear(40, dim),
            nn.Linear(dim, 3),
        )

    def forward(self, x):
        x = self.inp(x)
        b, n, c = x.shape
        assert c == self.dim, f"{c} channels, not {self.dim}"
        y = F.gelu(self.up(x))
        if y.size(-1) != 40:
            raise ValueError(f"expected 40 features, got {y.size(-1)}")
        return self.out(x + self.down(y).view(b, n, self.dim))
