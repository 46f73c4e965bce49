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
    bias: bool = True,
) -> nn.Sequential:
    """Return Flatten, then Linear-ReLU per width, then Linear; random weights.

    Without ``bias`` these are the perceptrons of train-time pruning by contribution: ``widths=[50, 30]`` on
    28x28 grey images (39,200 + 1,500 + 300 = 41,000 parameters), ``[512, 256]`` on CIFAR-10 and
    ``[512, 256, 128]`` on CIFAR-100.

    >>> sum(p.numel() for p in mlp(widths=[50]).parameters())
    39760
    """
    height, width = sides(image_size)
    layers: list[nn.Module] = [nn.Flatten()]
    before = in_channels * height * width
    for after in widths:
        layers += [nn.Linear(before, after, bias=bias), nn.ReLU()]
        before = after
    return nn.Sequential(*layers, nn.Linear(before, classes, bias=bias))
