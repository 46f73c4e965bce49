"""The course of a run over its epochs, from its records: accuracies (or ELBOs), events, widths, seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur.report.metrics import of_task
from secateur.types import Record

Path = tuple[tuple[float, float], ...]  # (x, y): an epoch is 1, 2, ..., an event lies between two of them


@dataclass(frozen=True)
class Course:
    """One run over its epochs 1, 2, ... of all phases.

    ``validation`` also holds, between two epochs, the accuracy right after a cut, before any training.  ``events`` are
    the places of the cuts, k + 0.5 after k epochs.  ``widths`` maps each group to its units in each epoch, and at the
    end.  ``seconds`` leaves out epochs that were interrupted.
    """

    epochs: int = 0
    train: Path = ()
    validation: Path = ()
    seconds: Path = ()
    events: tuple[float, ...] = ()
    widths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


NEVER = Course()  # not one epoch


def course(records: Sequence[Record], anew: bool = False) -> Course:
    """Return the course of the run behind ``records``.

    ``anew``: the weights were drawn again after the last cut, so that the run begins there.
    """
    model = next((r.data for r in records if r.stage == "model"), {})
    groups, metric = model.get("groups", ()), of_task(model)
    key = metric.over[1]
    now = {g["name"]: int(g["units"]) for g in groups if not g.get("frozen") and g["units"] > 1}
    train: list[tuple[float, float]] = []
    validation: list[tuple[float, float]] = []
    seconds: list[tuple[float, float]] = []
    events: list[float] = []
    widths: dict[str, list[int]] = {name: [] for name in now}
    done, torn = 0, False
    last = max((place for place, r in enumerate(records) if r.stage == "cut"), default=-1)
    for place, record in enumerate(records):
        data = record.data
        torn = torn or record.stage == "resume"
        if record.stage == "cut":
            now |= {row["name"]: int(row["kept"]) for row in data.get("groups", ()) if row["name"] in now}
        if anew and place <= last:
            torn = False
        elif record.stage == "cut":
            events.append(done + 0.5)
            _put(validation, done + 0.5, metric.told(data.get("after", {}), metric.figure))
        elif record.stage == "epoch":
            done += 1
            _put(train, done, metric.told(data, f"train_{key}"))
            _put(validation, done, metric.told(data, f"validation_{key}"))
            _put(seconds, done, None if torn else data.get("seconds"))
            torn = False
            for name, units in now.items():
                widths[name].append(units)
    held = {name: (*found, now[name]) for name, found in widths.items()}
    return Course(done, tuple(train), tuple(validation), tuple(seconds), tuple(events), held)


def _put(points: list[tuple[float, float]], x: float, y: Any) -> None:
    """Add a point where there is a number."""
    if isinstance(y, int | float):
        points.append((float(x), float(y)))
