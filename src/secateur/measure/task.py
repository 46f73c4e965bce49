"""Which task a model is for, and how good it is at it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch

from secateur.graph.state import eval_mode
from secateur.measure.accuracy import CLASSIFICATION
from secateur.measure.elbo import RECONSTRUCTION, Autoencoder
from secateur.measure.quality import Batch, Quality, Task
from secateur.types import MeasureError

Rows = list[torch.Tensor]


def task_of(model: object) -> Task:
    """Return what ``model`` is for: reconstruction where it encodes and decodes, else classification."""
    return RECONSTRUCTION if isinstance(model, Autoencoder) else CLASSIFICATION


def evaluate(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    gather: Callable[[Rows], Rows] = lambda rows: rows,
    numbers: Iterable[int] | None = None,
) -> Any:
    """Return the quality (``Accuracy`` or ``Elbo``) of ``model`` over ``batches`` of (inputs, integer labels).

    The model runs in eval mode without gradients; its mode, weights, buffers and the random state stay.
    ``gather`` turns the rows of sums of these batches, one each, into those of all batches where other processes
    have the rest; ``numbers`` says which of all they are.  Raises ``MeasureError`` when there are no batches.
    """
    task = task_of(model)
    with eval_mode(model), torch.no_grad():
        rows = [task.row(model, batch, k) for k, batch in zip(numbers or itertools.count(), batches, strict=False)]
    if not (rows := gather(rows)):
        raise MeasureError("accuracy needs at least one batch of (inputs, labels); got none.")
    return task.quality(rows)


__all__ = ["Quality", "Rows", "Task", "evaluate", "task_of"]
