"""What a report shows of a task: the figure that runs are judged by, and the curves over the epochs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Curve:
    """One chart over the epochs: its title, the name in the records of epochs and in those of cuts, its unit."""

    title: str
    epoch: str
    figure: str
    percent: bool = False


@dataclass(frozen=True)
class Metric:
    """How the quality of a model is told: measured as ``measured`` (higher is better) in ``unit``.

    ``figure`` is its key in the records of cuts, ``words`` what it is called there.
    """

    measured: str
    unit: str
    figure: str
    words: str
    curves: tuple[Curve, ...]
    over: tuple[str, str]  # its name, and its key in the records of epochs
    sign: int = 1  # of the measured value, of what the records of epochs and cuts hold

    def told(self, figures: Mapping[str, Any], key: str) -> float | None:
        """Return the value under ``key`` of a record, higher being better."""
        value = figures.get(key)
        return None if value is None else self.sign * value

    def text(self, figures: Mapping[str, Any]) -> str:
        """Return the figure of a record of a cut for the reader.

        >>> ACCURACY.text({"top1": 0.9}), ELBO.text({"loss": 240.123})
        ('90.00 %', '240.12')
        """
        value = figures[self.figure]
        return f"{value * 100:.2f} %" if self.unit == "fraction" else f"{value:.2f}"


ACCURACY = Metric(
    "top1",
    "fraction",
    "top1",
    "accuracy",
    (
        Curve("Loss", "loss", "loss"),
        Curve("Accuracy", "accuracy", "top1", True),
    ),
    ("accuracy", "accuracy"),
)
ELBO = Metric(
    "elbo",
    "nats",
    "loss",
    "-ELBO [nats]",
    (
        Curve("Loss (-ELBO, nats per image)", "loss", "loss"),
        Curve("Reconstruction (nats per image)", "reconstruction", "reconstruction"),
        Curve("KL of the code (nats per image)", "kl", "kl"),
    ),
    ("ELBO", "loss"),
    -1,
)
TASKS = {"classification": ACCURACY, "reconstruction": ELBO}


def of_task(model: Mapping[str, Any]) -> Metric:
    """Return the metric of a run from its record of the model; runs of before there were tasks classify."""
    return TASKS[model.get("task", "classification")]


def named(measured: str) -> Metric:
    """Return the metric of a measurement such as "test elbo"."""
    return next(metric for metric in TASKS.values() if measured.endswith(f" {metric.measured}"))


def of_measured(names: Collection[str], part: str) -> Metric:
    """Return the metric that measurements called ``names`` are judged by."""
    return next((metric for metric in TASKS.values() if f"{part} {metric.measured}" in names), ACCURACY)
