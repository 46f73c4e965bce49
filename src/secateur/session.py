"""What the stages of a run share: its recipe, data, dense graph, log and state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from secateur import resolve
from secateur.compact import compact
from secateur.data import Dataset
from secateur.folder import STATE
from secateur.graph.groups import trace
from secateur.measure import counts
from secateur.measure.accuracy import Quality
from secateur.recipe import Recipe
from secateur.track.local import Log
from secateur.train.average import tensors_of
from secateur.train.devices import ALONE, Team, quality
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
    ``shared`` is the folder of dense trainings that runs share.
    All processes of ``team`` go through the same stages; the first one alone writes.
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
    team: Team = ALONE

    @property
    def example(self) -> torch.Tensor:
        """The inputs that the model was traced on."""
        return self.dense.args[0]

    @property
    def targets(self) -> tuple[float, ...]:
        """The fraction of the dense model that stays after each cut."""
        return resolve.targets(self.recipe, prunable(self.dense))

    def quality(self, model: nn.Module, part: str = "validation") -> Quality:
        """Return loss and accuracy of ``model`` on a part of the data."""
        return quality(model, self.data, part, max(256, self.recipe.train.batch_size), self.team)

    def save_state(self, stage: int, model: nn.Module, point: Point) -> None:
        """Replace the saved state."""
        if self.team.lead:
            state = State(stage, self.log.count, point, tensors_of(model), self.plan.to_json())
            write_state(self.folder / STATE, state)

    def shrunk(self, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
        """Return the model that ``plan`` makes of the dense one, with these weights."""
        kept = self.plan.keep
        model = compact(self.dense, self.plan, verify=False) if kept else copy.deepcopy(self.dense.model)
        model.load_state_dict(tensors)
        return model


def prunable(graph: Graph) -> int:
    """Return the number of units in groups that can be cut."""
    return sum(group.units for group in graph.groups if group.prunable)


def traced(model: nn.Module, data: Dataset) -> Graph:
    """Return the graph of ``model`` on the first training images."""
    return trace(model, data.batch(data.train[:EXAMPLES])[0])


def figures(quality: Quality) -> dict[str, float | None]:
    """Return loss and accuracies for a record; ``top5`` is None where there are at most 5 classes."""
    return {"loss": quality.loss, "top1": quality.top1, "top5": quality.top5, "n": quality.n}


def costs(graph: Graph) -> dict[str, int]:
    """Return parameters, and multiply-accumulates for one image."""
    return {"params": counts.params(graph), "macs": round(counts.macs(graph) / len(graph.args[0]))}
