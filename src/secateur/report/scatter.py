"""Accuracy against a cost as inline SVG text: points with error bars, numbers beside them, the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from secateur.report.figures import BOTTOM, CHARACTER, HEIGHT, LEFT, RIGHT, WIDTH, Box, ticks

WIDE = 8.0  # axes whose ends differ by more than this factor are logarithmic
CAP = 3.0  # half the length of the end of an error bar, pixels
Area = tuple[float, float, float, float]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Point:
    """One mean (x cost, y fraction) with half-lengths of its error bars, its number, CSS class and words."""

    x: float
    y: float
    dx: float
    dy: float
    number: int
    css: str
    text: str


def scatter(
    title: str,
    axis: str,
    points: Sequence[Point],
    front: Sequence[tuple[float, float]],
    names: Mapping[str, str],
    percent: bool = True,
) -> str:
    """Return the figure; ``front`` are the (x, y) of the Pareto front, cheapest first; ``names`` the legend;
    ``percent``: y are fractions, else plain numbers.

    Empty text without points.
    """
    if not points:
        return ""
    low, high = min(p.x for p in points), max(p.x for p in points)
    scale = math.log10 if low > 0 and high / low > WIDE else float
    box = _box(points, scale, percent)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    parts += [*_axes(box, axis, scale is math.log10, percent), _front(box, front, scale)]
    bars = [_bars(p, box, scale) for p in points]
    parts += [
        f'<line class="bar {p.css}" x1="{a:.1f}" y1="{b:.1f}" x2="{c:.1f}" y2="{d:.1f}"/>'
        for p, lines in zip(points, bars, strict=True)
        for a, b, c, d in lines
    ]
    places = [(box.x(scale(p.x)), box.y(p.y)) for p in points]
    parts += [_dot(p, place) for p, place in zip(points, places, strict=True)]
    parts += [
        f'<text class="middle number" x="{x:.1f}" y="{y:.1f}">{p.number}</text>'
        for p, (x, y) in zip(
            points,
            labels(places, [str(p.number) for p in points], [line for lines in bars for line in lines]),
            strict=True,
        )
    ]
    return "".join([*parts, *_legend(names), "</svg>"])


def _box(points: Sequence[Point], scale: Callable[[float], float], percent: bool) -> Box:
    """Return ranges that hold all points and error bars (of fractions: cut at nothing and at 100 %)."""
    xs = [scale(x) for p in points for x in (_least(p), p.x + p.dx)]
    ys = [y for p in points for y in (p.y - p.dy, p.y + p.dy)]
    wide, tall = max(xs) - min(xs), max(ys) - min(ys)
    by, up = (wide or abs(xs[0]) or 1.0) * 0.07, (tall or 0.02) * 0.09
    low = min(ys) - up
    return Box(min(xs) - by, max(xs) + by, max(0.0, low) if percent else low, max(ys) + up)


def _least(point: Point) -> float:
    """Return the left end of the error bar, above zero so that it has a logarithm."""
    return max(point.x - point.dx, point.x * 0.05)


def _axes(box: Box, axis: str, logarithmic: bool, percent: bool) -> list[str]:
    parts = []
    for value in ticks(box.bottom, min(box.top, 1.0) if percent else box.top):
        y = box.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="end" x="{LEFT - 7}" y="{y + 4:.1f}">{_share(value) if percent else f"{value:.5g}"}</text>'
        )
    for value in _log_ticks(box.left, box.right) if logarithmic else ticks(box.left, box.right, 6):
        x = box.x(math.log10(value) if logarithmic else value)
        parts.append(f'<text class="middle" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}">{short(value)}</text>')
    note = ", logarithmic" if logarithmic else ""
    return [
        *parts,
        f'<text class="middle" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}">{escape(axis)}{note}</text>',
    ]


def _share(value: float) -> str:
    return f"{value * 100:.4g} %"


def _log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times the powers of ten between 10**low and 10**high; the powers alone over 3 decades."""
    factors = (1, 2, 5) if high - low < 3 else (1,)
    found = [m * 10.0**k for k in range(math.floor(low), math.ceil(high) + 1) for m in factors]
    return [value for value in found if low <= math.log10(value) <= high]


