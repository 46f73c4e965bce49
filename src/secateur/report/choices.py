"""What a gated model chose, for the page of a run: figures and tables from the record ``choices``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from secateur.report.bars import bars
from secateur.report.heat import heat
from secateur.report.scatter import short

Data = Mapping[str, Any]

SHOWN = 8  # layers whose histograms are drawn; the others are folded away
TAIL = 0.001  # bins on the right that hold no more than this share of everything are drawn as one


def choices(data: Data, classes: Sequence[str]) -> dict[str, Any]:
    """Return the values of the part of the page; empty without a record."""
    if not data:
        return {}
    steered = any("actions" in row for row in data["layers"])
    charts = [row for row in map(_chart, data["layers"]) if row[1]]
    return {
        "n": data["n"],
        "part": data["part"],
        "dense": data["dense"],
        "mean": data["mean"],
        "spread": (data["least"], data["most"]),
        "layers": data["layers"],
        "steered": steered,
        "charts": charts[:SHOWN],
        "more": charts[SHOWN:],
        "maps": [(row["path"], _map(row, classes)) for row in data["maps"]],
        "per_class": [
            {
                "name": classes[row["class"]],
                "n": row["n"],
                "share": row["mean"] / data["dense"],
                "costs": [short(row[how]) for how in ("mean", "min", "max")],
            }
            for row in sorted(data["per_class"], key=lambda row: -row["mean"])
        ],
        "ranked": data["ranked"],
        "extremes": _extremes(data["extremes"] or {}, classes),
    }


def _extremes(rows: Mapping[str, Sequence[Data]], classes: Sequence[str]) -> list[tuple[str, list[dict[str, Any]]]]:
    return [
        (name, [{**one, "name": classes[one["class"]], "cost": short(one["macs"])} for one in images])
        for name, images in rows.items()
    ]


def _chart(layer: Data) -> tuple[str, str]:
    """Return the path of a layer and its histogram: of actions, or of saliencies computed and skipped."""
    path = layer["path"]
    if "actions" in layer:
        ticks = [
            (place + 0.45, f"{units}: {share * 100:.0f} %")
            for place, (units, share) in enumerate(zip(layer["groups"], layer["actions"], strict=True))
        ]
        return path, bars(f"channels that images compute in {path}", {"on": layer["actions"]}, ticks)
    found = layer["saliency"]
    rows = {css: found[key] for css, key in (("on", "computed"), ("off", "skipped"))}
    rows, folded = _folded(rows)
    count, step = len(rows["on"]), found["top"] / len(found["computed"])
    last = f"{step * (count - 1):.3g} and more" if folded else f"{step * count:.3g}"
    ticks = [(0.0, "0"), (count / 2, f"{step * count / 2:.3g}"), (float(count), last)]
    return path, bars(f"saliencies of {path}", rows, ticks, cut=True)


def _folded(rows: Mapping[str, Sequence[int]]) -> tuple[dict[str, list[int]], bool]:
    """Return histograms whose last bin holds all that follows, where that is next to nothing; and whether it does."""
    totals = [sum(column) for column in zip(*rows.values(), strict=True)]
    least, right = TAIL * sum(totals), len(totals)
    while right > 1 and sum(totals[right - 1 :]) <= least:
        right -= 1
    folded = {css: [*row[: right - 1], sum(row[right - 1 :])] for css, row in rows.items()}
    return folded, any(totals[right:])


def _map(row: Data, classes: Sequence[str]) -> str:
    """Return the map of a layer, its channels from the most to the least used one."""
    table = row["use"]
    if row["of"] == "channels":
        means = [sum(column) for column in zip(*table, strict=True)]
        order = sorted(range(len(means)), key=lambda place: -means[place])
        table = [[line[place] for place in order] for line in table]
        below = f"{len(order)} channels, the most used on the left"
    else:
        below = f"groups 1 to {len(table[0])}"
    names = [classes[label] for label in row["classes"]]
    return heat(f"use of {row['path']} by class", names, table, below)
