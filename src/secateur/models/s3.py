"""The network of the Taylor reference pipeline: convolutions without pooling, then one linear layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from secateur.models.shape import sides


def s3(
    classes: int = 10,
    in_channels: int = 1,
    image_size: int | Sequence[int] = 28,
    widths: Sequence[int] = (2, 4, 8),
) -> nn.Sequential:
    """Return Conv-ReLU per width (3x3, padding 1), Flatten, Linear; random weights.

    At 28x28 with the default widths this is the reference network with its 63,122 parameters
    (20 + 76 + 296 + 62,730).

    >>> sum(p.numel() for p in s3().parameters())
    63122
    """
    height, width = sides(image_size)
    layers: list[nn.Module] = []
    for before, after in zip((in_channels, *widths), widths, strict=False):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(widths[-1] * height * width, classes)]
    return nn.Sequential(*layers)
