"""From records to what the page shows: plain values, formatted numbers, figures."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from secateur.report.choices import choices
from secateur.report.figures import Line, Mark, chart
from secateur.report.metrics import of_task
from secateur.types import Record

Data = Mapping[str, Any]

UNITS = {"fraction": "%", "nats": "nats", "params": "", "macs": "", "ms": "ms", "bytes": "kB", "times": "x"}
NAMES = {
    "validation top1": "validation accuracy",
    "validation top5": "validation top-5 accuracy",
    "test top1": "test accuracy",
    "test top5": "test top-5 accuracy",
    "validation elbo": "validation ELBO",
    "test elbo": "test ELBO",
    "validation kl": "validation KL",
    "test kl": "test KL",
    "params": "parameters",
    "macs": "MACs per image",
    "unmasked params": "parameters that are not masked",
    "unmasked macs": "MACs that are not masked (theory)",
    "file": "checkpoint",
}
CARDS = ("test top1", "test elbo", "unmasked params", "params", "macs", "latency")


def view(records: Sequence[Record]) -> dict[str, Any]:
    """Return the values of the page; what a run did not reach yet is empty."""
    stages: dict[str, list[Data]] = {}
    for record in records:
        stages.setdefault(record.stage, []).append(record.data)
    run, model, measure, stopped = (_last(stages, name) for name in ("run", "model", "measure", "stopped"))
    rows = comparison(measure.get("measurements", {}))
    cuts = stages.get("cut", [])
    recovered = {row["step"]: row for row in stages.get("recovered", [])}
    pairs = itertools.pairwise(records)
    return {
        "run": run,
        "recipe": run.get("recipe", {}),
        "granularity": run.get("recipe", {}).get("prune", {}).get("granularity"),
        "data": _last(stages, "data"),
        "model": model,
        "when": datetime.fromtimestamp(records[0].time, UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "seconds": sum(after.time - before.time for before, after in pairs if after.stage != "resume"),
        "finished": bool(measure),
        "warnings": measure.get("warnings", []),
        "rows": rows,
        "after": after(measure.get("measurements", {})),
        "cards": [row for row in rows if any(row["key"].startswith(name) for name in CARDS)],
        "groups": _groups(model, cuts[: stopped.get("back_to")]),
        "frozen": [group for group in model.get("groups", []) if group["frozen"]],
        "layers": _layers(measure.get("layers", {})),
        "cuts": [{**cut, "recovered": recovered.get(cut["step"])} for cut in cuts],
        "dense": _last(stages, "dense"),
        "folded": _last(stages, "folded"),
        "gates": _last(stages, "gates"),
        "choices": choices(_last(stages, "choices"), _last(stages, "data").get("classes", ())),
        "dials": _dials(stages.get("gated", []), measure),
        "at_run_time": {row["name"]: row for row in measure.get("measurements", {}).get("gated", [])},
        "proof": [row for cut in cuts for row in cut["proof"]],
        "charts": charts(stages),
        "metric": of_task(model),
        "pictures": stages.get("picture", []),
        "code": _code(_last(stages, "code")),
    }


def _dials(gated: Sequence[Data], measure: Data) -> list[Data]:
    """Return one row per density or budget of a gated model: label, macs, figures of validation and test or None."""
    tests = {row["density"]: row for row in measure.get("densities", [])}
    rows: list[Data] = [
        {"label": f"{row['density']:g}", "macs": row["macs"], "validation": row, "test": tests.get(row["density"])}
        if "density" in row
        else {"label": "as trained", "macs": row["macs"], "validation": row, "test": None}
        for row in gated
    ]
    budgets = measure.get("budgets", [])
    return rows + [{"label": f"{r['budget']:g}", "macs": r["macs"], "validation": None, "test": r} for r in budgets]


def _last(stages: Mapping[str, list[Data]], name: str) -> Data:
    return stages[name][-1] if name in stages else {}


def after(measurements: Mapping[str, Any]) -> str:
    """Return what a run made of the dense model: the gated one where there is one, else the pruned one."""
    return "gated" if "gated" in measurements else "pruned"


def comparison(measurements: Mapping[str, Sequence[Data]]) -> list[dict[str, Any]]:
    """Return one row per quantity: the value before and after, spread, change, how it was measured."""
    dense = {m["name"]: m for m in measurements.get("dense", ())}
    rows = []
    for small in measurements.get("gated", measurements.get("pruned", ())):
        big, unit = dense.get(small["name"]), small["unit"]
        rows.append(
            {
                "key": small["name"],
                "name": NAMES.get(small["name"], small["name"]),
                "dense": number(big["value"], unit) if big else "",
                "dense_bare": number(big["value"], unit).removesuffix(f" {UNITS.get(unit, unit)}") if big else "",
                "pruned": number(small["value"], unit),
                "spread": number(small["spread"], unit) if small["spread"] else "",
                "dense_spread": number(big["spread"], unit) if big and big["spread"] else "",
                "change": change(big["value"], small["value"], unit) if big else "",
                "good": _good(small["name"], big["value"], small["value"], unit) if big else small["value"] > 1,
                "n": small["n"],
                "how": small["how"],
                "device": small["device"],
            }
        )
    return rows


def number(value: float, unit: str) -> str:
    """Return a value for the reader: percent for fractions, thousands separated, four digits for the rest.

    >>> number(0.9184, "fraction"), number(63122, "params"), number(0.05123, "ms")
    ('91.84 %', '63,122', '0.0512 ms')
    """
    if unit == "fraction":
        return f"{value * 100:.2f} %"
    if unit in ("params", "macs"):
        return f"{value:,.0f}"
    if unit == "bytes":
        return f"{value / 1000:,.1f} kB"
    if unit == "nats":
        return f"{value:.2f} nats" if abs(value) >= 10 else f"{value:.3g} nats"
    return f"{value:.3g} {UNITS.get(unit, unit)}".strip()


def change(before: float, after: float, unit: str) -> str:
    """Return points for fractions, percent for everything else.

    >>> change(0.9, 0.89, "fraction"), change(100, 38, "params")
    ('-1.00 points', '-62.0 %')
    """
    if unit == "fraction":
        return f"{(after - before) * 100:+.2f} points"
    digits = 2 if unit == "nats" else 1
    return f"{(after - before) / abs(before) * 100:+.{digits}f} %" if before else ""


def _good(name: str, before: float, after: float, unit: str) -> bool:
    return after >= before if unit == "fraction" or name.endswith(" elbo") else after < before


def _code(data: Data) -> dict[str, Any]:
    """Return the KL of each unit of an autoencoder's code before and after, the most active first."""
    if not data:
        return {}
    least, found = data["inactive"], {name: [k for k in kl if k is not None] for name, kl in data["kl"].items()}
    both = zip(data["kl"]["dense"], data["kl"]["pruned"], strict=True)
    rows = [{"unit": unit, "dense": dense, "pruned": pruned} for unit, (dense, pruned) in enumerate(both)]
    most = max([*found["dense"], *found["pruned"], least])
    return {
        "rows": sorted(rows, key=lambda row: -row["dense"]),
        "most": most,
        "least": least,
        "n": data["n"],
        "inactive": {name: sum(k < least for k in kl) for name, kl in found.items()},
        "units": {name: len(kl) for name, kl in found.items()},
    }


