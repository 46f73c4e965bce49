"""Line charts over epochs as inline SVG text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 274
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 40, 40
CHARACTER = 6.4  # width of one character of the axis font, pixels
DOTS = 60  # curves with more points than this are drawn without dots


# colours and strokes of a figure that stands alone; on a page they come from its style
STYLE = (
    "svg{font:11px sans-serif;background:#fff}text{fill:#59636e}.end{text-anchor:end}.middle{text-anchor:middle}"
    ".grid{stroke:#d9dee4}line.cut{stroke:#c2410c;stroke-dasharray:3 3}text.cut{fill:#c2410c}"
    "polyline{fill:none;stroke-width:1.8}polyline.after{stroke:none}.train{stroke:#7a8796}.validation{stroke:#1f6feb}"
    ".after{stroke:#c2410c}circle.train{fill:#7a8796}circle.validation{fill:#1f6feb}circle.after{fill:#c2410c}"
)


@dataclass(frozen=True)
class Line:
    """One curve: its name, the CSS class that gives its colour, and its points (x, y)."""

    name: str
    css: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Mark:
    """A vertical mark at ``x`` with a short label."""

    x: float
    label: str


@dataclass(frozen=True)
class Box:
    """The ranges of the axes, and where their values lie in pixels."""

    left: float
    right: float
    bottom: float
    top: float

    def x(self, value: float) -> float:
        """Return the pixel column of ``value``."""
        return LEFT + (value - self.left) / (self.right - self.left) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Return the pixel row of ``value``."""
        return TOP + (self.top - value) / (self.top - self.bottom) * (HEIGHT - TOP - BOTTOM)


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """Return about ``count`` round numbers within [low, high]; integers when ``whole``.

    >>> ticks(0.0, 1.0), ticks(1, 20, 8, whole=True)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [5, 10, 15, 20])
    """
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    raw = max(span / count, 1.0 if whole else 0.0)
    power = 10.0 ** math.floor(math.log10(raw))
    factors = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
    step = next(m * power for m in factors if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    values = [round(k * step, 12) for k in range(first, last + 1)]
    return [int(value) for value in values] if whole else values


def chart(title: str, lines: Sequence[Line], marks: Sequence[Mark], percent: bool = False) -> str:
    """Return a line chart with axes, a legend and vertical marks; empty text without points."""
    points = [point for line in lines for point in line.points]
    if not points:
        return ""
    box = _box(points, percent)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    words = (lambda value: f"{value * 100:.4g} %") if percent else (lambda value: f"{value:.3g}")
    parts += [*axes(box, words), *verticals(box, marks)]
    at = float(LEFT)
    for line in lines:
        path = " ".join(f"{box.x(x):.1f},{box.y(y):.1f}" for x, y in line.points)
        parts.append(f'<polyline class="{line.css}" points="{path}"/>')
        if len(line.points) <= DOTS:
            parts += [_dot(line, box, x, y) for x, y in line.points]
        parts.append(f'<line class="{line.css}" x1="{at:.0f}" x2="{at + 18:.0f}" y1="9" y2="9"/>')
        parts.append(f'<text x="{at + 23:.0f}" y="13">{escape(line.name)}</text>')
        at += 23 + len(line.name) * CHARACTER + 18
    return "".join([*parts, "</svg>"])


def standalone(svg: str) -> str:
    """Return a figure as a file of its own, with its style inside."""
    head, _, body = svg.partition(">")
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{STYLE}</style>{body}'


def _dot(line: Line, box: Box, x: float, y: float) -> str:
    text = escape(f"{line.name}, epoch {x:g}: {y:.4g}")
    place = f'cx="{box.x(x):.1f}" cy="{box.y(y):.1f}"'
    return f'<circle class="{line.css}" {place} r="2.4"><title>{text}</title></circle>'


def _box(points: Sequence[tuple[float, float]], percent: bool) -> Box:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(ys), max(ys)
    pad = (high - low or max(abs(high), 0.1)) * 0.06
    low, high = low - pad, high + pad
    if percent:
        low, high = max(0.0, low), min(1.0, high)
    return Box(min(xs), max(max(xs), min(xs) + 1), low, high)


def axes(box: Box, words: Callable[[float], str], last: float = math.inf) -> list[str]:
    """Return grid and numbers: of y by ``words``, of the epochs up to ``last``."""
    parts = []
    for value in ticks(box.bottom, box.top):
        y = box.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="end" x="{LEFT - 7}" y="{y + 4:.1f}">{words(value)}</text>')
    parts += [
        f'<text class="middle" x="{box.x(value):.1f}" y="{HEIGHT - BOTTOM + 16}">{value:g}</text>'
        for value in ticks(box.left, min(box.right, last), 8, whole=True)
    ]
    middle = (LEFT + WIDTH - RIGHT) / 2
    return [*parts, f'<text class="middle" x="{middle}" y="{HEIGHT - 6}">epoch</text>']


def verticals(box: Box, marks: Sequence[Mark]) -> list[str]:
    """Return dashed verticals, their labels above the plot where they do not touch the one before."""
    parts: list[str] = []
    free = -math.inf
    for mark in marks:
        x, half = box.x(mark.x), len(mark.label) * CHARACTER / 2 + 3
        parts.append(f'<line class="cut" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        if x - half >= free and x + half <= WIDTH:
            parts.append(f'<text class="cut middle" x="{x:.1f}" y="{TOP - 5}">{escape(mark.label)}</text>')
            free = x + half
    return parts
