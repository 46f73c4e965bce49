"""A small convolutional network with batch norm and pooling, for images of any size."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def small_cnn(
    classes: int = 10,
    in_channels: int = 1,
    image_size: int | Sequence[int] = 28,
    widths: Sequence[int] = (16, 32, 64),
) -> nn.Sequential:
    """Return Conv-BatchNorm-ReLU per width (3x3, stride 2 after the first), mean over the map, Linear.

    ``image_size`` is accepted like in every builder, and not needed.

    >>> sum(p.numel() for p in small_cnn().parameters())
    24058
    """
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(zip((in_channels, *widths), widths, strict=False)):
        layers += [
            nn.Conv2d(before, after, 3, stride=2 if number else 1, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))
