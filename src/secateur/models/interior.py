"""Widths inside blocks: one factor for all of them, or the exact profile of a network that was pruned."""

from __future__ import annotations

from collections.abc import Sequence


def interior_widths(full: Sequence[int], bottleneck: float, interior: Sequence[int] | None) -> list[int]:
    """Return one width per block: ``interior`` where it is given, else int(bottleneck * full width).

    ``full`` are the widths of the unreduced network.  A uniform ``bottleneck`` and the copied profile of a pruned
    network are the two reduced baselines of Crowley et al. 2018 (arXiv 1810.04622).

    Raises ``ValueError`` when a width is below 1 or ``interior`` does not have one number per block.

    >>> interior_widths([32, 64], 0.5, None), interior_widths([32, 64], 1, [7, 9])
    ([16, 32], [7, 9])
    """
    if interior is not None and bottleneck != 1:
        raise ValueError(f"give bottleneck or interior, not both; got {bottleneck} and {list(interior)}.")
    widths = [int(bottleneck * width) for width in full] if interior is None else list(interior)
    if len(widths) != len(full):
        raise ValueError(f"interior must have one width for each of the {len(full)} blocks; got {len(widths)}.")
    if any(width < 1 for width in widths):
        raise ValueError(f"widths inside blocks must be at least 1; got {widths}.")
    return widths
