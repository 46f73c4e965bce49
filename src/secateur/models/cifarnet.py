"""M-CifarNet: eight convolutions without padding waste or hidden linear layers, the small network of FBS."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def cifarnet(
    classes: int = 10,
    in_channels: int = 3,
    image_size: int | Sequence[int] = 32,
    widths: Sequence[int] = (64, 64, 128, 128, 128, 192, 192, 192),
    dropout: float = 0.5,
) -> nn.Sequential:
    """Return M-CifarNet, the CIFAR network of feature boosting and suppression (Gao et al. 2019, arXiv 1810.05331).

    Eight 3x3 Conv-BatchNorm-ReLU: the first unpadded, the third and sixth with stride 2, dropout behind the fourth
    and seventh; then the mean over the map and one linear layer.  At 32x32 its weight matrices and kernels hold
    1,293,888 numbers (batch norms and the last bias add 2,186) and an image takes 174,301,824 multiply-accumulates.

    Departs from the original in one place: stride 2 on 30x30 maps is padded on all sides, not right and below only.
    ``image_size`` is accepted like in every builder, and not needed.

    >>> sum(p.numel() for p in cifarnet().parameters() if p.dim() > 1)
    1293888
    """
    if len(widths) != 8:
        raise ValueError(f"widths must have 8 numbers, one per convolution; got {len(widths)}.")
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(zip((in_channels, *widths), widths, strict=False)):
        stride, padding = 2 if number in (2, 5) else 1, 1 if number else 0
        layers += [nn.Conv2d(before, after, 3, stride, padding, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.Dropout(dropout)] if number in (3, 6) else []
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))
