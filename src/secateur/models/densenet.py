"""Densely connected networks for small images, with bottlenecks and compression (DenseNet-BC)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from secateur.models.interior import interior_widths


class DenseLayer(nn.Module):
    """BatchNorm-ReLU-Conv1x1-BatchNorm-ReLU-Conv3x3-Dropout, appended to its input."""

    def __init__(self, before: int, inside: int, growth: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, inside, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inside)
        self.conv2 = nn.Conv2d(inside, growth, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (n, before, h, w) followed by the new maps: (n, before + growth, h, w)."""
        inside = self.conv1(F.relu(self.bn1(x)))
        return torch.cat([x, self.dropout(self.conv2(F.relu(self.bn2(inside))))], dim=1)


def densenet(
    classes: int = 10,
    in_channels: int = 3,
    image_size: int | Sequence[int] = 32,
    depth: int = 100,
    growth: int = 12,
    compression: float = 0.5,
    bottleneck: float = 1,
    interior: Sequence[int] | None = None,
    dropout: float = 0,
) -> nn.Sequential:
    """Return DenseNet-BC of ``depth`` layers and ``growth`` maps per layer (Huang et al. 2017, arXiv 1608.06993).

    Three blocks of (depth - 4) / 6 layers; the maps inside a layer are 4 * growth, scaled by ``bottleneck`` or set
    by ``interior``, one number per layer.  Transitions keep the fraction ``compression`` of the maps and halve
    height and width.  ``image_size`` is accepted like in every builder, and not needed.

    DenseNet-BC-100 with growth 12 has 769,162 parameters and 2,304 maps inside its layers.

    >>> sum(p.numel() for p in densenet().parameters())
    769162
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth must be 6n + 4 with n >= 1; got {depth}.")
    count = (depth - 4) // 6
    inside = interior_widths([4 * growth] * (3 * count), bottleneck, interior)
    before = 2 * growth
    layers: list[nn.Module] = [nn.Conv2d(in_channels, before, 3, padding=1, bias=False)]
    for number, mid in enumerate(inside):
        if number and number % count == 0:
            layers += _transition(before, int(before * compression))
            before = int(before * compression)
        layers.append(DenseLayer(before, mid, growth, dropout))
        before += growth
    layers += [nn.BatchNorm2d(before), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(before, classes))


def _transition(before: int, after: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(before), nn.ReLU(), nn.Conv2d(before, after, 1, bias=False), nn.AvgPool2d(2)]
