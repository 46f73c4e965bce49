"""The tables of the census and its bars."""

from __future__ import annotations

from collections import Counter
from typing import Any

# suite -> (share of models that must be right, share that must be cut)
BARS = {
    "classification": (80 / 80, 0.0),
    "segmentation": (6 / 6, 0.0),
    "video": (10 / 10, 0.0),
    "detection": (11 / 12, 0.0),
    "timm": (0.97, 0.0),
    "transformers": (0.95, 0.0),
    "awkward": (1.0, 0.85),
}
COVERED = 0.9


def table(suite: str, rows: dict[str, Any]) -> str:
    """Return one line per model."""
    lines = [f"\n{suite}: {dict(Counter(r['status'] for r in rows.values()))}"]
    lines.append(f"{'model':44} {'status':7} {'dense':>11} {'kept':>6} {'covered':>7} {'gap':>8} {'s':>6}  reason")
    for name, r in rows.items():
        kept = f"{r['kept'] / r['dense']:.2f}" if r.get("kept") and r.get("dense") else "-"
        covered = f"{r['covered']:.2f}" if "covered" in r else "-"
        gap = f"{r['gap']:.0e}" if "gap" in r else "-"
        lines.append(
            f"{name:44} {r['status']:7} {r.get('dense', 0):>11,} {kept:>6} {covered:>7} {gap:>8} "
            f"{r.get('seconds', 0):>6.1f}  {r.get('reason', '')[:100]}"
        )
    return "\n".join(lines)


def bars(results: dict[str, Any]) -> str:
    """Return one line per suite: found, wanted, met or not.

    A model whose layers are all frozen with a reason counts as right among the awkward networks only.
    """
    lines = [f"\n{'suite':15} {'right':>12} {'bar':>6} {'cut':>6} {'bar':>6} {'covered >= 0.9':>15}"]
    for suite, (right_bar, cut_bar) in BARS.items():
        rows = results.get(suite, {})
        if not rows:
            continue
        cut = sum(r["status"] == "right" for r in rows.values())
        right = cut + (sum(r["status"] == "frozen" for r in rows.values()) if suite == "awkward" else 0)
        covered = sum(r.get("covered", 0) >= COVERED for r in rows.values())
        met = right >= right_bar * len(rows) - 1e-9 and cut >= cut_bar * len(rows)
        lines.append(
            f"{suite:15} {right:>6} / {len(rows):<3} {right_bar:>6.0%} {cut / len(rows):>6.0%} {cut_bar:>6.0%} "
            f"{covered:>9} / {len(rows):<3} {'met' if met else 'NOT MET'}"
        )
    return "\n".join(lines)
