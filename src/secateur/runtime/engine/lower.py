"""From the layers of a program to the table of descriptors that the driver walks."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from secateur.runtime.engine.arena import Arena
from secateur.runtime.engine.driver import OPERATORS, WORDS
from secateur.runtime.engine.stores import Store, arrange
from secateur.runtime.nodes import Program

Number = int | Callable[[], int]


def bits(value: float) -> int:
    """Return the bits of a float32 as an integer."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


FLOORS = {True: bits(0.0), False: bits(float("-inf"))}
NO_CEILING = bits(float("inf"))


class LooseError(Exception):
    """Lower again without tight planes."""


@dataclass(eq=False)
class Lowering:
    """The table in the making; fields that depend on the layout are functions, called at the end."""

    program: Program
    lanes: int
    arena: Arena = field(default_factory=Arena)
    stores: list[Store] = field(default_factory=list)
    plain: dict[int, Store] = field(default_factory=dict)
    copies: dict[tuple[int, int, int, float], Store] = field(default_factory=dict)
    lists: dict[int, tuple[int, int]] = field(default_factory=dict)
    steps: list[tuple[str, dict[str, Number]]] = field(default_factory=list)
    masks: dict[tuple[int, int, int], int] = field(default_factory=dict)
    zero: int = 0
    entries: int = 0
    longest: int = 0
    actions: int = 0
    may_be_tight: bool = True
    tight: list[Store] = field(default_factory=list)
    steering: Any = None  # Steering, which is made of these operators
    control: dict[str, int] = field(default_factory=dict)
    late: list[tuple[int, Callable[[], np.ndarray]]] = field(default_factory=list)

    def step(self, name: str, **fields: Number) -> None:
        """Add an operator to the table."""
        self.steps.append((name, fields))

    def store(self, units: int, height: int, width: int, **more: Any) -> Store:
        """Return a new store."""
        self.stores.append(Store(units, height, width, **more))
        return self.stores[-1]

    def value(self, value: int) -> Store:
        """Return the planes of ``value``, with the image copied into some when it is that."""
        if value not in self.plain:  # only the image has none
            self.plain[value] = self.store(*self.program.shapes[value])
            self.copy(value, None, self.plain[value])
        return self.plain[value]

    def phases(self, value: int, stride: tuple[int, int], fill: float, always: bool) -> Store:
        """Return the planes of ``value`` for a reader of this stride, border filled with ``fill``."""
        if not always and stride == (1, 1) and not self.value(value).vector:
            return self.value(value)
        key = (value, *stride, fill)
        if key not in self.copies:
            units, height, width = self.program.shapes[value]
            size = (-(-height // stride[0]), -(-width // stride[1]))
            self.copies[key] = self.store(units, *size, phases=stride[0] * stride[1], fill=fill)
            source = self.plain.get(value) if value == self.program.source else self.value(value)
            self.copy(value, source, self.copies[key], stride)
        return self.copies[key]

    def copy(
        self, value: int, source: Store | None, to: Store, stride: tuple[int, int] = (1, 1), first: int = 0
    ) -> None:
        """Copy ``value`` from ``source`` (None: the image) into the phases of ``to``, from channel ``first`` on."""
        _, height, width = self.program.shapes[value]
        ids, count = self.list(value)
        self.step(
            "layout",
            src=-1 if source is None else lambda: source.data,
            src_plane=4 * height * width if source is None else lambda: source.plane,
            src_pitch=4 * width if source is None else lambda: source.pitch,
            ids=ids, count=count, height=height, width=width, stride_y=stride[0], stride_x=stride[1],
            dst=lambda: to.data + first * to.plane, dst_plane=lambda: to.plane, dst_phase=lambda: to.phase,
            dst_pitch=lambda: to.pitch,
        )  # fmt: skip

    def widest(self, store: Store) -> int:
        """Return the pitch that the segment of ``store`` needs so far."""
        return max(s.least for s in self.stores if s.segment() is store.segment())

    def list(self, value: int) -> tuple[int, int]:
        """Return the offsets of the active channels of ``value`` and of their number."""
        return self.lists.get(value) or self.arena.full(self.program.shapes[value][0])

    def lanes_of(self, store: Store) -> dict[str, Number]:
        """Return the fields that say which lanes of a flat run are pixels."""
        return {
            "vectors": lambda: -(-store.run // self.lanes),
            "masks_at": lambda: self.mask(store.floats, store.height, store.width),
        }

    def mask(self, pitch: int, height: int, width: int) -> int:
        """Return the address of the masks, 16 bits per vector, of a flat run of pixels."""
        key = (pitch, height, width)
        if key not in self.masks:
            vectors = -(-((height - 1) * pitch + width) // self.lanes)
            lane = np.arange(vectors * self.lanes)
            inside = (lane % pitch < width) & (lane // pitch < height)
            packed = inside.reshape(vectors, self.lanes) @ (1 << np.arange(self.lanes))
            self.masks[key] = self.arena.constant(packed.astype(np.uint16), np.uint16)
        return self.masks[key]

    def after(self, size: int, values: Callable[[], np.ndarray]) -> int:
        """Return the offset of ``size`` bytes whose first content depends on the layout."""
        offset = self.arena.place(size)
        self.late.append((offset, values))
        return offset

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the table, int64 (steps, WORDS), and the image of the workspace.

        Raises ``LooseError`` when a store whose readers count on touching rows shares a segment with a wider one.
        """
        sizes = arrange(self.stores, self.lanes)
        if any(store.floats != store.width for store in self.tight):
            raise LooseError
        for store, (first, size) in sizes.items():
            offset = self.arena.place(size)
            store.data = offset + first
            if store.fill:
                self.arena.begin.append((offset, np.full(size // 4, store.fill, dtype=np.float32)))
        self.zero = self.arena.place(max(size for _, size in sizes.values()))
        self.entries = self.arena.place(16 * (self.longest + 1))
        self.arena.begin += [(offset, values()) for offset, values in self.late]
        table = np.zeros((len(self.steps), WORDS), dtype=np.int64)
        names = list(OPERATORS)
        for row, (name, given) in zip(table, self.steps, strict=True):
            row[0] = names.index(name)
            row[1 : 1 + len(OPERATORS[name])] = [_number(given[key]) for key in OPERATORS[name]]
        return table, self.arena.image()


def _number(given: Number) -> int:
    return given() if callable(given) else given
