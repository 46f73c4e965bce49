"""A multi-layer perceptron on flattened images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from secateur.models.shape import sides


def mlp(
    classes: int = 10,
    in_channels: int = 1,
    image_size: int | Sequence[int] = 28,
    widths: Sequence[int] = (128, 64),
) -> nn.Sequential:
    """Return Flatten, then Linear-ReLU per width, then Linear; random weights.

    >>> sum(p.numel() for p in mlp(widths=[50]).parameters())
    39760
    """
    height, width = sides(image_size)
    layers: list[nn.Module] = [nn.Flatten()]
    before = in_channels * height * width
    for after in widths:
        layers += [nn.Linear(before, after), nn.ReLU()]
        before = after
    return nn.Sequential(*layers, nn.Linear(before, classes))
