"""Blocks of well-known vision networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork, SqueezeExcitation, StochasticDepth, roi_align

from benchmarks.suites.awkward.collect import awkward, image
from benchmarks.suites.awkward.conv import Head, stem


@awkward(image(3, 16))
class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.d1, self.d2, self.mid = stem(8), nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 16, 3, padding=1)
        self.up2, self.u2 = nn.ConvTranspose2d(16, 12, 2, 2), nn.Conv2d(24, 12, 3, padding=1)
        self.u1, self.out = nn.Conv2d(20, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        d1 = self.d1(x)
        d2 = F.relu(self.d2(F.max_pool2d(d1, 2)))
        m = F.relu(self.mid(F.max_pool2d(d2, 2)))
        u2 = self.up2(m)
        dy, dx = d2.size(2) - u2.size(2), d2.size(3) - u2.size(3)
        u2 = F.relu(self.u2(torch.cat([d2, F.pad(u2, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])], dim=1)))
        up = nn.functional.interpolate(u2, scale_factor=2, mode="bilinear", align_corners=True)
        return self.out(F.relu(self.u1(torch.cat([d1, up], dim=1))))


@awkward(image(3, 8))
class SegNetUnpool(nn.Module):
    """Pooling indices are handed to the unpooling."""

    def __init__(self):
        super().__init__()
        self.e1, self.e2 = stem(8), nn.Conv2d(8, 12, 3, padding=1)
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
        self.d2, self.d1 = nn.Conv2d(12, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x):
        x, i1 = self.pool(self.e1(x))
        x, i2 = self.pool(F.relu(self.e2(x)))
        x = self.d2(self.unpool(x, i2))
        return self.d1(self.unpool(F.relu(x), i1))


@awkward(image())
class SpatialTransformer(nn.Module):
    """A predicted affine map samples the hidden features."""

    def __init__(self):
        super().__init__()
        self.stem, self.loc, self.theta = stem(8), nn.Conv2d(8, 6, 3, stride=2), nn.Linear(6 * 9, 6)
        self.conv, self.head = nn.Conv2d(8, 12, 3), Head(12)

    def forward(self, x):
        x = self.stem(x)
        theta = self.theta(F.relu(self.loc(x)).view(-1, 6 * 3 * 3)).view(-1, 2, 3)
        x = F.grid_sample(x, F.affine_grid(theta, x.size(), align_corners=False), align_corners=False)
        return self.head(F.relu(self.conv(x)))


@awkward(lambda n: (torch.randn(n, 3, 8, 8), torch.tensor([[0, 0.0, 0, 6, 6], [0, 1, 1, 7, 5]])))
class RegionPooling(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.fc1, self.fc2 = stem(10), nn.Linear(10 * 4, 16), nn.Linear(16, 5)

    def forward(self, x, boxes):
        y = roi_align(self.stem(x), boxes.to(x.dtype), output_size=2, sampling_ratio=2)
        return self.fc2(F.relu(self.fc1(y.flatten(start_dim=1))))


@awkward(image())
class LibraryBlocks(nn.Module):
    """Blocks that torchvision offers: convolution-norm-activation, squeeze-excite, stochastic depth, pyramid."""

    def __init__(self):
        super().__init__()
        self.a = Conv2dNormActivation(3, 12, 3, activation_layer=nn.Hardswish)
        self.se, self.depth = SqueezeExcitation(12, 4), StochasticDepth(0.2, "row")
        self.b = Conv2dNormActivation(12, 12, 3, groups=12, norm_layer=None)
        self.fpn = FeaturePyramidNetwork([12, 12], 8)
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        x = self.a(x)
        y = x + self.depth(self.se(self.b(x)))
        levels = self.fpn({"0": x, "1": F.max_pool2d(y, 2)})
        return [self.out(v) for v in levels.values()]


@awkward(image())
class InceptionBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.b1 = stem(12), nn.Conv2d(12, 6, 1)
        self.b2 = nn.Sequential(nn.Conv2d(12, 4, 1), nn.ReLU(), nn.Conv2d(4, 7, 3, padding=1))
        self.b3 = nn.Sequential(
            nn.Conv2d(12, 4, 1), nn.Conv2d(4, 5, (1, 3), padding=(0, 1)), nn.Conv2d(5, 5, (3, 1), padding=(1, 0))
        )
        self.b4 = nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.Conv2d(12, 3, 1))
        self.bn, self.head = nn.BatchNorm2d(21, eps=0.001), Head(21)

    def forward(self, x):
        x = self.stem(x)
        return self.head(F.relu(self.bn(torch.cat([self.b1(x), self.b2(x), self.b3(x), self.b4(x)], 1)), inplace=True))


@awkward(image())
class FireModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.squeeze = stem(12), nn.Conv2d(12, 6, 1)
        self.e1, self.e3 = nn.Conv2d(6, 10, 1), nn.Conv2d(6, 10, 3, padding=1)
        self.classifier = nn.Sequential(
            nn.Dropout(0.5), nn.Conv2d(20, 4, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d((1, 1))
        )

    def forward(self, x):
        x = F.relu(self.squeeze(self.stem(x)), inplace=True)
        x = torch.cat([F.relu(self.e1(x)), F.relu(self.e3(x))], 1)
        return torch.flatten(self.classifier(x), 1)


@awkward(image())
class InvertedResiduals(nn.Module):
    """MobileNetV2/V3: expand, depthwise, gate, linear bottleneck, two in a row."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = stem(8), Head(8)
        self.blocks = nn.ModuleList()
        for _ in range(2):
            self.blocks.append(
                nn.ModuleDict(
                    {
                        "pw": nn.Sequential(nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.Hardswish()),
                        "dw": nn.Sequential(nn.Conv2d(24, 24, 5, 1, 2, groups=24, bias=False), nn.BatchNorm2d(24)),
                        "se": nn.Sequential(
                            nn.AdaptiveAvgPool2d(1), nn.Conv2d(24, 8, 1), nn.ReLU(), nn.Conv2d(8, 24, 1)
                        ),
                        "pl": nn.Sequential(nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8)),
                    }
                )
            )

    def forward(self, x):
        x = self.stem(x)
        for b in self.blocks:
            y = b["dw"](b["pw"](x))
            x = x + b["pl"](y * F.hardsigmoid(b["se"](y)))
        return self.head(x)


