"""Small networks and runs of the Fisher reference system."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import secateur as sc
from secateur import resolve
from secateur.allocate import limited
from secateur.history import History
from secateur.models.build import build
from secateur.recipe import Recipe, loads
from secateur.types import Graph, Plan

INSIDE = ("*.conv1",)
NETS: dict[str, dict[str, Any]] = {
    "wide_resnet": {"depth": 16, "width": 0.5},
    "densenet": {"depth": 16, "growth": 4},
}


def random_norms(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.weight, 0.5), (module.bias, -0.5), (module.running_mean, -0.5)):
                nn.init.uniform_(tensor, low, low + 1)  # pyrefly: ignore
            nn.init.uniform_(module.running_var, 0.5, 2)  # pyrefly: ignore
    return model


def traced(name: str, size: int = 16, **args: Any) -> Graph:
    graph = sc.trace(random_norms(build(name, **(args or NETS[name]))), torch.rand(4, 3, size, size))
    return limited(graph, INSIDE)


def some(graph: Graph, keep: float, seed: int = 0, empty: int = 0) -> Plan:
    """A plan that keeps a random part of each group that may be cut, and nothing of the first ``empty``."""
    rng, rows = np.random.default_rng(seed), []
    for number, group in enumerate(g for g in graph.groups if g.prunable):
        count = 0 if number < empty else max(1, round(keep * group.units))
        rows.append((group.name, group.units, tuple(sorted(rng.choice(group.units, count, replace=False).tolist()))))
    return Plan(graph.fingerprint, tuple(rows))


TINY = """
version: 1
name: tiny
device: cpu
threads: 1
data: {limit: 64}
model: {name: wide_resnet, args: {depth: 10, width: 0.25}}
train: {epochs: 1, lr: 0.05, optimizer: sgd, batch_size: 16}
prune:
  only: ['*.conv1']
  criterion: {name: fisher, samples: 16, batch_size: 16}
  budget: {units: 0.5}
  schedule: {name: every}
  save_every: 4
  normalise: none
  min_units: 0
  round_to: null
recover: {steps: 2, lr: 0.01, rate: constant, epochs: 0}
measure: {repeats: 1, batch_sizes: [1]}
"""


def tiny(folder: Path, *overrides: str) -> Recipe:
    return loads(TINY, overrides=[f"out={json.dumps(str(folder))}", *overrides])


def history_of(folder: Path) -> History:
    return History.from_json((folder / "history.json").read_text())


def fresh(recipe: Recipe) -> Graph:
    """The graph of a model with new weights."""
    data = resolve.dataset(recipe.data, 0)
    other = recipe.model_copy(update={"seed": 99})
    graph = sc.trace(resolve.model(other, data), data.batch(data.train[:8])[0])
    return limited(graph, recipe.prune.only)
