"""Sharing, gates, containers, and blocks of well-known networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from benchmarks.suites.awkward.collect import awkward, image, sequence, tokens, vector
from benchmarks.suites.awkward.conv import Head, stem


@awkward(tokens())
class TiedEmbedding(nn.Module):
    """The output layer is the transposed embedding."""

    def __init__(self):
        super().__init__()
        self.embed, self.fc, self.proj = nn.Embedding(20, 16), nn.Linear(16, 40), nn.Linear(40, 16)
        self.decoder = nn.Linear(16, 20)
        self.decoder.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        return self.decoder(x + self.proj(F.gelu(self.fc(x))))


@awkward(tokens())
class TiedByMatmul(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.rnn, self.bias = nn.Embedding(20, 12), nn.Linear(12, 12), nn.Parameter(torch.zeros(20))

    def forward(self, ids):
        x = torch.tanh(self.rnn(self.embed(ids)))
        return x @ self.embed.weight.t() + self.bias


@awkward(vector())
class TiedAutoencoder(nn.Module):
    """The decoder uses the transposed weights of the encoder."""

    def __init__(self):
        super().__init__()
        self.e1, self.e2 = nn.Linear(16, 24), nn.Linear(24, 10)
        self.b1, self.b2 = nn.Parameter(torch.zeros(24)), nn.Parameter(torch.zeros(16))

    def forward(self, x):
        z = self.e2(F.relu(self.e1(x)))
        return F.linear(F.relu(F.linear(z, self.e2.weight.t(), self.b1)), self.e1.weight.t(), self.b2)


@awkward(image())
class ModuleTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.bn, self.head = (
            stem(16),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            Head(16),
        )

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(self.bn(self.conv(x)))
        return self.head(F.relu(self.bn(self.conv(x))))


@awkward(vector())
class SharedOnDifferentStreams(nn.Module):
    """One layer serves two streams that never meet."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.shared, self.out = (
            nn.Linear(16, 12),
            nn.Linear(16, 12),
            nn.Linear(12, 20),
            nn.Linear(40, 3),
        )

    def forward(self, x):
        u, v = F.relu(self.shared(F.relu(self.a(x)))), torch.sigmoid(self.shared(torch.tanh(self.b(x))))
        return self.out(torch.cat([u, v], -1))


@awkward(lambda n: (torch.randn(n, 3, 8, 8), torch.randn(n, 3, 8, 8)))
class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            stem(12), nn.MaxPool2d(2), nn.Conv2d(12, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 20)
        )
        self.fc = nn.Linear(20, 1)

    def forward(self, a, b):
        u, v = self.body(a), self.body(b)
        return self.fc(torch.abs(u - v)), F.cosine_similarity(u, v), F.pairwise_distance(u, v)


