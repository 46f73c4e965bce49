"""The memory of one call: an image of the workspace that every new workspace begins as."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from secateur.runtime.engine.team import HEAD
from secateur.types import EngineError

SLACK = 8192  # vectors read beyond the last plane
ALIGNED = 64
CHUNK = 32 << 20  # bytes of constants that are allocated together: so large that numpy asks for huge pages


@dataclass(eq=False)
class Arena:
    """Offsets handed out so far, and what lies there at the beginning (zeros where nothing is said)."""

    size: int = HEAD
    begin: list[tuple[int, np.ndarray]] = field(default_factory=list)
    kept: list[np.ndarray] = field(default_factory=list)
    left: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint8))
    lists: dict[int, tuple[int, int]] = field(default_factory=dict)

    def place(self, size: int) -> int:
        """Return the offset of ``size`` new bytes."""
        offset = self.size
        self.size += -(-max(size, 1) // ALIGNED) * ALIGNED
        if self.size + SLACK >= 2**31:
            raise EngineError("the network needs a workspace of 2 GiB or more; make the images smaller.")
        return offset

    def array(self, values: np.ndarray) -> int:
        """Return the offset of a copy of ``values``."""
        offset = self.place(values.nbytes)
        self.begin.append((offset, values))
        return offset

    def constant(self, values: Any, kind: Any) -> int:
        """Return the address of a copy of ``values`` outside the workspace, read by all calls."""
        given = np.asarray(values, dtype=kind)
        size = -(-max(given.nbytes, 1) // ALIGNED) * ALIGNED
        if size > len(self.left):
            chunk = np.empty(max(size, CHUNK) + ALIGNED, dtype=np.uint8)  # pages that nobody touches cost nothing
            self.left = chunk[-chunk.ctypes.data % ALIGNED :]
            self.kept.append(chunk)
        kept, self.left = self.left[: given.nbytes].view(kind), self.left[size:]
        kept[:] = given.ravel()
        return int(kept.ctypes.data)

    def full(self, units: int) -> tuple[int, int]:
        """Return the offsets of the list of all ``units`` channels and of its length."""
        if units not in self.lists:
            ids = np.concatenate([np.arange(units), [0]]).astype(np.int32)
            self.lists[units] = (self.array(ids), self.array(np.array([units], dtype=np.int64)))
        return self.lists[units]

    def empty(self, units: int) -> tuple[int, int]:
        """Return the offsets of a list that a gate writes, and of its length."""
        return self.place(4 * (units + 1)), self.place(8)

    def image(self) -> np.ndarray:
        """Return the bytes of a new workspace."""
        out = np.zeros(self.size + SLACK, dtype=np.uint8)
        for offset, values in self.begin:
            out[offset : offset + values.nbytes] = np.ascontiguousarray(values).view(np.uint8).ravel()
        return out
