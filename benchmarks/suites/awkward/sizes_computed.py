"""Sizes that enter computations: roots, means, pools over channels, matrices made in the forward."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.suites.awkward.collect import awkward, image, sequence, signal, vector
from benchmarks.suites.awkward.conv import Head, stem


@awkward(sequence())
class ScaledByLiteral(nn.Module):
    """The square root of the width as a number in the code."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(16, 20), nn.Linear(20, 3)

    def forward(self, x):
        a = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2) / 4.898979485566356, -1)
        return self.out(a @ self.v(x))


@awkward(sequence())
class ScaledByShape(nn.Module):
    """The square root of the width from the tensor's shape, embeddings times the root of the width."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(16, 20), nn.Linear(20, 3)

    def forward(self, x):
        q = self.q(x)
        a = torch.softmax(q @ self.k(x).transpose(1, 2) / math.sqrt(q.shape[-1]), -1)
        v = self.v(x)
        return self.out(a @ v * math.sqrt(v.size(-1)))


@awkward(image())
class MeanByDivision(nn.Module):
    """A mean over channels written as a sum divided by their number."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 16, 1), Head(16)

    def forward(self, x):
        x = self.a(x)
        c = x.shape[1]
        mu = x.sum(1, keepdim=True) / c
        sd = (((x - mu) ** 2).sum(1, keepdim=True) / (c - 1)).sqrt()
        return self.head(F.relu(self.b((x - mu) / (sd + 1e-5))))


@awkward(image())
class PoolOverChannels(nn.Module):
    """Pooling along the channel axis, as if it were a sequence."""

    def __init__(self):
        super().__init__()
        self.stem, self.c, self.head = stem(16), nn.Conv2d(8, 12, 1), Head(12)

    def forward(self, x):
        x = self.stem(x)
        n, c, h, w = x.shape
        y = F.max_pool1d(x.flatten(2).transpose(1, 2), 2).transpose(1, 2)
        return self.head(F.relu(self.c(y.reshape(n, c // 2, h, w))))


@awkward(image(), cut=None)
class AdaptivePoolOverChannels(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.c, self.head = stem(16), nn.Conv2d(4, 12, 1), Head(12)

    def forward(self, x):
        x = F.adaptive_avg_pool3d(self.stem(x).unsqueeze(1), (4, 8, 8)).squeeze(1)
        return self.head(F.relu(self.c(x)))


@awkward(image())
class ChannelsAsDepth(nn.Module):
    """A 3-D convolution that slides over the channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.mix, self.c, self.head = stem(12), nn.Conv3d(1, 2, 3, padding=1), nn.Conv2d(24, 10, 1), Head(10)

    def forward(self, x):
        y = self.mix(self.stem(x).unsqueeze(1)).flatten(1, 2)
        return self.head(F.relu(self.c(y)))


@awkward(vector(), cut=None)
class IdentityMatrix(nn.Module):
    """A product with a matrix made in the forward."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x):
        h = torch.relu(self.a(x))
        h = h @ (torch.eye(12, dtype=x.dtype) * 0.5) + h.mm(torch.ones(12, 12, dtype=x.dtype)) / 100
        return self.b(h)


@awkward(signal(3, 12))
class BufferOfSize(nn.Module):
    """The width kept as a tensor."""

    def __init__(self):
        super().__init__()
        self.register_buffer("width", torch.tensor(12))
        self.a, self.b = nn.Conv1d(3, 12, 3, stride=2), nn.Linear(12 * 5, 4)

    def forward(self, x):
        return self.b(F.relu(self.a(x)).reshape(x.size(0), int(self.width) * 5))


@awkward(sequence())
class HeadsAsAttributeOfModel(nn.Module):
    """Heads and width in the outer module, tensors handed to a plain function."""

    def __init__(self):
        super().__init__()
        self.n_head, self.d_head = 4, 6
        self.qkv, self.out = nn.Linear(16, 3 * 24, bias=False), nn.Linear(24, 3)

    @staticmethod
    def attend(q, k, v, d):
        return ((q @ k.transpose(-1, -2)) / d**0.5).softmax(-1) @ v

    def forward(self, x):
        n, t = x.shape[:2]
        qkv = self.qkv(x).view(n, t, 3, self.n_head, self.d_head)
        q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
        return self.out(self.attend(q, k, v, self.d_head).permute(0, 2, 1, 3).flatten(-2))


@awkward(image())
class StringOfEinsum(nn.Module):
    """Rearrangements by reshape and einsum in the style of einops, window size from an attribute."""

    def __init__(self, window: int = 2):
        super().__init__()
        self.p, self.embed, self.mix, self.out = (
            window,
            nn.Linear(3 * window * window, 20),
            nn.Parameter(torch.randn(20, 20) * 0.2),
            nn.Linear(20, 4),
        )

    def forward(self, x):
        b, c, h, w = x.shape
        p = self.p
        x = x.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, p * p * c)
        x = F.gelu(self.embed(x))
        return self.out(torch.einsum("bnd,de->bne", x, self.mix).mean(1))


@awkward(image())
class KeptShapeAcrossCalls(nn.Module):
    """The shape before flattening is remembered for the decoder."""

    def __init__(self):
        super().__init__()
        self.c1, self.pool = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(3)
        self.fc1, self.fc2 = nn.Linear(72, 16), nn.Linear(16, 72)
        self.up = nn.ConvTranspose2d(8, 3, 3)

    def encode(self, x):
        x = self.pool(F.relu(self.c1(x)))
        self.shape = x.shape
        return self.fc1(torch.flatten(x, start_dim=1))

    def forward(self, x):
        return self.up(F.relu(self.fc2(F.relu(self.encode(x)))).view(self.shape))


class FilledCache(nn.Module):
    """A table of the width kept in a plain dict from the first call on."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.tables = nn.Linear(16, 12), nn.Linear(12, 4), {}

    def forward(self, x):
        h = torch.relu(self.a(x))
        key = str(h.device)
        if key not in self.tables:
            self.tables[key] = 1 + torch.zeros(h.shape[-1])
        return self.b(h * self.tables[key])


@awkward(vector(), cut=None)
def CacheFilledBefore():
    model = FilledCache()
    model(torch.randn(2, 16))
    return model


@awkward(vector())
class WidthLimit(nn.Module):
    """Refuses one width of two, in a function of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 24), nn.Linear(24, 32), nn.Linear(32, 4)

    def check(self, x):
        if x.shape[1] not in (32, 64):
            raise RuntimeError("this width has no kernel")
        return x

    def forward(self, x):
        return self.c(self.check(torch.relu(self.b(torch.relu(self.a(x))))))
