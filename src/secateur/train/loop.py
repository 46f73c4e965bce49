"""The training loop: batches from memory, seeded by position, stoppable and resumable anywhere.

Every random draw of a step (the order of the images, augmentation, dropout) is a function of (seed, epoch,
step) alone, so that a run continued from a saved cursor is bit for bit the run that was never interrupted.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from secateur.data.dataset import Dataset
from secateur.measure.accuracy import evaluate, logits
from secateur.train.rates import Rate, constant
from secateur.types import SecateurError

CHECK_EVERY = 50  # steps between looks at the loss; each look waits for the device

Parameters = Iterable[nn.Parameter]
MakeOptimizer = Callable[[Parameters], torch.optim.Optimizer]


class TrainError(SecateurError):
    """Training that went wrong: a loss that is not a number."""


@dataclass(frozen=True)
class Settings:
    """How to train: ``optimizer`` makes the optimiser over the parameters and sets the base rate."""

    epochs: int
    batch_size: int
    optimizer: MakeOptimizer
    rate: Rate = constant
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    augment: Callable[[torch.Tensor], torch.Tensor] | None = None
    seed: int = 0


@dataclass(frozen=True)
class Cursor:
    """How far training is: the next step of the current epoch, and the sums over the steps before it."""

    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    hits: int = 0
    seen: int = 0


@dataclass(frozen=True)
class Epoch:
    """The figures of one finished epoch; training figures are means over the epoch, in train mode."""

    epoch: int
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    rate: float
    seconds: float


@dataclass(frozen=True)
class Watch:
    """What the loop calls: ``save`` after each epoch and when ``due``, ``epoch`` with the figures."""

    save: Callable[[Cursor, torch.optim.Optimizer], None] = lambda cursor, optimizer: None
    epoch: Callable[[Epoch], None] = lambda figures: None
    progress: Callable[[int, int], None] = lambda done, total: None
    due: Callable[[], bool] = lambda: False


def fit(
    model: nn.Module,
    data: Dataset,
    settings: Settings,
    *,
    begin: Cursor | None = None,
    optimizer_state: dict[str, Any] | None = None,
    watch: Watch | None = None,
) -> None:
    """Train ``model`` in place from ``begin`` to the last epoch.

    ``data`` is on the model's device.  After each epoch the validation set is evaluated, then ``watch.epoch``
    and ``watch.save`` are called.  A last batch of one image is left out (batch norm can't take it).

    Raises ``TrainError`` when the loss is not finite.
    """
    watch, cursor = watch or Watch(), begin or Cursor()
    optimizer = settings.optimizer(p for p in model.parameters() if p.requires_grad)
    if optimizer_state is not None:
        optimizer.load_state_dict(optimizer_state)
    devices = [data.source.images.device] if data.source.images.is_cuda else []
    with torch.random.fork_rng(devices):
        while cursor.epoch < settings.epochs:
            started = time.perf_counter()
            cursor = _train_epoch(model, data, settings, optimizer, cursor, watch)
            quality = evaluate(model, data.batches("validation", max(256, settings.batch_size)))
            figures = Epoch(
                cursor.epoch,
                cursor.loss / cursor.seen,
                cursor.hits / cursor.seen,
                quality.loss,
                quality.top1,
                optimizer.param_groups[0]["lr"],
                time.perf_counter() - started,
            )
            watch.epoch(figures)
            cursor = Cursor(cursor.epoch + 1)
            watch.save(cursor, optimizer)


def _train_epoch(
    model: nn.Module,
    data: Dataset,
    settings: Settings,
    optimizer: torch.optim.Optimizer,
    cursor: Cursor,
    watch: Watch,
) -> Cursor:
    """Run the steps of one epoch from ``cursor`` on; return the cursor at its end."""
    batches = shuffled(data.train, settings.batch_size, draw(settings.seed, cursor.epoch))
    base = [group.setdefault("base_lr", group["lr"]) for group in optimizer.param_groups]
    device = data.source.images.device
    loss_sum = torch.tensor(cursor.loss, dtype=torch.float64, device=device)
    hits = torch.tensor(cursor.hits, device=device)
    model.train()
    for step in range(cursor.step, len(batches)):
        torch.manual_seed(draw(settings.seed, cursor.epoch, step))
        factor = settings.rate((cursor.epoch + step / len(batches)) / settings.epochs)
        for group, rate in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = rate * factor
        inputs, labels = data.batch(batches[step])
        loss, right = _step(model, settings, optimizer, inputs, labels)
        loss_sum += loss * len(labels)
        hits += right
        cursor = replace(cursor, step=step + 1, seen=cursor.seen + len(labels))
        if cursor.step % CHECK_EVERY == 0 or cursor.step == len(batches):
            cursor = _looked(cursor, loss_sum, hits)
            watch.progress(cursor.epoch * len(batches) + cursor.step, settings.epochs * len(batches))
            if cursor.step < len(batches) and watch.due():
                watch.save(cursor, optimizer)
    return cursor


def _step(
    model: nn.Module,
    settings: Settings,
    optimizer: torch.optim.Optimizer,
    inputs: torch.Tensor,
    labels: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take one optimiser step; return the mean loss and the number of right answers."""
    if settings.augment is not None:
        inputs = settings.augment(inputs)
    scores = logits(model(inputs))
    loss = F.cross_entropy(scores, labels, label_smoothing=settings.label_smoothing)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if settings.clip_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
    optimizer.step()
    return loss.detach(), (scores.detach().argmax(1) == labels).sum()


def _looked(cursor: Cursor, loss_sum: torch.Tensor, hits: torch.Tensor) -> Cursor:
    """Read the sums from the device; raises ``TrainError`` when the loss is not finite."""
    total = float(loss_sum)
    if not math.isfinite(total):
        raise TrainError(
            f"the training loss is {total} in epoch {cursor.epoch + 1}, within {CHECK_EVERY} steps of step "
            f"{cursor.step}; lower the learning rate, set clip_norm, or check the data."
        )
    return replace(cursor, loss=total, hits=int(hits))


def draw(*position: int) -> int:
    """Return a 63-bit seed for a position such as (seed, epoch, step): equal positions, equal seeds.

    >>> draw(0, 1) == draw(0, 1) != draw(1, 0)
    True
    """
    digest = hashlib.sha256(",".join(map(str, position)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def shuffled(indices: torch.Tensor, size: int, seed: int) -> list[torch.Tensor]:
    """Return ``indices`` in the order of ``seed``, in batches of ``size``, without a last batch of one."""
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed))
    batches = list(indices[order].split(size))
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) == 1 else batches
