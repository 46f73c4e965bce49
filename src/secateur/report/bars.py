"""Small bar charts as inline SVG text, made to stand beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

WIDE, HIGH = 270, 118  # pixels of one chart
SIDE, TOP, BOTTOM = 6, 8, 20  # margins
TOWERS = 2.0  # times the second highest bar
GAP = 0.12  # share of a bar's place that stays empty, at most 3 pixels


def bars(
    title: str, stacks: Mapping[str, Sequence[float]], ticks: Sequence[tuple[float, str]], cut: bool = False
) -> str:
    """Return bars with one colour on top of another: CSS class -> heights, of equal number, the lowest class first.

    ``ticks`` are (place, text) below the bars, places counted in bars from the left edge.  ``cut``: one bar that towers
    over all others is cut off, with its share of everything beside it.  Empty text without a height.
    """
    totals = [sum(heights) for heights in zip(*stacks.values(), strict=True)]
    if not any(totals):
        return ""
    first, second = sorted([0.0, *totals])[:-3:-1]
    most = 1.1 * second if cut and first > TOWERS * second > 0 else first
    step = (WIDE - 2 * SIDE) / len(totals)
    wide, scale = step - min(3.0, GAP * step), (HIGH - TOP - BOTTOM) / most
    floor = [0.0] * len(totals)
    parts = [f'<svg viewBox="0 0 {WIDE} {HIGH}" role="img" aria-label="{escape(title)}">']
    for css, heights in stacks.items():
        path = []
        for place, height in enumerate(heights):
            low, high = (HIGH - BOTTOM - min(most, h) * scale for h in (floor[place], floor[place] + height))
            if high < low:
                path.append(f"M{SIDE + place * step:.1f} {low:.1f}V{high:.1f}h{wide:.1f}V{low:.1f}z")
            floor[place] += height
        parts.append(f'<path class="{css}" d="{"".join(path)}"/>')
    if most < first:
        x, half = SIDE + (totals.index(first) + 1) * step + 3, len(totals) / 2
        side, x = ("", x) if totals.index(first) < half else (' class="end"', x - step - 6)
        parts.append(f'<text{side} x="{x:.1f}" y="{TOP + 8}">{first / sum(totals) * 100:.0f} %</text>')
    parts.append(f'<line class="grid" x1="{SIDE}" x2="{WIDE - SIDE}" y1="{HIGH - BOTTOM}" y2="{HIGH - BOTTOM}"/>')
    for place, text in ticks:
        x, half = SIDE + place * step, 3.2 * len(text)
        x = min(max(x, half), WIDE - half)  # inside the chart
        parts.append(f'<text class="middle" x="{x:.1f}" y="{HIGH - 6}">{escape(text)}</text>')
    return "".join([*parts, "</svg>"])