def short(value: float) -> str:
    """Return a number for an axis.

    >>> [short(v) for v in (0.05, 2500, 1.5e6, 3e9)]
    ['0.05', '2.5 k', '1.5 M', '3 G']
    """
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _front(box: Box, front: Sequence[tuple[float, float]], scale: Callable[[float], float]) -> str:
    """Return the front as a staircase: the accuracy that can be had for at most x."""
    if not front:
        return ""
    path, before = [], None
    for cost, accuracy in front:
        x, y = box.x(scale(cost)), box.y(accuracy)
        path += [] if before is None else [f"{x:.1f},{before:.1f}"]
        path.append(f"{x:.1f},{y:.1f}")
        before = y
    return f'<polyline class="front" points="{" ".join([*path, f"{WIDTH - RIGHT},{before:.1f}"])}"/>'


def _bars(point: Point, box: Box, scale: Callable[[float], float]) -> list[Area]:
    """Return the ends of the lines of the error bars, with caps; none where there is no spread."""
    x, y = box.x(scale(point.x)), box.y(point.y)
    lines: list[Area] = []
    if point.dx:
        left, right = box.x(scale(_least(point))), box.x(scale(point.x + point.dx))
        lines += [(left, y, right, y), *((end, y - CAP, end, y + CAP) for end in (left, right))]
    if point.dy:
        top, bottom = box.y(point.y + point.dy), box.y(max(box.bottom, point.y - point.dy))
        lines += [(x, top, x, bottom), *((x - CAP, end, x + CAP, end) for end in (top, bottom))]
    return lines


def _dot(point: Point, place: tuple[float, float]) -> str:
    where = f'cx="{place[0]:.1f}" cy="{place[1]:.1f}"'
    return f'<circle class="{point.css}" {where} r="4.2"><title>{escape(point.text)}</title></circle>'


def labels(
    places: Sequence[tuple[float, float]], texts: Sequence[str], lines: Sequence[Area] = ()
) -> list[tuple[float, float]]:
    """Return the middle of each label's baseline: beside its point, where it covers the least of dots and lines.

    >>> labels([(100, 100)], ["1"])
    [(112.2, 93)]
    """
    taken: list[Area] = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    taken += [(a - 1, b - 1, c + 1, d + 1) for a, b, c, d in lines]
    found = []
    for (x, y), text in zip(places, texts, strict=True):
        half = len(text) * CHARACTER / 2
        near = half + 9
        offers = [
            (x + a, y + b)
            for a, b in ((near, -7), (-near, -7), (near, 15), (-near, 15), (0, -12), (0, 20), (near + 10, 4))
        ]
        areas = [(a - half, b - 9, a + half, b + 1) for a, b in offers]
        best = min(range(len(offers)), key=lambda i: sum(_overlap(areas[i], other) for other in taken))
        taken.append(areas[best])
        found.append(offers[best])
    return found


def _overlap(one: Area, two: Area) -> float:
    """Return the area that two rectangles share."""
    wide, tall = min(one[2], two[2]) - max(one[0], two[0]), min(one[3], two[3]) - max(one[1], two[1])
    return max(0.0, wide) * max(0.0, tall)


def _legend(names: Mapping[str, str]) -> list[str]:
    """Return marks and names, in a second row where the first is full."""
    parts, at, y = [], float(LEFT), 9
    for css, name in names.items():
        wide = 21 + len(name) * CHARACTER
        if at + wide > WIDTH and at > LEFT:
            at, y = float(LEFT), y + 15
        mark = f'<line class="front" x1="{at:.0f}" x2="{at + 16:.0f}" y1="{y}" y2="{y}"/>'
        dot = f'<circle class="{css}" cx="{at + 8:.0f}" cy="{y}" r="4.2"/>'
        parts += [mark if css == "front" else dot, f'<text x="{at + 21:.0f}" y="{y + 4}">{escape(name)}</text>']
        at += wide + 16
    return parts