@awkward(image())
class HighResolutionFuse(nn.Module):
    """HRNet: every branch is summed into every other at its resolution."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(3, 12, 3, 2, 1)
        self.ab, self.ba = nn.Conv2d(8, 12, 3, 2, 1), nn.Conv2d(12, 8, 1)
        self.final = nn.Conv2d(20, 10, 1)
        self.head = Head(10)

    def forward(self, x):
        a, b = F.relu(self.a(x)), F.relu(self.b(x))
        a, b = F.relu(a + F.interpolate(self.ba(b), size=a.shape[2:])), F.relu(b + self.ab(a))
        ups = [a, F.interpolate(b, size=(a.size(2), a.size(3)), mode="bilinear", align_corners=False)]
        return self.head(F.relu(self.final(torch.cat(ups, 1))))


@awkward(image())
class WeightedFusion(nn.Module):
    """BiFPN: fast normalised fusion with learned scalars."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.w = stem(10), nn.Conv2d(10, 10, 3, 2, 1), nn.Parameter(torch.ones(2, 2))
        self.c, self.head = nn.Conv2d(10, 10, 3, padding=1, groups=10), nn.Conv2d(10, 3, 1)

    def forward(self, x):
        p1 = self.a(x)
        p2 = self.b(p1)
        w = F.relu(self.w)
        w = w / (torch.sum(w, dim=0) + 1e-4)
        top = self.c(F.silu(w[0, 0] * p1 + w[1, 0] * F.interpolate(p2, scale_factor=2.0)))
        low = self.c(F.silu(w[0, 1] * p2 + w[1, 1] * F.max_pool2d(top, 2)))
        return self.head(top), self.head(low)


@awkward(image())
class PoolMixer(nn.Module):
    """PoolFormer: pooling minus identity, layer scale as raw parameters, group norm of one group."""

    def __init__(self, d: int = 16):
        super().__init__()
        self.embed, self.n1, self.n2 = nn.Conv2d(3, d, 3, 2, 1), nn.GroupNorm(1, d), nn.GroupNorm(1, d)
        self.pool, self.fc1 = nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.Conv2d(d, 32, 1)
        self.fc2 = nn.Conv2d(32, d, 1)
        self.g1, self.g2 = nn.Parameter(1e-5 * torch.ones(d)), nn.Parameter(1e-5 * torch.ones(d))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 4)

    def forward(self, x):
        x = self.embed(x)
        y = self.n1(x)
        x = x + self.g1.unsqueeze(-1).unsqueeze(-1) * (self.pool(y) - y)
        x = x + self.g2[:, None, None] * self.fc2(F.gelu(self.fc1(self.n2(x))))
        return self.head(self.norm(x.mean([-2, -1])))


@awkward(image())
class ConvNeXtBlock(nn.Module):
    def __init__(self, d: int = 16):
        super().__init__()
        self.embed, self.dw = nn.Conv2d(3, d, 2, 2), nn.Conv2d(d, d, 3, padding=1, groups=d)
        self.norm = nn.LayerNorm(d, eps=1e-06)
        self.pw1, self.pw2, self.gamma = nn.Linear(d, 4 * d), nn.Linear(4 * d, d), nn.Parameter(1e-6 * torch.ones(d))
        self.head = Head(d)

    def forward(self, x):
        x = self.embed(x)
        y = self.norm(self.dw(x).permute(0, 2, 3, 1))
        y = (self.gamma * self.pw2(F.gelu(self.pw1(y)))).permute(0, 3, 1, 2)
        return self.head(x + y)


