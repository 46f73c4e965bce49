"""Operators that move channels about: shuffles, slices, concatenations, reshapes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.suites.awkward.collect import awkward, image, sequence, signal, vector
from benchmarks.suites.awkward.conv import Head, stem


@awkward(image())
class ShuffleView(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.g1 = stem(12), nn.Conv2d(12, 24, 1, groups=3)
        self.g2, self.head = nn.Conv2d(24, 12, 1, groups=3), Head(12)

    def forward(self, x):
        x = F.relu(self.g1(self.stem(x)))
        n, c, h, w = x.size()
        x = x.view(n, 3, c // 3, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
        return self.head(F.relu(self.g2(x)))


@awkward(image())
def ShuffleModule():
    return nn.Sequential(
        stem(16),
        nn.Conv2d(16, 16, 1, groups=4),
        nn.ChannelShuffle(4),
        nn.Conv2d(16, 24, 3, groups=4),
        nn.ReLU(),
        Head(24),
    )


@awkward(image())
class ShuffleUnit(nn.Module):
    """ShuffleNetV2: half passes untouched, then concat and shuffle by reshape and permute."""

    def __init__(self, c: int = 16):
        super().__init__()
        h = c // 2
        self.stem = stem(c)
        self.branch = nn.Sequential(
            nn.Conv2d(h, h, 1),
            nn.BatchNorm2d(h),
            nn.ReLU(),
            nn.Conv2d(h, h, 3, padding=1, groups=h),
            nn.BatchNorm2d(h),
            nn.Conv2d(h, h, 1),
            nn.ReLU(),
        )
        self.head = Head(c)

    def forward(self, x):
        x1, x2 = self.stem(x).chunk(2, dim=1)
        x = torch.cat((x1, self.branch(x2)), 1)
        b, c, h, w = x.shape
        return self.head(x.reshape(b, 2, c // 2, h, w).permute(0, 2, 1, 3, 4).reshape(b, c, h, w))


@awkward(image())
class FlipChannels(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = stem(12), nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 8, 1)
        self.head = Head(8)

    def forward(self, x):
        x = self.a(x)
        return self.head(F.relu(self.c(x + torch.flip(self.b(x), dims=[1]))))


@awkward(image())
class FlipSpatial(nn.Module):
    """Test-time flip inside the model: the same stack sees the image and its mirror."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(stem(12), nn.Conv2d(12, 16, 3), nn.ReLU()), Head(16)

    def forward(self, x):
        return (self.head(self.body(x)) + self.head(self.body(x.flip(-1)).flip(-1))) / 2


