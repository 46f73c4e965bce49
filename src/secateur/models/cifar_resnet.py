"""The residual networks of CIFAR: three stages of basic blocks, option-B shortcuts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut (1x1 convolution where the width changes)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return relu(shortcut(x) + residual(x))."""
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.shortcut(x) + residual)


def resnet20(
    classes: int = 10,
    in_channels: int = 3,
    image_size: int | Sequence[int] = 32,
    width: int = 16,
    depth: int = 20,
) -> nn.Sequential:
    """Return the CIFAR residual network of ``depth`` 6n + 2 layers (He et al. 2016, section 4.2, arXiv 1512.03385).

    Departs from the paper in its shortcuts: 1x1 convolutions (option B) in place of zero padding.  At width 16
    they add 2,752 parameters to the paper's network.  ``width`` is that of the first stage; the others have twice
    and four times as many channels.  ``image_size`` is accepted like in every builder, and not needed.

    >>> sum(p.numel() for p in resnet20().parameters())
    272474
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth must be 6n + 2 with n >= 1; got {depth}.")
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
    ]  # fmt: skip
    before = width
    for stage in range(3):
        after = width * 2**stage
        for number in range((depth - 2) // 6):
            layers.append(Block(before, after, 2 if stage and number == 0 else 1))
            before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def resnet32(
    classes: int = 10, in_channels: int = 3, image_size: int | Sequence[int] = 32, width: int = 16
) -> nn.Sequential:
    """Return ``resnet20`` with 32 layers.

    >>> sum(p.numel() for p in resnet32().parameters())
    466906
    """
    return resnet20(classes, in_channels, image_size, width, depth=32)


def resnet56(
    classes: int = 10, in_channels: int = 3, image_size: int | Sequence[int] = 32, width: int = 16
) -> nn.Sequential:
    """Return ``resnet20`` with 56 layers.

    >>> sum(p.numel() for p in resnet56().parameters())
    855770
    """
    return resnet20(classes, in_channels, image_size, width, depth=56)


def resnet110(
    classes: int = 10, in_channels: int = 3, image_size: int | Sequence[int] = 32, width: int = 16
) -> nn.Sequential:
    """Return ``resnet20`` with 110 layers.

    >>> sum(p.numel() for p in resnet110().parameters())
    1730714
    """
    return resnet20(classes, in_channels, image_size, width, depth=110)
