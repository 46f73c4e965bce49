"""Features modulated by another input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.suites.awkward.collect import awkward
from benchmarks.suites.awkward.conv import Head, stem


@awkward(lambda n: (torch.randn(n, 3, 8, 8), torch.randint(0, 4, (n,))))
class ConditionalBatchNorm(nn.Module):
    def __init__(self, width: int = 12):
        super().__init__()
        self.width = width
        self.conv, self.bn = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width, affine=False)
        self.embed = nn.Embedding(4, width * 2)
        self.head = Head(width)

    def forward(self, x, label):
        gamma, beta = self.embed(label).chunk(2, 1)
        x = self.bn(self.conv(x))
        return self.head(F.relu(gamma.view(-1, self.width, 1, 1) * x + beta.view(-1, self.width, 1, 1)))


@awkward(lambda n: (torch.randn(n, 3, 8, 8), torch.randn(n, 6)))
class FiLM(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv = stem(12), nn.Conv2d(12, 12, 3, padding=1)
        self.film = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 24))
        self.head = Head(12)

    def forward(self, x, z):
        x = self.stem(x)
        scale, shift = self.film(z)[:, :, None, None].split(x.shape[1], dim=1)
        return self.head(F.relu(x + self.conv(x) * (1 + scale) + shift))


@awkward(lambda n: (torch.randn(n, 5, 16), torch.randn(n, 8)))
class AdaptiveLayerNormZero(nn.Module):
    """The diffusion transformer's modulation: six chunks of one linear layer."""

    def __init__(self, d: int = 16):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d, elementwise_affine=False), nn.LayerNorm(d, elementwise_affine=False)
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(8, 6 * d))
        self.mix, self.up, self.down = nn.Linear(d, d), nn.Linear(d, 32), nn.Linear(32, d)
        self.out = nn.Linear(d, 3)

    def forward(self, x, c):
        s1, c1, g1, s2, c2, g2 = self.ada(c).unsqueeze(1).chunk(6, dim=-1)
        x = x + g1 * self.mix(self.norm1(x) * (1 + c1) + s1)
        x = x + g2 * self.down(F.gelu(self.up(self.norm2(x) * (1 + c2) + s2)))
        return self.out(x)


@awkward(lambda n: (torch.randn(n, 3, 8, 8), torch.randn(n, 3, 8, 8)))
class AdaIN(nn.Module):
    """Style transfer: content features take the statistics of the style features."""

    def __init__(self):
        super().__init__()
        self.enc = nn.Sequential(stem(12), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU())
        self.dec = nn.Sequential(nn.Conv2d(16, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 3, 3, padding=1))

    @staticmethod
    def stats(f):
        n, c = f.size()[:2]
        var = f.view(n, c, -1).var(dim=2) + 1e-5
        return f.view(n, c, -1).mean(dim=2).view(n, c, 1, 1), var.sqrt().view(n, c, 1, 1)

    def forward(self, content, style):
        c, s = self.enc(content), self.enc(style)
        (sm, ss), (cm, cs) = self.stats(s), self.stats(c)
        return self.dec((c - cm.expand(c.size())) / cs.expand(c.size()) * ss + sm)


@awkward(lambda n: (torch.randn(n, 3, 8, 8), torch.randn(n, 2, 4, 4)))
class SPADE(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = stem(12), nn.InstanceNorm2d(12, affine=False)
        self.shared = nn.Sequential(nn.Conv2d(2, 10, 3, padding=1), nn.ReLU())
        self.gamma, self.beta = nn.Conv2d(10, 12, 3, padding=1), nn.Conv2d(10, 12, 3, padding=1)
        self.out = nn.Conv2d(12, 3, 1)

    def forward(self, x, seg):
        x = self.stem(x)
        s = self.shared(F.interpolate(seg, size=x.size()[2:], mode="nearest"))
        return self.out(F.leaky_relu(self.norm(x) * (1 + self.gamma(s)) + self.beta(s)))


@awkward(lambda n: (torch.randn(n, 8), torch.randn(n, 3, 6, 6)))
class StyleModulatedConv(nn.Module):
    """StyleGAN2: weights modulated per sample, demodulated, one grouped convolution."""

    def __init__(self, cin: int = 10, cout: int = 12):
        super().__init__()
        self.cin, self.cout = cin, cout
        self.stem = nn.Conv2d(3, cin, 1)
        self.affine = nn.Linear(8, cin)
        self.weight = nn.Parameter(torch.randn(1, cout, cin, 3, 3) * 0.2)
        self.to_rgb = nn.Conv2d(cout, 3, 1)

    def forward(self, w, x):
        x = F.leaky_relu(self.stem(x), 0.2)
        b, c, h, ww = x.shape
        weight = self.weight * (self.affine(w).view(b, 1, c, 1, 1) + 1)
        weight = weight * torch.rsqrt(weight.pow(2).sum([2, 3, 4]) + 1e-8).view(b, self.cout, 1, 1, 1)
        weight = weight.view(b * self.cout, c, 3, 3)
        x = F.conv2d(x.reshape(1, b * c, h, ww), weight, padding=1, groups=b)
        return self.to_rgb(F.leaky_relu(x.view(b, self.cout, h, ww), 0.2))
