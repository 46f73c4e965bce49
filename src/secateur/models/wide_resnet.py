"""Wide residual networks: few layers, pre-activation blocks, stages ``width`` times as wide."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from secateur.models.interior import interior_widths


class WideBlock(nn.Module):
    """BatchNorm-ReLU-Conv-BatchNorm-ReLU-Dropout-Conv and a shortcut (1x1 convolution where widths differ)."""

    def __init__(self, before: int, inside: int, after: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, inside, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inside)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(inside, after, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or before != after:
            self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return shortcut + residual; a convolved shortcut starts behind the first ReLU, as in the paper's code."""
        active = F.relu(self.bn1(x))
        residual = self.conv2(self.dropout(F.relu(self.bn2(self.conv1(active)))))
        return residual + (x if self.shortcut is None else self.shortcut(active))


def wide_resnet(
    classes: int = 10,
    in_channels: int = 3,
    image_size: int | Sequence[int] = 32,
    depth: int = 40,
    width: float = 2,
    bottleneck: float = 1,
    interior: Sequence[int] | None = None,
    dropout: float = 0,
) -> nn.Sequential:
    """Return the wide residual network WRN-depth-width (Zagoruyko and Komodakis 2016, arXiv 1605.07146).

    Three stages of (depth - 4) / 6 blocks with 16, 32 and 64 times ``width`` channels.  ``bottleneck`` scales the
    channels inside every block and leaves those between blocks; ``interior`` sets them, one number per block.
    ``image_size`` is accepted like in every builder, and not needed.

    WRN-40-2 has 2,243,546 parameters, 1,344 channels inside its blocks; WRN-16-2 has 691,674 and 448.

    >>> sum(p.numel() for p in wide_resnet(depth=16).parameters())
    691674
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth must be 6n + 4 with n >= 1; got {depth}.")
    blocks = (depth - 4) // 6
    stages = [int(16 * 2**stage * width) for stage in range(3)]
    inside = interior_widths([after for after in stages for _ in range(blocks)], bottleneck, interior)
    layers: list[nn.Module] = [nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)]
    before = 16
    for number, mid in enumerate(inside):
        stage, place = divmod(number, blocks)
        layers.append(WideBlock(before, mid, stages[stage], 2 if stage and not place else 1, dropout))
        before = stages[stage]
    layers += [nn.BatchNorm2d(before), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(before, classes))