@awkward(lambda n: (torch.randn(n, 3, 8, 8), torch.randn(n, 3, 12, 12)))
class SiameseCrossCorrelation(nn.Module):
    """SiamFC: the exemplar's features are the kernel, one group per sample."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(stem(12), nn.Conv2d(12, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))

    def forward(self, z, x):
        z, x = self.body(z), self.body(x)
        n, c, h, w = x.shape
        out = F.conv2d(x.reshape(1, n * c, h, w), z, groups=n)
        return 0.1 * out.reshape(n, 1, out.size(2), out.size(3))


@awkward(image())
class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.head = stem(16), nn.Conv2d(16, 24, 3), Head(24)
        self.se = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(24, 6, 1), nn.ReLU(), nn.Conv2d(6, 24, 1), nn.Sigmoid()
        )

    def forward(self, x):
        x = F.relu(self.conv(self.stem(x)))
        return self.head(x * self.se(x))


@awkward(image())
class SqueezeExciteLinear(nn.Module):
    def __init__(self, c: int = 16, r: int = 4):
        super().__init__()
        self.stem, self.fc1, self.fc2, self.head = (
            stem(c),
            nn.Linear(c, c // r, bias=False),
            nn.Linear(c // r, c, bias=False),
            Head(c),
        )

    def forward(self, x):
        x = self.stem(x)
        b, c, _, _ = x.size()
        y = F.adaptive_avg_pool2d(x, 1).view(b, c)
        y = torch.sigmoid(self.fc2(F.relu(self.fc1(y)))).view(b, c, 1, 1)
        return self.head(x * y.expand_as(x))


@awkward(image())
class SelectiveKernel(nn.Module):
    def __init__(self, c: int = 16, paths: int = 2):
        super().__init__()
        self.c, self.paths = c, paths
        self.stem = stem(c)
        self.convs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, c, 3, padding=1 + i, dilation=1 + i), nn.BatchNorm2d(c), nn.ReLU())
            for i in range(paths)
        )
        self.fc, self.select, self.head = nn.Conv2d(c, 8, 1), nn.Conv2d(8, c * paths, 1), Head(c)

    def forward(self, x):
        x = self.stem(x)
        u = torch.stack([conv(x) for conv in self.convs], dim=1)
        s = self.select(F.relu(self.fc(u.sum(1).mean((2, 3), keepdim=True))))
        a = s.view(x.size(0), self.paths, self.c, 1, 1).softmax(1)
        return self.head((u * a).sum(1))


@awkward(image())
class SplitAttention(nn.Module):
    """ResNeSt: radix 2, two cardinal groups, grouped 1x1 convolutions in the gate."""

    def __init__(self, c: int = 12, radix: int = 2, card: int = 2):
        super().__init__()
        self.radix, self.card, self.c = radix, card, c
        self.stem = stem(12)
        self.conv = nn.Conv2d(12, c * radix, 3, padding=1, groups=radix * card)
        self.fc1, self.fc2 = nn.Conv2d(c, 8, 1, groups=card), nn.Conv2d(8, c * radix, 1, groups=card)
        self.head = Head(c)

    def forward(self, x):
        x = F.relu(self.conv(self.stem(x)))
        b, rc = x.shape[:2]
        splits = torch.split(x, rc // self.radix, dim=1)
        gap = F.adaptive_avg_pool2d(sum(splits), 1)
        a = self.fc2(F.relu(self.fc1(gap)))
        a = a.view(b, self.card, self.radix, -1).transpose(1, 2).softmax(1).reshape(b, -1, 1, 1)
        return self.head(
            sum(w * s for w, s in zip(torch.split(a, rc // self.radix, dim=1), splits, strict=True)).contiguous()
        )


@awkward(image())
class CoordinateAttention(nn.Module):
    def __init__(self, c: int = 16, mid: int = 8):
        super().__init__()
        self.stem, self.conv1, self.bn1 = stem(c), nn.Conv2d(c, mid, 1), nn.BatchNorm2d(mid)
        self.conv_h, self.conv_w, self.head = nn.Conv2d(mid, c, 1), nn.Conv2d(mid, c, 1), Head(c)

    def forward(self, x):
        x = self.stem(x)
        _, _, h, w = x.size()
        y = torch.cat(
            [F.adaptive_avg_pool2d(x, (None, 1)), F.adaptive_avg_pool2d(x, (1, None)).permute(0, 1, 3, 2)], dim=2
        )
        xh, xw = torch.split(F.hardswish(self.bn1(self.conv1(y))), [h, w], dim=2)
        return self.head(x * self.conv_w(xw.permute(0, 1, 3, 2)).sigmoid() * self.conv_h(xh).sigmoid())


@awkward(sequence(6, 16))
class TokenMixing(nn.Module):
    """MLP-Mixer: one layer over tokens, one over channels."""

    def __init__(self):
        super().__init__()
        self.inp, self.n1, self.n2 = nn.Linear(16, 24), nn.LayerNorm(24), nn.LayerNorm(24)
        self.token = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6))
        self.channel = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24))
        self.out = nn.Linear(24, 3)

    def forward(self, x):
        x = self.inp(x)
        x = x + self.token(self.n1(x).transpose(1, 2)).transpose(1, 2)
        return self.out((x + self.channel(self.n2(x))).mean(1))


@awkward(sequence(6, 16))
class SpatialGatingUnit(nn.Module):
    """gMLP: half the channels gate the other half after a convolution over tokens."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.mix, self.down = (
            nn.Linear(16, 40),
            nn.LayerNorm(20),
            nn.Conv1d(6, 6, 1),
            nn.Linear(20, 16),
        )
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        u, v = F.gelu(self.up(x)).chunk(2, dim=-1)
        return self.out(x + self.down(u * (1 + self.mix(self.norm(v)))))


@awkward(sequence())
class SoftMixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 12)) for _ in range(3))
        self.out = nn.Linear(12, 3)

    def forward(self, x):
        g = self.gate(x).softmax(-1)
        return self.out((torch.stack([e(x) for e in self.experts], -2) * g.unsqueeze(-1)).sum(-2))


