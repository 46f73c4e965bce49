"""What the stages of a run share: its recipe, data, dense graph, log and state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur import resolve
from secateur.allocate import limited
from secateur.compact import compact
from secateur.data import Dataset
from secateur.folder import STATE
from secateur.granularity import MASKED, SELECTED, masks, units
from secateur.graph.groups import trace
from secateur.measure import counts
from secateur.measure.quality import Quality, Task
from secateur.measure.task import task_of
from secateur.recipe import Recipe
from secateur.track.local import Log
from secateur.train.average import tensors_of
from secateur.train.devices import ALONE, Team, quality
from secateur.train.held import zero_
from secateur.train.loop import Point
from secateur.train.resume import State, write_state
from secateur.types import Graph, Plan

EXAMPLES = 8  # images that the model is traced and verified on


@dataclass(frozen=True)
class Screen:
    """Where a run tells what it does: lines of text, and the progress of the current stage."""

    line: Callable[[str], None] = lambda text: None
    progress: Callable[[str, int, int], None] = lambda label, done, total: None


@dataclass(eq=False)
class Run:
    """Everything the stages share.

    ``plan`` is what was cut so far, as a plan of the dense graph; ``stopped`` says that no cut follows.
    ``shared`` is the folder of dense trainings that runs share, ``given`` the plan that the recipe names; ``news`` is
    called when a state was saved.  All processes of ``team`` go through the same stages; the first one alone writes.
    """

    recipe: Recipe
    folder: Path
    data: Dataset
    dense: Graph
    log: Log
    screen: Screen
    plan: Plan
    stage: int = 0
    stopped: bool = False
    shared: Path | None = None
    news: Callable[[Path], None] = lambda folder: None
    given: Plan | None = None
    team: Team = ALONE

    @property
    def example(self) -> torch.Tensor:
        """The inputs that the model was traced on."""
        return self.dense.args[0]

    @property
    def task(self) -> Task:
        """What the model is trained for."""
        return task_of(self.dense.model)

    @property
    def targets(self) -> tuple[float, ...]:
        """The fraction of the dense model that stays after each cut."""
        if self.given is not None:
            return (dict(self.given.achieved)[self.recipe.budget.kind],)
        return resolve.targets(self.recipe, prunable(scored(self.recipe, self.dense)))

    @property
    def masking(self) -> bool:
        """Whether units are set to zero and held there, not cut out."""
        return self.recipe.prune.granularity in MASKED

    def masks(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Return the masks on ``model``, one of this run: tensor name -> bool, True = stays."""
        return masks(replace(self.dense, model=model), self.plan) if self.masking and self.plan.keep else {}

    def quality(self, model: nn.Module, part: str = "validation") -> Quality:
        """Return how good ``model`` is on a part of the data."""
        return quality(model, self.data, part, max(256, self.recipe.train.batch_size), self.team)

    def save_state(self, stage: int, model: nn.Module, point: Point) -> None:
        """Replace the saved state."""
        if self.team.lead:
            state = State(stage, self.log.count, point, tensors_of(model), self.plan.to_json())
            write_state(self.folder / STATE, state)
            self.news(self.folder)

    def shrunk(self, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
        """Return the model that ``plan`` makes of the dense one, with these weights."""
        whole = self.masking or not self.plan.keep
        model = copy.deepcopy(self.dense.model) if whole else compact(self.dense, self.plan, verify=False)
        model.load_state_dict(tensors)
        return zero_(model, self.masks(model))


def prunable(graph: Graph) -> int:
    """Return the number of units in groups that can be cut."""
    return sum(group.units for group in graph.groups if group.prunable)


def traced(model: nn.Module, data: Dataset, recipe: Recipe | None = None) -> Graph:
    """Return the graph of ``model`` on the first training images, without the groups that ``recipe`` leaves whole."""
    graph = trace(model, data.batch(data.train[:EXAMPLES])[0])
    if recipe is None:
        return graph
    graph = units(graph, recipe.prune.granularity) if recipe.prune.granularity in SELECTED else graph
    return limited(graph, recipe.prune.only)


def scored(recipe: Recipe, graph: Graph) -> Graph:
    """Return ``graph`` with the units that the recipe scores: its own, or kernels or weights."""
    if recipe.prune.granularity not in MASKED:
        return graph
    return limited(units(graph, recipe.prune.granularity), recipe.prune.only)


def costs(graph: Graph) -> dict[str, int]:
    """Return parameters, and multiply-accumulates for one image."""
    return {"params": counts.params(graph), "macs": round(counts.macs(graph) / len(graph.args[0]))}


def passport(recipe: Recipe, data: Dataset) -> dict[str, Any]:
    """Return what ``predict`` and ``evaluate`` must know: classes, input form, data and its split."""
    return {
        "classes": list(data.classes),
        "input": {"shape": list(data.shape), "mean": list(data.mean), "std": list(data.std)},
        "data": recipe.data.model_dump(mode="json"),
        "seed": recipe.seed,
    }
