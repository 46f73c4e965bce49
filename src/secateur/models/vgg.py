"""VGG networks for small images: 3x3 convolutions with batch norm, one linear layer behind them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from secateur.models.shape import sides

STAGES = (64, 128, 256, 512, 512)
CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


def vgg(
    classes: int = 10,
    in_channels: int = 3,
    image_size: int | Sequence[int] = 32,
    depth: int = 16,
    width: float = 1,
    widths: Sequence[int] | None = None,
) -> nn.Sequential:
    """Return VGG-``depth``-BN for CIFAR (Simonyan and Zisserman 2015, arXiv 1409.1556), depth 11, 13, 16 or 19.

    Five stages of Conv-BatchNorm-ReLU, a max pool between them, the mean over the map behind them.  Departs from
    the paper as is usual at 32x32: batch norm in place of convolution biases, one linear layer in place of three.
    ``width`` scales every layer; ``widths`` sets them, one number per convolution.

    VGG-16 has 14,724,042 parameters here.

    >>> sum(p.numel() for p in vgg(width=0.25).parameters())
    923130
    """
    if depth not in CONVOLUTIONS:
        raise ValueError(f"depth must be one of {sorted(CONVOLUTIONS)}; got {depth}.")
    if min(sides(image_size)) < 16:
        raise ValueError(f"four poolings need images of at least 16 x 16; got {image_size}.")
    numbers = CONVOLUTIONS[depth]
    starts = {sum(numbers[:stage]) for stage in range(1, len(numbers))}  # a pool stands before these layers
    full = [max(1, int(width * size)) for size, number in zip(STAGES, numbers, strict=True) for _ in range(number)]
    if widths is not None and (len(widths) != len(full) or width != 1):
        raise ValueError(f"widths must have {len(full)} numbers, and width be left out; got {len(widths)}, {width}.")
    layers: list[nn.Module] = []
    before = in_channels
    for number, after in enumerate(widths or full):
        layers += [nn.MaxPool2d(2)] if number in starts else []
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))
