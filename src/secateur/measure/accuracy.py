"""Accuracy and loss of a model on labelled batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from secateur.graph.state import eval_mode
from secateur.types import MeasureError, Measurement


@dataclass(frozen=True)
class Quality:
    """Mean cross-entropy (nats) with the standard deviation over samples, and hits among the best 1 and 5.

    ``top5`` is None where there are at most 5 classes: it would always be 1.
    """

    loss: float
    loss_spread: float
    top1: float
    top5: float | None
    n: int

    def measurements(self, device: str, part: str) -> tuple[Measurement, ...]:
        """Return loss, top-1 and (over more than 5 classes) top-5 with their standard errors over the ``n`` samples."""
        how = f"all {self.n} images of the {part} set, eval mode; spread is the standard error"
        rows = [("loss", self.loss, "nats", self.loss_spread / math.sqrt(self.n))]
        rows += [
            (name, value, "fraction", math.sqrt(value * (1 - value) / self.n))
            for name, value in (("top1", self.top1), ("top5", self.top5))
            if value is not None
        ]
        return tuple(Measurement(f"{part} {a}", b, c, self.n, d, device, how) for a, b, c, d in rows)


Rows = list[torch.Tensor]


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    gather: Callable[[Rows], Rows] = lambda rows: rows,
) -> Quality:
    """Return the quality of ``model`` over ``batches`` of (inputs, integer labels).

    The model runs in eval mode without gradients; its mode, weights, buffers and the random state stay.
    ``gather`` turns the rows of sums of these batches, one each, into those of all batches where other processes
    have the rest.  Raises ``MeasureError`` when there are no batches.
    """
    rows: Rows = []
    with eval_mode(model), torch.no_grad():
        for inputs, labels in batches:
            scores = logits(model(inputs))
            losses = F.cross_entropy(scores.float(), labels, reduction="none").double()
            best = scores.topk(min(5, scores.shape[1]), dim=1).indices
            hits = best == labels[:, None]
            sums = [losses.sum(), losses.square().sum(), hits[:, 0].sum(), hits.sum()]
            rows.append(torch.stack([*sums, *losses.new_tensor([len(labels), scores.shape[1]])]))
    if not (rows := gather(rows)):
        raise MeasureError("accuracy needs at least one batch of (inputs, labels); got none.")
    loss, squares, top1, top5, n, classes = sum(rows[1:], rows[0]).tolist()
    n, classes = round(n), round(classes / len(rows))
    loss, squares, top1, top5 = (value / n for value in (loss, squares, top1, top5))
    return Quality(loss, math.sqrt(max(0.0, squares - loss * loss)), top1, top5 if classes > 5 else None, n)


def logits(output: object) -> torch.Tensor:
    """Return the class scores (n, classes) in a model's output: the tensor itself or its ``logits``."""
    scores = getattr(output, "logits", output)
    if not isinstance(scores, torch.Tensor) or scores.ndim != 2:
        found = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise MeasureError(f"the model must return class scores of shape (n, classes); it returned {found}.")
    return scores
