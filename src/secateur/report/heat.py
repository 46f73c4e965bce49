"""A table of shares as a picture: inline SVG text, one path for all cells of one shade."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from html import escape

from secateur.report.figures import CHARACTER, WIDTH

NAME = 15  # characters of the name of a row that are shown
ROW, LOWEST = 15, 26  # pixels of a row, and of what stands below the rows
SHADES = 10
DARK = 0.65  # shares above are written in the colour of the page
TOLD = 6  # columns up to which each cell has its number


def heat(title: str, names: Sequence[str], table: Sequence[Sequence[float]], below: str) -> str:
    """Return rows called ``names`` of shares in 0 .. 1, dark where near 1; ``below`` says what the columns are.

    Empty text without a cell.
    """
    if not table or not table[0]:
        return ""
    names = [name if len(name) <= NAME else f"{name[: NAME - 1]}…" for name in names]
    left = max(len(name) for name in names) * CHARACTER + 10
    step, high = (WIDTH - left) / len(table[0]), ROW * len(table)
    parts = [f'<svg viewBox="0 0 {WIDTH} {high + LOWEST}" role="img" aria-label="{escape(title)}">']
    parts += [
        f'<text class="end" x="{left - 6:.1f}" y="{ROW * (place + 0.5) + 4:.1f}">{escape(name)}</text>'
        for place, name in enumerate(names)
    ]
    parts.append(f'<g transform="translate({left:.1f} 0) scale({step:.4f} {ROW})" shape-rendering="crispEdges">')
    parts += [f'<path class="heat" opacity="{shade / SHADES:g}" d="{path}"/>' for shade, path in _shades(table)]
    parts.append("</g>")
    if len(table[0]) <= TOLD:
        parts += [
            _number(share, left + (across + 0.5) * step, down)
            for down, row in enumerate(table)
            for across, share in enumerate(row)
        ]
    parts.append(f'<rect class="edge" x="{left:.1f}" y="0.5" width="{WIDTH - left - 0.5:.1f}" height="{high - 1}"/>')
    parts.append(f'<text x="{left:.1f}" y="{high + 16}">{escape(below)}</text>')
    return "".join([*parts, "</svg>"])


def _number(share: float, x: float, down: int) -> str:
    css = "dark" if share > DARK else "light"
    return f'<text class="middle {css}" x="{x:.1f}" y="{ROW * (down + 0.5) + 4:.1f}">{share * 100:.0f} %</text>'


def _shades(table: Sequence[Sequence[float]]) -> list[tuple[int, str]]:
    """Return (shade, path) of all cells but the white ones, in units of a cell; equal neighbours are one step."""
    paths: dict[int, list[str]] = {}
    for down, row in enumerate(table):
        across = 0
        for shade, cells in itertools.groupby(row, lambda share: round(share * SHADES)):
            wide = len(list(cells))
            if shade:
                paths.setdefault(shade, []).append(f"M{across} {down}h{wide}v1h-{wide}z")
            across += wide
    return [(shade, "".join(path)) for shade, path in sorted(paths.items())]
