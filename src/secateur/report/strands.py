"""Lines of several arms over the epochs as inline SVG text: means, bands of their spread, events, values at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from secateur.report.figures import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Box, Mark, axes, verticals

DASH = 9  # pixels of each colour where several arms share one line
STEP = 13  # pixels from one value at the end to the next
MOST = 0.4  # of the figure is for values at the end, whatever their number
Dot = tuple[float, float, float]  # x, mean, spread


@dataclass(frozen=True)
class Strand:
    """One arm: the CSS class of its colour, its words, its line, the places of its events and its value at the end."""

    css: str
    text: str
    line: Sequence[Dot]
    events: Sequence[float] = ()
    end: tuple[float, float] | None = None  # mean, spread


@dataclass(frozen=True)
class Scale:
    """How a quantity is drawn: the words of a value, the range that it cannot leave, whether the axis begins at 0."""

    words: Callable[[float], str]
    low: float = -math.inf
    high: float = math.inf
    zero: bool = False


def figure(title: str, strands: Sequence[Strand], marks: Sequence[Mark], epochs: int, scale: Scale) -> str:
    """Return the figure over ``epochs``; empty text without points.  ``marks`` are events that all arms share."""
    strands = [strand for strand in strands if strand.line]
    if not strands:
        return ""
    ended = [strand for strand in strands if strand.end is not None]
    box = _box(strands, epochs, scale, len(ended))
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    parts += [*axes(box, scale.words, last=epochs), *verticals(box, marks)]
    parts += [_band(strand, box, scale) for strand in strands]
    for strand, dash in zip(strands, dashes([tuple(strand.line) for strand in strands]), strict=True):
        parts.append(_line(strand, box, dash))
        parts += [_ring(strand, box, at) for at in strand.events]
    return "".join([*parts, *_ends(ended, box, epochs, scale), "</svg>"])


def dashes(lines: Sequence[tuple[Dot, ...]]) -> list[str]:
    """Return the dashes of each line: nothing, or where lines are the same a turn for each.

    >>> one, other = ((1.0, 2.0, 0.0),), ((1.0, 3.0, 0.0),)
    >>> dashes([one, other, one])
    ['9 9', '', '9 9 -9']
    """
    found = []
    for place, line in enumerate(lines):
        same = [number for number, other in enumerate(lines) if other == line]
        turn = same.index(place) * DASH
        found.append("" if len(same) == 1 else f"{DASH} {DASH * (len(same) - 1)}" + (f" {-turn}" if turn else ""))
    return found


def steps(values: Sequence[float]) -> list[Dot]:
    """Return the line of a value that holds within each epoch; the last of ``values`` is the one at the end.

    >>> steps([5, 5, 4, 4])
    [(0.5, 5, 0.0), (2.5, 5, 0.0), (2.5, 4, 0.0), (3.5, 4, 0.0)]
    """
    line: list[Dot] = [(0.5, values[0], 0.0)] if values else []
    for epoch, value in enumerate(values[1:], 1):
        if value != line[-1][1]:
            line += [(epoch + 0.5, line[-1][1], 0.0), (epoch + 0.5, value, 0.0)]
    return [*line, *([(len(values) - 0.5, line[-1][1], 0.0)] if len(values) > 1 else [])]


def _box(strands: Sequence[Strand], epochs: int, scale: Scale, ends: int) -> Box:
    """Return the ranges; on the right there is room for the values at the end."""
    rows = [(mean, spread) for strand in strands for _, mean, spread in strand.line]
    rows += [strand.end for strand in strands if strand.end is not None]
    low, high = min(mean - spread for mean, spread in rows), max(mean + spread for mean, spread in rows)
    low = 0.0 if scale.zero else low
    pad = (high - low or max(abs(high), 0.1)) * 0.06
    wide = WIDTH - LEFT - RIGHT
    strip = min(STEP * (ends + 1), MOST * wide) / wide if ends else 0.0
    right = 0.5 + epochs / (1 - strip)
    return Box(0.5, right, max(scale.low, low if scale.zero else low - pad), min(scale.high, high + pad))


def _line(strand: Strand, box: Box, dash: str) -> str:
    path = " ".join(f"{box.x(x):.1f},{box.y(y):.1f}" for x, y, _ in strand.line)
    pattern, _, turn = dash.partition(" -")
    style = f' stroke-dasharray="{pattern}"' + (f' stroke-dashoffset="-{turn}"' if turn else "") if dash else ""
    text = f"<title>{escape(strand.text)}</title>"
    if len({x for x, _, _ in strand.line}) == 1:  # one epoch: a line without length cannot be seen
        x, y, _ = strand.line[0]
        return f'<circle class="arm {strand.css}" cx="{box.x(x):.1f}" cy="{box.y(y):.1f}" r="3">{text}</circle>'
    return f'<polyline class="arm {strand.css}"{style} points="{path}">{text}</polyline>'


def _band(strand: Strand, box: Box, scale: Scale) -> str:
    """Return one standard deviation on both sides; nothing where there is no spread."""
    if not any(spread for _, _, spread in strand.line):
        return ""
    upper = [(x, min(scale.high, mean + spread)) for x, mean, spread in strand.line]
    lower = [(x, max(scale.low, mean - spread)) for x, mean, spread in strand.line]
    path = " ".join(f"{box.x(x):.1f},{box.y(max(y, box.bottom)):.1f}" for x, y in [*upper, *reversed(lower)])
    return f'<polygon class="band {strand.css}" points="{path}"/>'


def _ring(strand: Strand, box: Box, at: float) -> str:
    """Return a ring on the line where the event is: at its vertex there, or at the epoch before it."""
    near = [point for point in strand.line if point[0] <= at]
    if not near:
        return ""
    x, y, _ = near[-1]
    return f'<circle class="ring {strand.css}" cx="{box.x(x):.1f}" cy="{box.y(y):.1f}" r="3.4"/>'


def _ends(strands: Sequence[Strand], box: Box, epochs: int, scale: Scale) -> list[str]:
    """Return the values at the end beside each other, right of the last epoch, with error bars."""
    if not strands:
        return []
    first = box.x(epochs + 0.5)
    step = (WIDTH - RIGHT - first) / (len(strands) + 0.5)
    parts = [f'<line class="grid" x1="{first:.1f}" x2="{first:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>']
    middle = (first + WIDTH - RIGHT) / 2
    parts.append(f'<text class="middle" x="{middle:.1f}" y="{HEIGHT - BOTTOM + 16}">test</text>')
    for place, strand in enumerate(strands):
        mean, spread = strand.end or (0.0, 0.0)
        x, y = first + step * (place + 0.75), box.y(mean)
        if spread:
            top, low = box.y(min(scale.high, mean + spread)), box.y(max(scale.low, mean - spread))
            parts.append(f'<line class="arm {strand.css}" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{low:.1f}"/>')
        path = f"{x:.1f},{y - 5:.1f} {x + 5:.1f},{y:.1f} {x:.1f},{y + 5:.1f} {x - 5:.1f},{y:.1f}"
        text = escape(f"{strand.text}, test: {scale.words(mean)}")
        parts.append(f'<polygon class="test {strand.css}" points="{path}"><title>{text}</title></polygon>')
    return parts