def _groups(model: Data, cuts: Sequence[Data]) -> list[dict[str, Any]]:
    """Return each prunable group with its units, those that stay, and the percentage that went."""
    kept = {row["name"]: row["kept"] for row in (cuts[-1]["groups"] if cuts else ())}
    return [
        {
            "name": group["name"],
            "kind": group["kind"],
            "units": group["units"],
            "kept": kept.get(group["name"], group["units"]),
            "share": kept.get(group["name"], group["units"]) / group["units"],
        }
        for group in model.get("groups", [])
        if not group["frozen"] and group["units"] > 1
    ]


def _layers(layers: Mapping[str, Sequence[Data]]) -> list[dict[str, Any]]:
    """Return each layer with its parameters before and after, and the percentage that went."""
    after = {row["name"]: row for row in layers.get("pruned", ())}
    rows = []
    for row in layers.get("dense", ()):
        small = after.get(row["name"], {"params": 0, "output": ()})
        share = small["params"] / max(row["params"], 1)
        rows.append({**row, "after": small["params"], "output_after": small["output"], "share": share})
    return rows


def charts(stages: Mapping[str, list[Data]]) -> list[tuple[str, str]]:
    """Return (title, SVG) of the curves of the task over all epochs, with a mark at each cut."""
    curves = of_task(_last(stages, "model")).curves
    epochs = stages.get("epoch", [])
    number_of = {id(row): index + 1 for index, row in enumerate(epochs)}
    marks: list[Mark] = []
    drops: dict[str, list[tuple[float, float]]] = {curve.figure: [] for curve in curves}
    for cut in stages.get("cut", []):
        at = sum(row["step"] < cut["step"] for row in epochs) + 0.5
        marks.append(Mark(at, f"cut {cut['step']}" if cut["step"] == 1 else str(cut["step"])))
        for key, points in drops.items():
            points.append((at, cut["after"][key]))
    figures = []
    for curve in curves:
        lines = [
            Line(part, part, [(number_of[id(row)], row[f"{part}_{curve.epoch}"]) for row in epochs])
            for part in ("train", "validation")
        ]
        if drops[curve.figure] and curve.percent:  # in the loss chart they would flatten everything else
            lines.append(Line("validation right after a cut", "after", drops[curve.figure]))
        figures.append((curve.title, chart(f"{curve.title} over epochs", lines, marks, curve.percent)))
    return figures