@awkward(sequence())
class TopKMixture(nn.Module):
    """Sparse mixture: gather the tokens of each expert and add them back."""

    def __init__(self, d: int = 16, experts: int = 4, k: int = 2):
        super().__init__()
        self.k, self.router = k, nn.Linear(d, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(d, 24), nn.SiLU(), nn.Linear(24, d)) for _ in range(experts)
        )
        self.inp, self.out = nn.Linear(16, d), nn.Linear(d, 3)

    def forward(self, x):
        b, t, d = x.shape
        x = self.inp(x).view(-1, x.shape[-1])
        w, chosen = torch.topk(self.router(x).softmax(-1), self.k, dim=-1)
        w = w / w.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            row, slot = torch.where(chosen == e)
            if row.numel():
                y.index_add_(0, row, expert(x[row]) * w[row, slot, None])
        return self.out((x + y).view(b, t, d))


@awkward(sequence())
class BatchedExperts(nn.Module):
    """All experts in three raw tensors, applied by one batched product."""

    def __init__(self, e: int = 3, d: int = 16, h: int = 20):
        super().__init__()
        self.w1, self.w2, self.b1 = (
            nn.Parameter(torch.randn(e, d, h) * 0.2),
            nn.Parameter(torch.randn(e, h, d) * 0.2),
            nn.Parameter(torch.zeros(e, 1, h)),
        )
        self.gate, self.out = nn.Linear(d, e), nn.Linear(d, 3)

    def forward(self, x):
        b, t, d = x.shape
        flat = x.reshape(1, b * t, d).expand(self.w1.shape[0], -1, -1)
        y = torch.bmm(F.gelu(torch.baddbmm(self.b1, flat, self.w1)), self.w2).view(-1, b, t, d)
        return self.out((y * self.gate(x).softmax(-1).permute(2, 0, 1).unsqueeze(-1)).sum(0))


@awkward(lambda n: (torch.randn(n, 16), torch.randn(n, 12)))
class BilinearLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.bil, self.out = (
            nn.Linear(16, 10),
            nn.Linear(12, 8),
            nn.Bilinear(10, 8, 12),
            nn.Linear(12, 3),
        )

    def forward(self, x, y):
        return self.out(F.relu(self.bil(F.relu(self.a(x)), F.relu(self.b(y)))))


@awkward(image())
class CheckpointedBlocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = stem(12)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(12, 20, 1), nn.ReLU(), nn.Conv2d(20, 12, 3, padding=1)) for _ in range(2)
        )
        self.tail, self.head = nn.Sequential(nn.Conv2d(12, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1)), Head(8)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return self.head(checkpoint_sequential(self.tail, 2, x, use_reentrant=False))


class Swish(torch.autograd.Function):
    """Memory-saving swish with its own backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return g * (s * (1 + x * (1 - s)))


class ScaledSum(torch.autograd.Function):
    """A linear map with a hand-written backward that looks at the shapes."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x.matmul(w.t())

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g.matmul(w), g.reshape(-1, g.shape[-1]).t().matmul(x.reshape(-1, x.shape[-1]))


@awkward(vector())
class CustomFunctions(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.fc = (
            nn.Parameter(torch.randn(24, 16) * 0.2),
            nn.Parameter(torch.randn(12, 24) * 0.2),
            nn.Linear(12, 3),
        )

    def forward(self, x):
        return self.fc(Swish.apply(ScaledSum.apply(Swish.apply(ScaledSum.apply(x, self.w1)), self.w2)))


class Routed(nn.Module):
    """Each token goes to one of eight experts; most of them see none."""

    def __init__(self, d: int = 16):
        super().__init__()
        self.inp, self.router = nn.Linear(16, d), nn.Linear(16, 8)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(d, 24), nn.GELU(), nn.Linear(24, d)) for _ in range(8))
        self.out = nn.Linear(d, 4)

    def forward(self, x):
        h = torch.relu(self.inp(x))
        score, chosen = self.router(x).softmax(-1).max(-1)
        y = h.clone()
        for e, expert in enumerate(self.experts):
            mine = (chosen == e).nonzero().flatten()
            if len(mine):
                y = y.index_add(0, mine, expert(h[mine]) * score[mine, None])
        return self.out(y)


@awkward(vector(), batches=(2, 400))
def RoutedOneToken():
    """The example (two rows) leaves most experts idle; the other batches visit all."""
    return Routed()


@awkward(image())
class NothingFound(nn.Module):
    """A second stage for the images whose score is high: the example has none, each row is then read in Python."""

    def __init__(self):
        super().__init__()
        self.stem, self.score = stem(12), nn.Linear(12, 1)
        self.a, self.norm, self.b = nn.Conv2d(12, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 10, 1)
        self.points = nn.Conv2d(10, 5, 1)

    def forward(self, x):
        x = self.stem(x)
        score = self.score(x.mean((2, 3)))
        found = x[score[:, 0] > 100]
        h = torch.relu(self.b(torch.relu(self.norm(self.a(found)))))
        return score, [row.flatten(1).argmax(1) for row in self.points(h)]
