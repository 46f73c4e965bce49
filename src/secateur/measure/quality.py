"""What a task is: what a model is trained for, what is counted about it, and how good it is on images set aside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from secateur.types import Measurement

Figures = dict[str, float | None]
Batch = tuple[torch.Tensor, torch.Tensor]  # inputs, labels


class Quality(Protocol):
    """The mean loss (nats per image) over ``n`` images, and what else the task knows of them."""

    @property
    def loss(self) -> float:
        """Mean loss, lower is better."""
        ...

    @property
    def n(self) -> int:
        """Number of images."""
        ...

    def figures(self) -> Figures:
        """Return the figures of a record."""
        ...

    def curve(self) -> Figures:
        """Return the figures of an epoch: the loss, and one for each of the task's ``parts``."""
        ...

    def measurements(self, device: str, part: str) -> tuple[Measurement, ...]:
        """Return what was measured on a part of the data, with standard errors."""
        ...


class Task(Protocol):
    """What the training loop, the stages and the criteria ask, and nothing else about a task is asked anywhere."""

    @property
    def name(self) -> str:
        """One word for the records."""
        ...

    @property
    def parts(self) -> tuple[str, ...]:
        """What is added up over the images of an epoch, beside the loss."""
        ...

    @property
    def columns(self) -> int:
        """Length of a row."""
        ...

    def learn(
        self, output: Any, inputs: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor, smoothing: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean loss of a training step, and the sums of the ``parts`` (k,), detached."""
        ...

    def row(self, model: nn.Module, batch: Batch, number: int) -> torch.Tensor:
        """Return the sums (columns,) of batch ``number``, in float64; they add up over batches."""
        ...

    def quality(self, rows: Sequence[torch.Tensor]) -> Quality:
        """Return the quality from the rows of all batches."""
        ...

    def scoring(self, half: torch.dtype | None = None) -> Callable[[nn.Module, Any], torch.Tensor]:
        """Return the loss that criteria read, with products in ``half`` where it is given."""
        ...

    def drop(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
        """Return how much worse ``after`` is than ``before``, as a fraction; both are figures of records."""
        ...

    def told(self, *figures: Mapping[str, Any]) -> str:
        """Return the figures of records in words, one after another."""
        ...

    def misfit(self, output: Any, inputs: torch.Tensor, classes: int) -> str | None:
        """Return what is wrong with the output of an untrained model on ``inputs``, None where it fits."""
        ...
