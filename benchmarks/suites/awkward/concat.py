"""Concatenations, stacks and repeats."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.suites.awkward.collect import awkward, image
from benchmarks.suites.awkward.conv import Head, stem


@awkward(image())
class ConcatNestedWithInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(11, 6, 3, padding=1), nn.Conv2d(28, 12, 1)
        self.head = Head(12)

    def forward(self, x):
        a = F.relu(self.a(x))
        ab = torch.cat([x, a], 1)
        b = F.relu(self.b(ab))
        return self.head(F.relu(self.c(torch.cat([torch.cat([ab, b], 1), a, x], 1))))


@awkward(image())
class ConcatTwiceTheSame(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = stem(8), nn.Conv2d(24, 12, 1)
        self.head = Head(12)

    def forward(self, x):
        x = self.a(x)
        return self.head(F.relu(self.b(torch.cat([x, -x, x], 1))))


@awkward(image())
class ConcatBeforeGrouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        self.g, self.head = nn.Conv2d(16, 24, 1, groups=2), Head(24)

    def forward(self, x):
        return self.head(F.relu(self.g(F.relu(torch.cat([self.a(x), self.b(x)], dim=1)))))


@awkward(image())
class ConcatMisalignedGrouped(nn.Module):
    """The border between the branches falls inside a group of the convolution."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 18, 3)
        self.g, self.head = nn.Conv2d(24, 12, 1, groups=3), Head(12)

    def forward(self, x):
        return self.head(F.relu(self.g(F.relu(torch.cat([self.a(x), self.b(x)], dim=1)))))


@awkward(image())
class ConcatFlattened(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 8, 3, stride=2)
        self.fc, self.out = nn.Linear(6 * 36 + 8 * 9 + 4, 20), nn.Linear(20, 3)

    def forward(self, x):
        a, b = F.relu(self.a(x)), F.relu(self.b(x))
        z = torch.cat([a.flatten(1), b.view(b.size(0), -1), x.mean((1, 2))[:, :4]], 1)
        return self.out(F.relu(self.fc(z)))


@awkward(image())
class DenseBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = stem(8)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(8 + 4 * i), nn.ReLU(), nn.Conv2d(8 + 4 * i, 4, 3, padding=1, bias=False))
            for i in range(4)
        )
        self.norm, self.head = nn.BatchNorm2d(24), Head(24)

    def forward(self, x):
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.head(F.relu(self.norm(torch.cat(features, 1))))


@awkward(image())
class StackBranches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 12, k, padding=k // 2) for k in (1, 3, 5))
        self.w, self.fc = nn.Parameter(torch.randn(3)), nn.Linear(12, 4)

    def forward(self, x):
        s = torch.stack([self.a(x), self.b(x), self.c(x)], dim=1)
        return self.fc(F.relu((s * self.w.softmax(0).view(1, 3, 1, 1, 1)).sum(1)).mean((2, 3)))


@awkward(image())
class StackLastThenFlatten(nn.Module):
    """Interleaves two branches channel by channel."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(16, 10, 1)
        self.head = Head(10)

    def forward(self, x):
        s = torch.stack((self.a(x), self.b(x)), 2).flatten(1, 2)
        return self.head(F.relu(self.c(F.relu(s))))


@awkward(image())
class RepeatChannels(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = stem(8), nn.Conv2d(24, 12, 3), Head(12)

    def forward(self, x):
        return self.head(F.relu(self.b(self.a(x).repeat(1, 3, 1, 1))))


@awkward(image())
class RepeatInterleaveChannels(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = stem(8), nn.Conv2d(16, 12, 3, groups=4), Head(12)

    def forward(self, x):
        return self.head(F.relu(self.b(self.a(x).repeat_interleave(2, dim=1))))
