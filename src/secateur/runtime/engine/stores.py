"""Where maps lie: planes with a shared zero border, so that a convolution is one run over flat pixels.

Row y of a plane begins ``pitch`` floats after row y - 1.  The border right of a row is the border left of the next
one, and is never written.  A convolution works on the flat run of its input, so input and output share the pitch and
the place of the first pixel: such stores form a segment.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LINE = 64  # bytes of a cache line


@dataclass(eq=False)
class Store:
    """The planes of one value: ``units`` channels of ``phases`` planes of ``height`` x ``width`` pixels.

    A strided convolution reads phases: pixels of equal remainder.  ``border`` is (top, bottom, left, right) in pixels
    that readers need.  ``data`` (byte offset of the first pixel), ``plane``, ``phase`` and ``pitch`` (bytes) are set
    by ``arrange``.  A ``vector`` has one float per channel and no border.
    """

    units: int
    height: int
    width: int
    phases: int = 1
    fill: float = 0.0
    vector: bool = False
    border: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    leader: Store | None = None
    data: int = 0
    plane: int = 4
    phase: int = 4
    pitch: int = 4

    def segment(self) -> Store:
        """Return the store that stands for this one's segment."""
        while self.leader is not None:
            self = self.leader
        return self

    def join(self, other: Store) -> None:
        """Share pitch and first pixel with ``other``."""
        mine, theirs = self.segment(), other.segment()
        if mine is not theirs:
            mine.leader = theirs

    def need(self, border: tuple[int, int, int, int]) -> None:
        """Make the border at least this wide."""
        self.border = [max(pair) for pair in zip(self.border, border, strict=True)]

    @property
    def least(self) -> int:
        """The smallest pitch, in floats, in which no reader meets a pixel of the next row."""
        return self.width + max(self.border[2:])

    @property
    def floats(self) -> int:
        """The pitch in floats."""
        return self.pitch // 4

    @property
    def run(self) -> int:
        """Flat pixels from the first to the last."""
        return (self.height - 1) * self.floats + self.width


def arrange(stores: list[Store], lanes: int) -> dict[Store, tuple[int, int]]:
    """Set pitch, plane and phase of every store; return (bytes before the first pixel, bytes in all) of each.

    Planes end with one vector of border, because vectors read beyond the last pixel; their distance is an odd number
    of cache lines, so that equal pixels of many channels spread over the cache.
    """
    members: dict[Store, list[Store]] = {}
    for store in stores:
        members.setdefault(store.segment(), []).append(store)
    sizes = {}
    for group in members.values():
        pitch = max(store.least for store in group)
        for store in group:
            if store.vector:
                sizes[store] = (0, 4 * (store.units + 4 * lanes))
                continue
            top, bottom, left, _ = (max(s.border[i] for s in group) for i in range(4))
            store.pitch = 4 * pitch
            first = 4 * (top * pitch + left)
            size = first + 4 * ((store.height + bottom) * pitch + max(left, lanes) + lanes)
            store.phase = LINE * (-(-size // LINE) | 1)
            store.plane = store.phase * store.phases
            if store.phases > 1:
                store.plane = LINE * (store.plane // LINE | 1)
            sizes[store] = (first, store.plane * store.units + LINE)
    return sizes