@awkward(image())
class RollChannels(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = stem(12), nn.Conv2d(12, 16, 3)
        self.head = Head(16)

    def forward(self, x):
        return self.head(F.relu(self.b(torch.roll(self.a(x), 3, dims=1))))


@awkward(image())
class RollAndAdd(nn.Module):
    """Every channel meets its neighbour: all are tied in one ring."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = stem(12), nn.Conv2d(12, 12, 1), nn.Conv2d(12, 16, 3)
        self.head = Head(16)

    def forward(self, x):
        y = self.b(self.a(x))
        return self.head(F.relu(self.c(y + y.roll(6, 1))))


@awkward(image())
class IndexPermutation(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = stem(12), nn.Conv2d(12, 16, 3)
        self.register_buffer("perm", torch.randperm(12, generator=torch.Generator().manual_seed(3)))
        self.head = Head(16)

    def forward(self, x):
        return self.head(F.relu(self.b(self.a(x)[:, self.perm])))


@awkward(image(), cut=None)
class IndexSelectList(nn.Module):
    """Fixed Python lists of channel numbers."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = stem(12), nn.Conv2d(5, 8, 1), nn.Conv2d(9, 8, 1)
        self.head = Head(8)

    def forward(self, x):
        x = self.stem(x)
        y = self.a(x[:, [0, 2, 4, 6, 8]])
        z = self.b(x.index_select(1, torch.tensor([1, 3, 5, 7, 9, 10, 11, 0, 2])))
        return self.head(F.relu(y + z))


@awkward(image())
def PixelShuffle():
    return nn.Sequential(
        stem(16),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.PixelShuffle(2),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(),
        nn.PixelShuffle(2),
        nn.Conv2d(3, 3, 3),
    )


@awkward(image())
def PixelUnshuffle():
    return nn.Sequential(stem(8), nn.PixelUnshuffle(2), nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(), Head(16))


@awkward(image())
class SpaceToDepthSlices(nn.Module):
    """YOLOv5's focus layer, on hidden channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.head = stem(6), nn.Conv2d(24, 16, 3, padding=1), Head(16)

    def forward(self, x):
        x = self.stem(x)
        return self.head(
            F.relu(
                self.conv(torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1))
            )
        )


@awkward(image())
class PatchMerging(nn.Module):
    """Swin: neighbours are joined over the last axis, normed and reduced."""

    def __init__(self, c: int = 12):
        super().__init__()
        self.embed, self.norm, self.reduction = (
            nn.Conv2d(3, c, 1),
            nn.LayerNorm(4 * c),
            nn.Linear(4 * c, 2 * c, bias=False),
        )
        self.out = nn.Linear(2 * c, 4)

    def forward(self, x):
        x = self.embed(x).permute(0, 2, 3, 1)
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.out(F.gelu(self.reduction(self.norm(x))).mean((1, 2)))


@awkward(image())
class PatchMergingReshape(nn.Module):
    """The newer form: one reshape and permute, then flatten(3)."""

    def __init__(self, c: int = 12):
        super().__init__()
        self.embed, self.norm, self.reduction = (
            nn.Conv2d(3, c, 1),
            nn.LayerNorm(4 * c),
            nn.Linear(4 * c, 2 * c, bias=False),
        )
        self.out = nn.Linear(2 * c, 4)

    def forward(self, x):
        x = self.embed(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.out(F.gelu(self.reduction(self.norm(x))).mean((1, 2)))


@awkward(image())
class SplitUnequal(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.sizes = stem(16), (4, 7, 5)
        self.convs = nn.ModuleList(nn.Conv2d(s, 6, 3, padding=1) for s in self.sizes)
        self.head = Head(6)

    def forward(self, x):
        parts = self.stem(x).split(self.sizes, 1)
        return self.head(F.relu(sum(c(p) for c, p in zip(self.convs, parts, strict=True))))


@awkward(image())
class ChunkThree(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.c = stem(18), nn.Conv2d(6, 8, 1)
        self.head = Head(8)

    def forward(self, x):
        a, b, c = torch.chunk(self.stem(x), 3, 1)
        return self.head(F.relu(self.c(a * torch.sigmoid(b) + c)))


@awkward(signal(3, 8))
class UnbindFactor(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 24, 3, padding=1), nn.Linear(12, 4)

    def forward(self, x):
        u, v = self.a(x).unflatten(1, (2, 12)).unbind(1)
        return self.b((u * v.tanh()).mean(-1))


@awkward(image())
class StridedChannelSlices(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = stem(16)
        self.even, self.odd, self.tail = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(5, 6, 1)
        self.head = Head(6)

    def forward(self, x):
        x = self.stem(x)
        return self.head(F.relu(self.even(x[:, ::2]) + self.odd(x[:, 1::2]) * self.tail(x[:, -5:])))


@awkward(image())
class OverlappingSlices(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = stem(16), nn.Conv2d(10, 8, 1), nn.Conv2d(9, 8, 1)
        self.head = Head(8)

    def forward(self, x):
        x = self.stem(x)
        return self.head(F.relu(self.a(x[:, :10])) + F.relu(self.b(x.narrow(1, 7, 9))))


@awkward(image())
class ChannelsLastFlatten(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.fc, self.out = stem(8), nn.Linear(8 * 8 * 8, 20), nn.Linear(20, 3)

    def forward(self, x):
        x = self.a(x).permute(0, 2, 3, 1).reshape(x.size(0), -1)
        return self.out(F.relu(self.fc(x)))


@awkward(image())
class FlattenHardCoded(nn.Module):
    """LeNet: x.view(-1, 16 * 5 * 5)."""

    def __init__(self):
        super().__init__()
        self.conv1, self.pool, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.MaxPool2d(2, 2), nn.Conv2d(6, 16, 3)
        self.fc1, self.fc2, self.fc3 = nn.Linear(16 * 2 * 2, 24), nn.Linear(24, 12), nn.Linear(12, 4)

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = F.relu(self.conv2(x))
        x = x.view(-1, 16 * 2 * 2)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


@awkward(vector())
class Maxout(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(16, 36), nn.Linear(12, 24), nn.Linear(12, 4)

    def forward(self, x):
        x = self.a(x).view(-1, 12, 3).max(dim=2).values
        return self.out(self.b(x).view(x.size(0), 2, -1).amax(1))


@awkward(image())
class MaxFeatureMap(nn.Module):
    """LightCNN: the larger of the two halves."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 24, 3), nn.Conv2d(12, 20, 3), Head(10)

    def mfm(self, x):
        a, b = torch.split(x, x.shape[1] // 2, 1)
        return torch.max(a, b)

    def forward(self, x):
        return self.head(self.mfm(self.b(self.mfm(self.a(x)))))


@awkward(sequence())
def GLU():
    return nn.Sequential(nn.Linear(16, 40), nn.GLU(), nn.Linear(20, 32), nn.GLU(dim=-1), nn.Linear(16, 4))
