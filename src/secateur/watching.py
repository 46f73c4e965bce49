"""How a run follows a training: records, lines on the screen, saved states."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import nn

from secateur import recovery
from secateur.session import Run
from secateur.train.loop import Epoch, Point, Watch

Out = tuple[nn.Module, Point]  # what a stage returns: the model, and what the next stage begins with
SAVE_EVERY = 60.0  # seconds between saved states within an epoch


def watched(
    run: Run, model: nn.Module, step: int, label: str, length: str, before_saving: Callable[[], None] = lambda: None
) -> Watch:
    """Return what records, shows and saves a training of ``model`` in phase ``step``."""
    saved = time.monotonic()

    def epoch(row: Epoch) -> None:
        run.log.append("epoch", step=step, **row.record())
        run.screen.line(
            f"{label}, epoch {row.epoch + 1}/{length}: loss {row.train['loss']:.4f}, "
            f"validation loss {row.quality.loss:.4f}, {run.task.told(row.quality.figures())}"
        )

    def keep(point: Point) -> None:
        nonlocal saved
        if step == 0:
            recovery.mark(run, model, point)
        before_saving()
        run.save_state(run.stage, model, point)
        saved = time.monotonic()

    return Watch(
        keep,
        epoch,
        lambda done, total: run.screen.progress(label, done, total),
        lambda: time.monotonic() - saved > SAVE_EVERY,
    )
