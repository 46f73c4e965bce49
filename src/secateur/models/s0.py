"""The networks of the run-time pruning reference: 4, 6 or 8 convolutions at full size, two linear layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from secateur.models.shape import sides

WIDTHS = {
    4: (32, 50, 20, 12),
    6: (32, 50, 40, 30, 20, 12),  # recorded is only "51.2 M": see the docstring of s0
    8: (64, 128, 100, 64, 32, 25, 20, 16),
}
HIDDEN = 512


def s0(
    classes: int = 10,
    in_channels: int = 3,
    image_size: int | Sequence[int] = 32,
    depth: int = 4,
    widths: Sequence[int] | None = None,
    dropout: float | None = None,
) -> nn.Sequential:
    """Return the network of ``depth`` convolutions on which runtime neural pruning was reproduced.

    Conv-ReLU-Dropout per layer (3x3, padding 1), one 2x2 max pool behind the last, Linear 512, Linear; the method
    is Lin et al., NIPS 2017.  ``dropout`` is 0.3 with 4 convolutions, else 0.1; ``widths`` replaces ``depth``.

    At 32x32 the convolutions take 27,058,176 multiplications (4) and 288,018,432 (8).  For 6 the widths are not on
    record, only 51.2 million counted as if the last layer were pooled first; these widths give 51,204,096 in that
    way, 52,862,976 in truth.

    >>> [layer.out_channels for layer in s0() if isinstance(layer, nn.Conv2d)]
    [32, 50, 20, 12]
    """
    if widths is None and depth not in WIDTHS:
        raise ValueError(f"depth must be one of {sorted(WIDTHS)}; got {depth}.")
    chosen = tuple(widths or WIDTHS[depth])
    chance = (0.3 if len(chosen) == 4 else 0.1) if dropout is None else dropout
    height, width = sides(image_size)
    layers: list[nn.Module] = []
    for before, after in zip((in_channels, *chosen), chosen, strict=False):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.Dropout(chance)]
    flat = chosen[-1] * (height // 2) * (width // 2)
    layers += [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(flat, HIDDEN), nn.ReLU(), nn.Dropout(chance)]
    return nn.Sequential(*layers, nn.Linear(HIDDEN, classes))