@awkward(image())
class ConvMixer(nn.Module):
    def __init__(self, d: int = 16):
        super().__init__()
        self.patch = nn.Sequential(nn.Conv2d(3, d, 2, 2), nn.GELU(), nn.BatchNorm2d(d))
        self.dw = nn.Sequential(nn.Conv2d(d, d, 3, groups=d, padding="same"), nn.GELU(), nn.BatchNorm2d(d))
        self.pw = nn.Sequential(nn.Conv2d(d, d, 1), nn.GELU(), nn.BatchNorm2d(d))
        self.head = Head(d)

    def forward(self, x):
        x = self.patch(x)
        return self.head(self.pw(self.dw(x) + x))


@awkward(image())
class LargeKernelAttention(nn.Module):
    """VAN: a product of the features with their own depthwise map."""

    def __init__(self, d: int = 12):
        super().__init__()
        self.stem, self.p1 = stem(d), nn.Conv2d(d, d, 1)
        self.c0, self.cs = nn.Conv2d(d, d, 3, padding=1, groups=d), nn.Conv2d(d, d, 3, padding=3, groups=d, dilation=3)
        self.c1, self.p2, self.head = nn.Conv2d(d, d, 1), nn.Conv2d(d, d, 1), Head(d)

    def forward(self, x):
        x = self.stem(x)
        u = F.gelu(self.p1(x))
        return self.head(x + self.p2(u * self.c1(self.cs(self.c0(u)))))


@awkward(image())
class FocalModulation(nn.Module):
    """One projection split into query, context and gates of unequal widths."""

    def __init__(self, d: int = 12, levels: int = 2):
        super().__init__()
        self.d, self.levels = d, levels
        self.embed, self.f, self.h = nn.Conv2d(3, d, 1), nn.Linear(d, 2 * d + levels + 1), nn.Conv2d(d, d, 1)
        self.layers = nn.ModuleList(
            nn.Conv2d(d, d, 3 + 2 * i, padding=1 + i, groups=d, bias=False) for i in range(levels)
        )
        self.proj, self.out = nn.Linear(d, d), nn.Linear(d, 3)

    def forward(self, x):
        x = self.embed(x).permute(0, 2, 3, 1)
        q, ctx, gates = torch.split(self.f(x).permute(0, 3, 1, 2).contiguous(), (self.d, self.d, self.levels + 1), 1)
        total = 0
        for i, layer in enumerate(self.layers):
            ctx = F.gelu(layer(ctx))
            total = total + ctx * gates[:, i : i + 1]
        total = total + F.gelu(ctx.mean((2, 3), keepdim=True)) * gates[:, self.levels :]
        y = (q * self.h(total)).permute(0, 2, 3, 1).contiguous()
        return self.out(x + self.proj(y))


@awkward(image())
class HourGlass(nn.Module):
    """Recursion: a module that holds itself at a lower resolution."""

    def __init__(self, depth: int = 2, width: int = 10, root: bool = True):
        super().__init__()
        self.first = nn.Conv2d(3, width, 1) if root else nn.Identity()
        self.up, self.low1, self.low3 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.low2 = HourGlass(depth - 1, width, False) if depth > 1 else nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, 2, 1) if root else nn.Identity()

    def forward(self, x):
        x = self.first(x)
        low = self.low3(F.relu(self.low2(F.relu(self.low1(F.max_pool2d(x, 2))))))
        return self.last(F.relu(self.up(x)) + F.interpolate(low, scale_factor=2))


@awkward(image())
class DeepSupervision(nn.Module):
    """Auxiliary heads that only run in train mode."""

    def __init__(self):
        super().__init__()
        self.stem, self.aux, self.c, self.head = stem(12), Head(12), nn.Conv2d(12, 16, 3), Head(16)

    def forward(self, x):
        x = self.stem(x)
        y = self.head(F.relu(self.c(x)))
        return (y, self.aux(x)) if self.training else y


@awkward(image())
class MultiScaleShared(nn.Module):
    """RetinaNet: one tower over all levels, outputs reshaped to (n, anchors, classes) and joined."""

    def __init__(self, anchors: int = 2, classes: int = 3):
        super().__init__()
        self.k, self.c1, self.c2 = classes, stem(10), nn.Conv2d(10, 10, 3, 2, 1)
        self.tower = nn.Sequential(nn.Conv2d(10, 10, 3, padding=1), nn.GroupNorm(2, 10), nn.ReLU())
        self.cls = nn.Conv2d(10, anchors * classes, 3, padding=1)
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(1)) for _ in range(2)])

    def forward(self, x):
        p1 = self.c1(x)
        outs = []
        for s, p in zip(self.scales, (p1, self.c2(p1)), strict=True):
            y = self.cls(self.tower(p)) * s
            n, _, h, w = y.shape
            outs.append(y.view(n, -1, self.k, h, w).permute(0, 3, 4, 1, 2).reshape(n, -1, self.k))
        return torch.cat(outs, dim=1)


@awkward(image())
class StochasticDepthByHand(nn.Module):
    """Timm's drop path, and a block skipped at random in train mode."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.head = stem(12), nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 12, 1), Head(12)

    def drop(self, x, p=0.2):
        if not self.training:
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - p)
        return x * keep.div_(1 - p)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(x + self.drop(self.a(x)))
        return self.head(F.relu(x + self.drop(self.b(x))))
