"""Cut little by little while training goes on: every so many steps a few units are masked and held at zero.

Nothing is traced, compiled or moved between two events: the model keeps its tensors, and each event costs a pass for
the scores and a choice.  Every so many events a copy is cut out, proved and saved; at the end the model itself is.
Source: Theis et al. 2018, arXiv 1801.05787, section 2.5; Crowley et al. 2018, arXiv 1810.04622, section 3.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import nn

from secateur import recovery, resolve
from secateur.checkpoint import save
from secateur.criteria.evidence import PER_SAMPLE
from secateur.cutting import allocate, proved
from secateur.folder import CHECKPOINTS, HISTORY
from secateur.history import History, longer
from secateur.mask import dead_slices, tensors_of
from secateur.measure import counts
from secateur.progressive import compose, relative, remaining
from secateur.schedules import every
from secateur.score import score
from secateur.session import Run, passport, prunable
from secateur.train.held import held
from secateur.train.loop import Settings, draw, shuffled
from secateur.train.resume import atomic_write
from secateur.types import Budget, Graph, Plan, Scores

PHASE = 2  # of the random draws: 0 is the dense training, 1 the recovery at the end


class Erosion:
    """The events of one run: which units are held at zero by now, and what is written about them."""

    def __init__(self, run: Run, model: nn.Module) -> None:
        self.run = run
        self.model = copy.deepcopy(model) if model is run.dense.model else model
        self.graph = replace(run.dense, model=self.model)
        recipe = run.recipe
        self.targets = every(recipe.budget.keep, 1, prunable(run.dense), recipe.prune.schedule.units)
        self.pace = recipe.recover.steps or 1
        self.history = _restored(run)
        self.optimizer: torch.optim.Optimizer | None = None
        self._holding = ExitStack()

    def settings(self) -> Settings:
        """Return how to train: as a recovery does, for as many steps as all events take."""
        chosen = resolve.training(self.run.recipe, PHASE, half=recovery.half(self.run))
        make = chosen.optimizer
        return replace(
            chosen, optimizer=lambda ps: self._watched(make(ps)), steps=self.pace * len(self.targets), ema=None
        )

    def stepped(self, done: int) -> None:
        """Take in that ``done`` optimiser steps were made: an event each ``pace`` steps."""
        if done % self.pace == 0:
            event = done // self.pace
            if event > 1 and (event - 1) % (self.run.recipe.prune.save_every or event) == 0:
                self.checkpoint(event - 1)
            self._event(event)

    def close(self) -> None:
        """Let go of the optimiser."""
        self._holding.close()

    def _watched(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        self.optimizer = optimizer
        self._hold()
        return optimizer

    def _hold(self) -> None:
        """Hold the units at zero that the run's plan drops by now."""
        self._holding.close()
        hold = self._holding.enter_context(held(self.model, _masks(self.graph, self.run.plan)))
        if self.optimizer is not None:
            hold(self.optimizer)

    def _event(self, event: int) -> None:
        run, done = self.run, self.run.plan
        budget = Budget(units=self.targets[event - 1])
        live = remaining(run.dense, done, self.model)
        scores = self._scores(live, event)
        plan = allocate(run.recipe, run.dense, scores, relative(run.dense, done, live, budget))
        run.plan = compose(run.dense, done, plan, budget)
        left = counts.params(run.dense, run.plan.kept(run.dense))
        self.history = longer(self.history, event, done, run.plan, scores, left)
        self._hold()

    def _scores(self, live: Graph, event: int) -> Scores:
        """Return the scores of the units that are left, on images drawn for this event."""
        run = self.run
        criterion, wanted = resolve.criterion(run.recipe, event - 1), run.recipe.prune.criterion
        if not criterion.evidence & PER_SAMPLE:
            return score(live, criterion)
        half = resolve.precision(run.recipe, recovery.half(run))
        parts = shuffled(run.data.train, wanted.batch_size, draw(run.recipe.seed, PHASE, event))
        batches = (run.data.batch(part) for part in parts)
        return score(live, criterion, batches, loss=run.task.scoring(half), samples=wanted.samples)

    def checkpoint(self, event: int) -> None:
        """Cut a copy out, prove it, and save and record it: the state with exactly ``event`` events."""
        run = self.run
        proof, small = proved(self.graph, run.plan, joint=True)
        small.to(memory_format=torch.contiguous_format)
        path = run.folder / CHECKPOINTS / f"{event}_prunes.safetensors"
        extra = {**passport(run.recipe, run.data), "prunes": len(self.history.removals)}
        if run.team.lead:
            path.parent.mkdir(exist_ok=True)
            save(small, path, plan=run.plan, proof=proof, recipe=run.recipe.hash, extra=extra)
        quality = run.quality(small)
        left = counts.params(run.dense, run.plan.kept(run.dense))
        row = {"params": left, "achieved": dict(run.plan.achieved), "file": path.name, **quality.figures()}
        run.log.append("checkpoint", step=event, prunes=len(self.history.removals), **row)
        run.screen.line(f"{event} of {len(self.targets)} cuts: {left:,} parameters, {run.task.told(quality.figures())}")

    def write_history(self) -> None:
        """Replace the history on the disk."""
        if not self.run.team.lead:
            return
        atomic_write(self.run.folder / HISTORY, self.history.to_json().encode())


def _restored(run: Run) -> History:
    """Return the history that belongs to the run's plan: what the file has beyond it came after the saved state."""
    gone = sum(units - len(indices) for _, units, indices in run.plan.keep)
    path = run.folder / HISTORY
    if not gone:
        return History.of(run.dense)
    with run.team.copy_of(path) as copied:
        found = History.from_json(copied.read_text())
    return replace(found, removals=found.removals[:gone])


def _masks(graph: Graph, plan: Plan) -> dict[str, torch.Tensor]:
    """Return parameter -> bool, True = stays, for each parameter that holds a dropped unit."""
    tensors, found = tensors_of(graph.model), {}
    for name, parts in dead_slices(graph, plan.kept(graph)).items():
        if isinstance(tensors[name], nn.Parameter):
            found[name] = torch.ones(tensors[name].shape, dtype=torch.bool, device=tensors[name].device)
            for axis, positions in parts:
                found[name].index_fill_(axis, torch.from_numpy(positions).to(found[name].device), False)
    return found
