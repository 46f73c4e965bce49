"""The training loop: batches from memory, seeded by position, stoppable and resumable anywhere.

Every random draw of a step (the order of the images, augmentation, dropout) is a function of (seed, epoch,
step) alone, so that a run continued from a saved cursor is bit for bit the run that was never interrupted.
Several processes divide each batch, and train what one would: see ``fit``.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from secateur.criteria.riding import Riding, Sums
from secateur.criteria.streaming import Streaming
from secateur.data.dataset import Dataset
from secateur.data.share import held, holding
from secateur.measure.quality import Figures, Quality
from secateur.measure.task import task_of
from secateur.train.average import Average, tensors_of
from secateur.train.devices import ALONE, Team
from secateur.train.devices import quality as quality_of
from secateur.train.global_norm import norms_joined
from secateur.train.layout import gradients_alike, laid_out, like_weights
from secateur.train.mixup import mixup
from secateur.train.rates import Rate, constant
from secateur.types import SecateurError

CHECK_EVERY = 50  # steps between looks at the loss; each look waits for the device

Guide = Callable[[torch.Tensor], Callable[[Any, torch.Tensor], torch.Tensor]]
Parameters = Iterable[nn.Parameter]
MakeOptimizer = Callable[[Parameters], torch.optim.Optimizer]


class TrainError(SecateurError):
    """Training that went wrong: a loss that is not a number."""


@dataclass(frozen=True)
class Settings:
    """How to train: ``optimizer`` makes the optimiser over the parameters and sets the base rate.

    ``mixup`` is the alpha of ``mixup.mixup``, ``ema`` the decay of ``average.Average``; 0 and None are off.
    ``autocast`` is the type of the matrix products and convolutions (None: that of the weights, which stay float32
    in any case, as do loss and validation); ``channels_last`` lays images and 4-D weights out that way meanwhile
    (None: where ``layout.laid_out`` says so); ``compiled`` runs the training passes through ``torch.compile``.
    ``guide`` gets the inputs of a step and returns (output of the model, loss) -> loss.  ``steps``: so
    many optimiser steps instead of ``epochs``.  ``riding`` collects evidence in as many last steps as an epoch has.
    """

    epochs: int
    batch_size: int
    optimizer: MakeOptimizer
    rate: Rate = constant
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    augment: Callable[[torch.Tensor], torch.Tensor] | None = None
    seed: int = 0
    mixup: float = 0.0
    ema: float | None = None
    autocast: torch.dtype | None = None
    channels_last: bool | None = False
    compiled: bool = False
    guide: Guide | None = None
    steps: int | None = None
    riding: Riding | Streaming | None = None


@dataclass(frozen=True)
class Cursor:
    """How far training is: the next step of the current epoch, and the sums over the steps before it.

    ``parts`` are the sums of what the task adds up beside the loss; empty before the first step.
    """

    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    seen: int = 0
    parts: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class Point:
    """Where training is and all it needs to go on but the model.

    Cursor, optimiser state, averaged tensors, and the sums of the evidence that rides on the steps.
    """

    cursor: Cursor = Cursor()
    optimizer: dict[str, Any] | None = None
    average: Mapping[str, torch.Tensor] | None = None
    evidence: Mapping[str, torch.Tensor] | None = None


@dataclass(frozen=True)
class Epoch:
    """The figures of one finished epoch; those of training, ``train``, are means over the epoch, in train mode.

    With mixup a training image counts as right when the answer is that of its larger part; top-5 figures are None
    where there are at most 5 classes.
    """

    epoch: int
    train: Figures
    quality: Quality
    rate: float
    seconds: float

    def record(self) -> dict[str, float | None]:
        """Return the epoch as one row: train_loss, train_accuracy, ..., validation_loss, ..."""
        parts = {"train": self.train, "validation": self.quality.curve()}
        row = {f"{part}_{name}": value for part, figures in parts.items() for name, value in figures.items()}
        return {"epoch": self.epoch, **row, "rate": self.rate, "seconds": self.seconds}


@dataclass(frozen=True)
class Watch:
    """What the loop calls.

    ``save`` after each epoch and when ``due``, ``epoch`` with the figures, ``stepped`` after each optimiser step with
    the number of steps so far.
    """

    save: Callable[[Point], None] = lambda point: None
    epoch: Callable[[Epoch], None] = lambda figures: None
    progress: Callable[[int, int], None] = lambda done, total: None
    due: Callable[[], bool] = lambda: False
    stepped: Callable[[int], None] = lambda done: None


def fit(
    model: nn.Module,
    data: Dataset,
    settings: Settings,
    *,
    begin: Point | None = None,
    watch: Watch | None = None,
    team: Team = ALONE,
) -> Point:
    """Train ``model`` in place from ``begin`` to the last epoch, and return the point reached.

    ``data`` is on the model's device.  After each epoch the validation set is evaluated, then ``watch.epoch``
    and ``watch.save`` are called.  A last batch of one image is left out (batch norm can't take it).  With
    ``settings.ema`` the averaged weights are validated, and are those of the model at the end.

    All processes of ``team`` call this alike and end with the same weights.  ``settings.batch_size`` is that of the
    batch which they divide: loss, gradients, batch norms, augmentation and mixup are those of the whole batch, and of
    a last one that is smaller, so that only rounding tells the result from that of one process.  Dropout draws
    differ.  ``watch`` is called in every process.

    Raises ``TrainError`` when the loss is not finite, ``TeamError`` when another process ended.
    """
    point = begin or Point()
    work = _Work(model, data, settings, point, watch or Watch(), team)
    cursor = point.cursor
    devices = [data.source.images.device] if data.source.images.is_cuda else []
    with torch.random.fork_rng(devices), settings.riding or nullcontext(), work.laid_out():
        while cursor.epoch * work.per_epoch < work.total:
            started = time.perf_counter()
            cursor = _train_epoch(work, cursor)
            quality = work.quality()
            work.watch.epoch(_figures(work, cursor, quality, time.perf_counter() - started))
            cursor = Cursor(cursor.epoch + 1)
            work.watch.save(work.point(cursor))
    if work.average is not None:
        work.average.settle()
    if work.channels_last:  # what follows must not depend on how the model was trained
        model.to(memory_format=torch.contiguous_format)
    return work.point(cursor)


class _Work:
    """What the steps of one ``fit`` share."""

    def __init__(
        self, model: nn.Module, data: Dataset, settings: Settings, begin: Point, watch: Watch, team: Team
    ) -> None:
        self.model, self.data, self.settings, self.watch, self.team = model, data, settings, watch, team
        self.task = task_of(model)
        self.channels_last = settings.channels_last
        if self.channels_last is None:
            self.channels_last = laid_out(model, data.batch(data.train[:2])[0])
        elif self.channels_last:
            model.to(memory_format=torch.channels_last)
        # one graph per batch size: with one for all, the sizes seen first would decide about the last bits
        self.forward = torch.compile(model, dynamic=False) if settings.compiled else model
        self.optimizer = settings.optimizer(p for p in model.parameters() if p.requires_grad)
        if begin.optimizer is not None:
            self.optimizer.load_state_dict(begin.optimizer)
            like_weights(self.optimizer)
        self.per_epoch = len(shuffled(data.train, settings.batch_size, 0))
        self.total = settings.epochs * self.per_epoch if settings.steps is None else settings.steps
        self.average = None if settings.ema is None else Average(model, settings.ema, begin.average)
        if settings.riding is not None:
            settings.riding.sums = Sums.of(begin.evidence) if begin.evidence else Sums()

    def point(self, cursor: Cursor) -> Point:
        """Return the present point."""
        riding, average = self.settings.riding, self.average
        return Point(
            cursor,
            self.optimizer.state_dict(),
            None if average is None else average.tensors,
            None if riding is None else riding.sums.tensors(),
        )

    def laid_out(self) -> AbstractContextManager[None]:
        """Return what holds the gradients in the order of the values while the steps run."""
        inputs = self.data.batch(self.data.train[:2])[0]
        return gradients_alike(self.model, inputs) if self.channels_last else nullcontext()

    def quality(self) -> Quality:
        """Return the figures of the validation set, with the averaged weights where there are any."""
        # a buffer of the model's own may follow the rows of one process
        self.team.copy_(tensors_of(self.model))
        self.team.copy_({} if self.average is None else self.average.tensors)
        with nullcontext() if self.average is None else self.average.shown():
            return quality_of(self.model, self.data, "validation", max(256, self.settings.batch_size), self.team)


def _figures(work: _Work, cursor: Cursor, quality: Quality, seconds: float) -> Epoch:
    shown = quality.curve()
    sums = zip(work.task.parts, cursor.parts, strict=True)
    parts = {name: None if shown[name] is None else total / cursor.seen for name, total in sums}
    train = {"loss": cursor.loss / cursor.seen, **parts}
    return Epoch(cursor.epoch, train, quality, work.optimizer.param_groups[0]["lr"], seconds)


def _train_epoch(work: _Work, cursor: Cursor) -> Cursor:
    """Run the steps of one epoch from ``cursor`` on; return the cursor at its end."""
    data, settings, optimizer, watch, team = work.data, work.settings, work.optimizer, work.watch, work.team
    batches = shuffled(data.train, settings.batch_size, draw(settings.seed, cursor.epoch))
    before = cursor.epoch * work.per_epoch
    batches = batches[: work.total - before]  # the last epoch may be cut short
    base = [group.setdefault("base_lr", group["lr"]) for group in optimizer.param_groups]
    loss_sum, parts_sum = _sums(work, cursor)
    shares = [team.share(len(batch)) for batch in batches]
    parts = [batch[share.begin : share.end] for batch, share in zip(batches, shares, strict=True)]
    work.model.train()
    for step, (inputs, labels) in enumerate(data.stream(parts[cursor.step :]), cursor.step):
        _seed(draw(settings.seed, cursor.epoch, step), data.source.images.device)
        factor = settings.rate((before + step) / work.total)
        for group, rate in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = rate * factor
        if settings.riding is not None:
            now = before + step
            watching = now >= work.total - work.per_epoch and settings.riding.looks(now)
            settings.riding.start(len(labels) if watching else 0)
        with holding(shares[step]):
            loss, parts_of_step = _step(work, inputs, labels)
        if work.average is not None:
            work.average.update(before + step)
        watch.stepped(before + step + 1)
        if shares[step].real:
            loss_sum += loss * len(labels)
            parts_sum += parts_of_step
        cursor = replace(cursor, step=step + 1, seen=cursor.seen + shares[step].total)
        if cursor.step % CHECK_EVERY == 0 or cursor.step == len(batches):
            if settings.riding is not None:
                settings.riding.settle()
            cursor = _looked(cursor, team.sum_(loss_sum), team.sum_(parts_sum))
            loss_sum, parts_sum = _sums(work, cursor)
            watch.progress(before + cursor.step, work.total)
            if cursor.step < len(batches) and watch.due():
                watch.save(work.point(cursor))
    return cursor


def _sums(work: _Work, cursor: Cursor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums of ``cursor`` as tensors on the device; zeros but in the first process."""
    device, first = work.data.source.images.device, int(work.team.lead)
    loss = torch.tensor(cursor.loss * first, dtype=torch.float64, device=device)
    parts = cursor.parts or (0.0,) * len(work.task.parts)
    return loss, torch.tensor(parts, dtype=torch.float64, device=device) * first


def _seed(seed: int, device: torch.device) -> None:
    """Seed what a step draws from; ``torch.manual_seed`` notes a stack trace for each kind of device not in use."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _step(work: _Work, inputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Take one optimiser step; return the mean loss, and the sums of what the task adds up."""
    settings, optimizer, targets = work.settings, work.optimizer, labels
    share = held(len(labels))
    if settings.augment is not None:
        inputs = settings.augment(inputs)
    if settings.mixup > 0:
        blend = mixup(work.team.whole(inputs), work.team.whole(labels), len(work.data.classes), settings.mixup)
        inputs, targets = (whole[share.begin : share.end] for whole in blend)
    if work.team.several:  # from here on the draws, of dropout, are each process's own
        torch.manual_seed(torch.initial_seed() ^ draw(work.team.rank))
    if work.channels_last:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    cast = torch.autocast(inputs.device.type, settings.autocast, enabled=settings.autocast is not None)
    with norms_joined(work.team, share), cast:
        judge = None if settings.guide is None else settings.guide(inputs)
        output = work.forward(inputs)
    loss, parts = work.task.learn(output, inputs, labels, targets, settings.label_smoothing)
    loss = loss if judge is None else judge(output, loss)
    optimizer.zero_grad(set_to_none=True)
    (loss * share.weight if work.team.several else loss).backward()
    if settings.riding is not None:
        settings.riding.take()
    work.team.add_gradients(work.model.parameters())
    if settings.clip_norm is not None:
        nn.utils.clip_grad_norm_(work.model.parameters(), settings.clip_norm)
    optimizer.step()
    return loss.detach(), parts


def _looked(cursor: Cursor, loss_sum: torch.Tensor, parts: torch.Tensor) -> Cursor:
    """Read the sums from the device; raises ``TrainError`` when the loss is not finite."""
    total = float(loss_sum)
    if not math.isfinite(total):
        raise TrainError(
            f"the training loss is {total} in epoch {cursor.epoch + 1}, within {CHECK_EVERY} steps of step "
            f"{cursor.step}; lower the learning rate, set clip_norm, or check the data."
        )
    return replace(cursor, loss=total, parts=tuple(parts.tolist()))


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
