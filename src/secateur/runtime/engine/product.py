"""Matrix-vector products as operators of the table."""

from __future__ import annotations

import numpy as np

from secateur.runtime.engine.choose import BLOCK
from secateur.runtime.engine.lower import FLOORS, Lowering, Number


def padded(low: Lowering, units: int) -> int:
    """Return ``units`` outputs, rounded up to whole blocks."""
    block = BLOCK * low.lanes
    return -(-units // block) * block


def product(low: Lowering, weight: np.ndarray, bias: np.ndarray, relu: bool, out: Number, **source: Number) -> None:
    """Add out = weight x + bias; ``weight`` is (inputs, outputs), ``source`` the fields that say where x lies."""
    width = padded(low, len(bias))
    room = ((0, 0), (0, width - len(bias)))
    blocks = np.pad(weight, room).reshape(len(weight), -1, BLOCK * low.lanes).swapaxes(0, 1)
    low.step(
        "linear", **source, weights_at=low.arena.constant(blocks, np.float32), inputs=len(weight),
        bias_at=low.arena.constant(np.pad(bias, room[1]), np.float32), padded=width, floor=FLOORS[relu], out_data=out,
    )  # fmt: skip


def packed(offset: int, ids: int, count: int) -> dict[str, Number]:
    """Return the source fields of a product with values that lie one after another, in the order of their list."""
    place = {"in_data": offset, "in_plane": 4, "pitch": 4, "height": 1, "width": 1, "compact": 1}
    return {**place, "in_ids": ids, "in_count": count}
