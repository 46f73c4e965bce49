"""Classification: cross-entropy, and how often the right class is the best or among the best five."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from secateur.measure.quality import Batch, Figures
from secateur.types import MeasureError, Measurement


@dataclass(frozen=True)
class Accuracy:
    """Mean cross-entropy (nats) with the standard deviation over samples, and hits among the best 1 and 5.

    ``top5`` is None where there are at most 5 classes: it would always be 1.
    """

    loss: float
    loss_spread: float
    top1: float
    top5: float | None
    n: int

    def figures(self) -> Figures:
        """Return loss and accuracies for a record."""
        return {"loss": self.loss, "top1": self.top1, "top5": self.top5, "n": self.n}

    def curve(self) -> Figures:
        """Return the figures of an epoch."""
        return {"loss": self.loss, "accuracy": self.top1, "top5": self.top5}

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


@dataclass(frozen=True)
class Classification:
    """Classes of images; the loss is the cross-entropy in nats, mean over the images."""

    name: str = "classification"
    parts: tuple[str, ...] = ("accuracy", "top5")
    columns: int = 6

    def learn(
        self, output: Any, inputs: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor, smoothing: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean loss against ``targets``, and how many ``labels`` are among the best 1 and 5 scores."""
        scores = logits(output).float()
        right = scores.detach().topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
        loss = F.cross_entropy(scores, targets, label_smoothing=smoothing)
        return loss, torch.stack([right[:, 0].sum(), right.sum()])

    def row(self, model: nn.Module, batch: Batch, number: int) -> torch.Tensor:
        """Return sums of loss, its square, hits among 1 and 5; the number of images; the number of classes."""
        inputs, labels = batch
        scores = logits(model(inputs))
        losses = F.cross_entropy(scores.float(), labels, reduction="none").double()
        best = scores.topk(min(5, scores.shape[1]), dim=1).indices
        hits = best == labels[:, None]
        sums = [losses.sum(), losses.square().sum(), hits[:, 0].sum(), hits.sum()]
        return torch.stack([*sums, *losses.new_tensor([len(labels), scores.shape[1]])])

    def quality(self, rows: Sequence[torch.Tensor]) -> Accuracy:
        """Return the accuracy from the rows of all batches."""
        loss, squares, top1, top5, n, classes = sum(rows[1:], rows[0]).tolist()
        n, classes = round(n), round(classes / len(rows))
        loss, squares, top1, top5 = (value / n for value in (loss, squares, top1, top5))
        return Accuracy(loss, math.sqrt(max(0.0, squares - loss * loss)), top1, top5 if classes > 5 else None, n)

    def scoring(self, half: torch.dtype | None = None) -> Callable[[nn.Module, Any], torch.Tensor]:
        """Return the mean cross-entropy of a batch."""

        def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
            inputs, labels = batch
            with torch.autocast(inputs.device.type, half, enabled=half is not None):
                found = logits(model(inputs))
            return F.cross_entropy(found.float(), labels)

        return loss

    def drop(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
        """Return the accuracy that was lost."""
        return before["top1"] - after["top1"]

    def told(self, *figures: Mapping[str, Any]) -> str:
        """Return the accuracies in words.

        >>> Classification().told({"top1": 0.9}, {"top1": 0.75})
        'accuracy 90.00% -> 75.00%'
        """
        return "accuracy " + " -> ".join(f"{row['top1']:.2%}" for row in figures)

    def misfit(self, output: Any, inputs: torch.Tensor, classes: int) -> str | None:
        """Return what is wrong with the number of scores."""
        found = logits(output).shape[1]
        return None if found == classes else f"it returns {found} scores per image, the dataset has {classes} classes"


CLASSIFICATION = Classification()


def logits(output: object) -> torch.Tensor:
    """Return the class scores (n, classes) in a model's output: the tensor itself or its ``logits``."""
    scores = getattr(output, "logits", output)
    if not isinstance(scores, torch.Tensor) or scores.ndim != 2:
        found = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise MeasureError(f"the model must return class scores of shape (n, classes); it returned {found}.")
    return scores
