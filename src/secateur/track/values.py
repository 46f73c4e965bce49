"""What a tracking store shows of a run: its parameters, and its metrics with their steps, both from its records."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.report.arms import flat
from secateur.types import Record

EPOCH = (
    *(f"{part}_{name}" for part in ("train", "validation") for name in ("loss", "accuracy", "reconstruction", "kl")),
    "rate",
)
FIGURES = ("loss", "top1", "top5", "reconstruction", "kl")  # of the model, as its task has them
LONGEST = {"name": 200, "value": 500}  # characters, within the limits of the oldest stores
APART = "track."  # says where to, not what


@dataclass(frozen=True)
class Metric:
    """One value of a metric: at ``step`` (epochs or cuts so far), taken at ``time`` (seconds since 1970)."""

    name: str
    value: float
    step: int
    time: float


def params(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Return every value of a recipe under its dotted key, written so that a store takes it.

    >>> params({"seed": 1, "prune": {"keep": {"conv1": 0.5}}, "track": {"mlflow": "env"}})
    {'seed': '1', 'prune.keep.conv1': '0.5'}
    """
    rows = {key: value for key, value in flat(recipe).items() if not key.startswith(APART)}
    return {_name(key): str(value)[: LONGEST["value"]] for key, value in rows.items()}


def _name(key: str) -> str:
    """Return ``key`` with letters that stores refuse replaced; a digest keeps apart what looks alike then.

    >>> _name("train.lr"), _name("prune.keep.layer1.*")
    ('train.lr', 'prune.keep.layer1._-b32428')
    """
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "_", key)[: LONGEST["name"]]
    return safe if safe == key else f"{safe}-{hashlib.sha256(key.encode()).hexdigest()[:6]}"


def metrics(records: Sequence[Record]) -> list[Metric]:
    """Return the metrics of a run: per epoch, per cut, and the measurements at the end with their spreads.

    The step of an epoch counts the epochs of all phases; that of a cut is its number.
    """
    rows: list[tuple[str, Any, int, float]] = []
    epochs = 0
    for record in records:
        data, time = record.data, record.time
        if record.stage == "epoch":
            epochs += 1
            rows += [(name, data[name], epochs, time) for name in EPOCH if name in data]
        elif record.stage == "cut":
            step = int(data["step"])
            rows += [(f"keep/{name}", value, step, time) for name, value in data["achieved"].items()]
            for moment in ("before", "after"):
                rows += [(f"cut/{moment}_{name}", data[moment].get(name), step, time) for name in FIGURES]
        elif record.stage == "recovered":
            rows += [(f"cut/recovered_{name}", data.get(name), int(data["step"]), time) for name in FIGURES]
        elif record.stage == "measure":
            for model, found in data["measurements"].items():
                for row in found:
                    name = f"{model}/{re.sub(r'[^A-Za-z0-9_.-]+', '_', row['name'])}"
                    rows += [(name, row["value"], 0, time), (f"{name}.spread", row["spread"], 0, time)]
    return [Metric(name, float(value), step, time) for name, value, step, time in rows if value is not None]
