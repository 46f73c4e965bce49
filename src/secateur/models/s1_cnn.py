"""The small network of train-time pruning by contribution: pooled convolutions, then a perceptron."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from secateur.models.shape import sides


def s1_cnn(
    classes: int = 10,
    in_channels: int = 3,
    image_size: int | Sequence[int] = 32,
    channels: Sequence[int] = (16, 32),
    widths: Sequence[int] = (256, 128),
) -> nn.Sequential:
    """Return Conv-ReLU-MaxPool per entry of ``channels`` (3x3, padding 1), then Linear-ReLU per width, Linear.

    At 32x32 the linear layers are 2048-256-128-classes, without bias; the convolutions have one.  With 10 classes
    that is 448 + 4,640 + 524,288 + 32,768 + 1,280 parameters.

    >>> sum(p.numel() for p in s1_cnn().parameters())
    563424
    """
    height, width = sides(image_size)
    layers: list[nn.Module] = []
    for before, after in zip((in_channels, *channels), channels, strict=False):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    shrink = 2 ** len(channels)
    flat = (channels[-1] if channels else in_channels) * (height // shrink) * (width // shrink)
    layers.append(nn.Flatten())
    for before, after in zip((flat, *widths), widths, strict=False):
        layers += [nn.Linear(before, after, bias=False), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1] if widths else flat, classes, bias=False))
