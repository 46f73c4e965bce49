"""How a builder reads ``image_size``."""

from __future__ import annotations

from collections.abc import Sequence


def sides(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Return (height, width) of ``image_size``: one number for a square, or the two.

    >>> sides(28), sides([32, 48])
    ((28, 28), (32, 48))
    """
    if isinstance(image_size, int):
        return image_size, image_size
    height, width = image_size
    return height, width
