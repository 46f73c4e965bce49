"""Convolutions with unusual weights, shapes and neighbours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.suites.awkward.collect import awkward, image, signal
from benchmarks.suites.awkward.conv import Head, stem


@awkward(image(1))
class MaskedConv(nn.Module):
    """PixelCNN: a buffer of the weight's own shape masks the kernel."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 12, 5, padding=2), nn.Conv2d(12, 12, 3, padding=1)
        self.out = nn.Conv2d(12, 2, 1)
        for name, conv in (("ma", self.a), ("mb", self.b)):
            mask = torch.ones_like(conv.weight)
            k = conv.kernel_size[0]
            mask[:, :, k // 2, k // 2 :] = 0
            mask[:, :, k // 2 + 1 :] = 0
            self.register_buffer(name, mask)

    def forward(self, x):
        x = F.relu(F.conv2d(x, self.a.weight * self.ma, self.a.bias, padding=2))
        x = F.relu(F.conv2d(x, self.b.weight * self.mb, self.b.bias, padding=1))
        return self.out(x)


class MaskInPlace(nn.Conv2d):
    """Multiplies weight.data by a mask on every call, as PixelCNN tutorials do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", torch.ones_like(self.weight))
        self.mask[:, :, self.kernel_size[0] // 2 :, 1:] = 0

    def forward(self, x):
        self.weight.data *= self.mask
        return super().forward(x)


@awkward(image(), cut=None)
def MaskedWeightData():
    return nn.Sequential(MaskInPlace(3, 12, 3), nn.ReLU(), MaskInPlace(12, 12, 3), nn.ReLU(), nn.Conv2d(12, 4, 1))


@awkward(image())
class CoordConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(5, 12, 3), nn.Conv2d(14, 16, 3)
        self.head = Head(16)

    def coords(self, x):
        n, _, h, w = x.shape
        ys = torch.linspace(-1, 1, h, device=x.device, dtype=x.dtype).view(1, 1, h, 1).expand(n, 1, h, w)
        xs = torch.linspace(-1, 1, w, device=x.device, dtype=x.dtype).view(1, 1, 1, w).expand(n, 1, h, w)
        return torch.cat([x, ys, xs], 1)

    def forward(self, x):
        x = F.relu(self.conv1(self.coords(x)))
        return self.head(F.relu(self.conv2(self.coords(x))))


@awkward(image(), cut=None)
class Involution(nn.Module):
    def __init__(self, channels: int = 16, k: int = 3, group_width: int = 4):
        super().__init__()
        self.k, self.gw, self.groups = k, group_width, channels // group_width
        self.stem = stem(channels)
        self.reduce, self.span = nn.Conv2d(channels, 8, 1), nn.Conv2d(8, k * k * self.groups, 1)
        self.head = Head(channels)

    def forward(self, x):
        x = self.stem(x)
        b, _, h, w = x.shape
        kernel = self.span(F.relu(self.reduce(x))).view(b, self.groups, self.k**2, h, w).unsqueeze(2)
        patches = F.unfold(x, self.k, padding=1).view(b, self.groups, self.gw, self.k**2, h, w)
        return self.head((kernel * patches).sum(3).view(b, -1, h, w))


@awkward(image())
class UnfoldConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = stem(8)
        self.proj = nn.Linear(8 * 9, 20)
        self.fc = nn.Linear(20, 4)

    def forward(self, x):
        cols = F.unfold(self.stem(x), kernel_size=3, stride=2).transpose(1, 2)
        return self.fc(F.relu(self.proj(cols)).mean(1))


@awkward(image(), cut=None)
class FoldBack(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = stem(8)
        self.unfold, self.fold = nn.Unfold(2, stride=2), nn.Fold((8, 8), 2, stride=2)
        self.mix = nn.Linear(32, 32)
        self.head = Head(8)

    def forward(self, x):
        cols = self.unfold(self.stem(x))
        cols = cols + self.mix(cols.transpose(1, 2)).transpose(1, 2)
        return self.head(self.fold(cols))


@awkward(image())
def PaddedEveryWay():
    return nn.Sequential(
        nn.ReflectionPad2d(1),
        nn.Conv2d(3, 12, 3),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1, padding_mode="circular"),
        nn.ReLU(),
        nn.ReplicationPad2d((1, 0, 1, 0)),
        nn.Conv2d(12, 16, 2, padding="same", padding_mode="reflect"),
        nn.ReLU(),
        nn.ZeroPad2d(1),
        nn.ConstantPad2d(1, 0.5),
        nn.Conv2d(16, 8, 3, padding="valid"),
        nn.PReLU(8),
        Head(8),
    )


@awkward(image())
class PReLUPerChannel(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.act1 = nn.Conv2d(3, 16, 3), nn.PReLU(16)
        self.conv2, self.act2 = nn.Conv2d(16, 16, 3), nn.PReLU()
        self.head = Head(16)

    def forward(self, x):
        return self.head(self.act2(self.conv2(self.act1(self.conv1(x)))))


@awkward(image())
class FReLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.funnel, self.bn = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.head = Head(16)

    def forward(self, x):
        x = self.conv(x)
        return self.head(torch.max(x, self.bn(self.funnel(x))))


@awkward(image())
class ASPP(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = stem(16)
        self.branches = nn.ModuleList(
            [nn.Conv2d(16, 8, 1)] + [nn.Conv2d(16, 8, 3, padding=d, dilation=d) for d in (2, 3)]
        )
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 8, 1), nn.ReLU())
        self.project = nn.Conv2d(32, 12, 1)
        self.head = nn.Conv2d(12, 3, 1)

    def forward(self, x):
        x = self.stem(x)
        outs = [F.relu(b(x)) for b in self.branches]
        outs.append(F.interpolate(self.pool(x), size=x.shape[-2:], mode="bilinear", align_corners=False))
        return self.head(F.relu(self.project(torch.cat(outs, 1))))


@awkward(image())
class SpatialPyramidPooling(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = stem(10)
        self.fc1 = nn.Linear(10 * (1 + 4 + 16), 24)
        self.fc2 = nn.Linear(24, 4)

    def forward(self, x):
        x = self.stem(x)
        levels = [F.adaptive_max_pool2d(x, s).flatten(1) for s in (1, 2, 4)]
        return self.fc2(F.relu(self.fc1(torch.cat(levels, 1))))


@awkward(image())
class CascadedPooling(nn.Module):
    """SPPF of YOLOv5: the same pool in a chain, concatenated."""

    def __init__(self):
        super().__init__()
        self.cv1, self.cv2 = stem(8), nn.Conv2d(32, 16, 1)
        self.m = nn.MaxPool2d(5, stride=1, padding=2)
        self.head = Head(16)

    def forward(self, x):
        x = self.cv1(x)
        y1 = self.m(x)
        y2 = self.m(y1)
        return self.head(F.silu(self.cv2(torch.cat([x, y1, y2, self.m(y2)], 1))))


@awkward(image())
class DynamicFilter(nn.Module):
    """A generated 1x1 kernel per sample, applied with a batched product."""

    def __init__(self):
        super().__init__()
        self.stem = stem(8)
        self.gen = nn.Linear(8, 6 * 8)
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        w = self.gen(x.mean((2, 3))).view(-1, 6, 8)
        return self.fc(torch.bmm(w, x.flatten(2)).mean(-1))


@awkward(image())
class LearnedUpsampling(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.up1, self.up2 = nn.ConvTranspose2d(16, 8, 2, 2), nn.ConvTranspose2d(16, 6, 2, 2)
        self.out = nn.Conv2d(9, 2, 1)

    def forward(self, x):
        a = F.relu(self.down1(x))
        b = F.relu(self.down2(a))
        c = torch.cat([F.relu(self.up1(b)), a], dim=1)
        return self.out(torch.cat([F.relu(self.up2(c)), x], dim=1))


@awkward(signal(8, 12), cut=None)
def LocallyGroupedByAttribute():
    """Return a model whose number of groups equals the channels by an attribute set after construction."""
    conv = nn.Conv1d(8, 8, 3, padding=1, groups=8)
    return nn.Sequential(
        nn.Conv1d(8, 8, 1), nn.ReLU(), conv, nn.ReLU(), nn.Conv1d(8, 4, 1), nn.AdaptiveMaxPool1d(1), nn.Flatten()
    )


@awkward(image())
def LazyLayers():
    model = nn.Sequential(
        nn.LazyConv2d(12, 3),
        nn.LazyBatchNorm2d(),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(20),
        nn.ReLU(),
        nn.LazyLinear(3),
    )
    model(torch.randn(2, 3, 8, 8))
    return model


@awkward(image())
class SeparableThenDense(nn.Module):
    """Xception block: ReLU first, separable convolutions, strided 1x1 shortcut."""

    def __init__(self):
        super().__init__()
        self.stem = stem(8)
        self.dw1, self.pw1 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.Conv2d(8, 16, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.dw2, self.pw2 = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.Conv2d(16, 16, 1, bias=False)
        self.skip = nn.Conv2d(8, 16, 1, 2, bias=False)
        self.head = Head(16)

    def forward(self, x):
        x = self.stem(x)
        y = self.bn1(self.pw1(self.dw1(F.relu(x, inplace=False))))
        y = F.max_pool2d(self.pw2(self.dw2(F.relu(y))), 3, 2, 1)
        return self.head(y + self.skip(x))


@awkward(image())
class TiedKernelScales(nn.Module):
    """One kernel used at three dilations and summed (trident block)."""

    def __init__(self):
        super().__init__()
        self.stem = stem(12)
        self.weight = nn.Parameter(torch.randn(16, 12, 3, 3) * 0.1)
        self.head = Head(16)

    def forward(self, x):
        x = self.stem(x)
        return self.head(sum(F.relu(F.conv2d(x, self.weight, padding=d, dilation=d)) for d in (1, 2, 3)))


@awkward(image())
class KernelFromLinear(nn.Module):
    """A convolution whose kernel is the transposed weight of a linear layer."""

    def __init__(self):
        super().__init__()
        self.enc = nn.Conv2d(3, 12, 1)
        self.lin = nn.Linear(20, 12, bias=False)
        self.out = nn.Linear(20, 3)

    def forward(self, x):
        x = F.relu(self.enc(x))
        x = F.relu(F.conv2d(x, self.lin.weight.t()[:, :, None, None]))
        return self.out(x.amax((2, 3)))


@awkward(image())
class ComplexAsTwoReals(nn.Module):
    """Complex convolution: two kernels make the real and the imaginary half."""

    def __init__(self):
        super().__init__()
        self.stem = stem(16)
        self.re, self.im = nn.Conv2d(8, 12, 3), nn.Conv2d(8, 12, 3)
        self.head = Head(24)

    def forward(self, x):
        a, b = self.stem(x).chunk(2, 1)
        real, imag = self.re(a) - self.im(b), self.re(b) + self.im(a)
        return self.head(F.relu(torch.cat([real, imag], dim=1)))


@awkward(image())
class AntiDiagonalStrip(nn.Module):
    """Strip pooling: means along one spatial axis expanded back."""

    def __init__(self):
        super().__init__()
        self.stem = stem(12)
        self.h, self.w = nn.Conv2d(12, 12, (3, 1), padding=(1, 0)), nn.Conv2d(12, 12, (1, 3), padding=(0, 1))
        self.fuse = nn.Conv2d(12, 12, 1)
        self.head = Head(12)

    def forward(self, x):
        x = self.stem(x)
        rows = self.h(x.mean(3, keepdim=True)).expand(-1, -1, -1, x.shape[3])
        cols = self.w(x.mean(2, keepdim=True)).expand_as(x)
        return self.head(x * torch.sigmoid(self.fuse(F.relu(rows + cols))))
