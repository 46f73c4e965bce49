"""Run-time pruning in a run: put gates on what the cuts left, lower their density step by step, train at each.

The training recipe of FBS (Gao et al. 2019, section 3.3): warm start at density 1, then a little less each time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from secateur import recovery, resolve
from secateur.checkpoint import load, save
from secateur.folder import UNGATED
from secateur.runtime.gates import FBS, Gated, Gating, gate, layers, penalty, watch
from secateur.runtime.gates.cost import meter
from secateur.sections import Fbs
from secateur.session import Run
from secateur.train.loop import Guide, Point, fit
from secateur.types import PlanError, RecipeError
from secateur.watching import Out, watched

ON, ALONE, LOWER = "gates", "gates alone", "density"


def stages(run: Run) -> list[tuple[str, int]]:
    """Return the stages that follow the cuts, as (kind, step); none in a recipe without gates."""
    fbs = run.recipe.fbs
    if fbs is None:
        return []
    steps = range(1, len(fbs.densities) + 1)
    return [(ON, 0), *([(ALONE, 0)] if fbs.alone else []), *((LOWER, step) for step in steps)]


def wrapped(fbs: Fbs, model: nn.Module, example: torch.Tensor) -> Gating:
    """Return ``model`` with gates that compute everything; raises ``RecipeError`` where there is no layer for them."""
    try:
        gating = gate(model, 1.0, example, everywhere=fbs.everywhere, pooling=fbs.pooling, threshold=fbs.threshold)
    except PlanError as error:
        raise RecipeError(f"fbs: {error}") from error
    for pattern in fbs.layers:
        if not any(fnmatchcase(path, pattern) for path in gating.gated):
            raise RecipeError(
                f"fbs.layers: {pattern!r} names no layer with a gate; there are {', '.join(gating.gated)}."
            )
    return gating


def asked(run: Run) -> Fbs:
    """Return what the recipe says about gates."""
    return run.recipe.fbs or Fbs()


def put_on(run: Run, model: nn.Module, step: int, point: Point) -> Out:
    """Keep the model as the cuts left it in a file, and return it with gates."""
    if run.team.lead:
        save(model, run.folder / UNGATED)
    gating = wrapped(asked(run), model, run.example)
    rows = [{"path": layer.conv, "norm": layer.norm} for layer in layers(gating.model)]
    whole = meter(gating.model, run.example).dense
    run.log.append(
        "gates",
        macs=whole,
        gated=rows,
        dense=[{"path": path, "why": why} for path, why in gating.dense],
        sharing=list(gating.sharing),
    )
    shared = f", {len(gating.sharing)} share their masks" if gating.sharing else ""
    run.screen.line(f"gates on {len(rows)} layers{shared}, {len(gating.dense)} are computed whole")
    for path, why in gating.dense:
        run.screen.line(f"no gate on {path}: {why}")
    return gating.model, Point()


def alone(run: Run, model: nn.Module, step: int, point: Point) -> Out:
    """Train the predictors of the gates, with all other weights as they are."""
    densities(model, run, 0)
    free = {id(p) for m in model.modules() if isinstance(m, FBS) for p in m.parameters()}
    held = [p for p in model.parameters() if p.requires_grad and id(p) not in free]
    try:
        for parameter in held:
            parameter.requires_grad_(False)
        _train(run, model, len(run.targets) + 1, asked(run).alone, "gates alone", point)
    finally:
        for parameter in held:
            parameter.requires_grad_(True)
    return model, Point()


def lower(run: Run, model: nn.Module, step: int, point: Point) -> Out:
    """Train at the density of ``step``; record what its images compute and how good it is."""
    begin = time.perf_counter()
    density = densities(model, run, step - 1)
    _train(run, model, len(run.targets) + 1 + step, asked(run).epochs, f"density {density:g}", point)
    quality, counted = run.quality(model), spent(run, model, "validation")
    row = {"density": density, "macs": float(counted.mean()), **quality.figures()}
    run.log.append("gated", step=step, seconds=time.perf_counter() - begin, **row)
    told = run.task.told(quality.figures())
    run.screen.line(f"density {density:g}: {row['macs']:,.0f} MACs per image, {told} on validation images")
    return model, Point()


def densities(model: nn.Module, run: Run, number: int) -> float:
    """Set the densities of entry ``number`` of the schedule; return that of the layers without one of their own."""
    density, own = asked(run).densities[number], asked(run).layers
    for path, module in model.named_modules():
        if isinstance(module, Gated) and isinstance(module.gate, FBS):
            module.gate.density = next((d for pattern, d in own.items() if fnmatchcase(path, pattern)), density)
    return density


def _train(run: Run, model: nn.Module, phase: int, epochs: int, label: str, point: Point) -> None:
    settings = resolve.gating(run.recipe, phase, epochs, recovery.half(run))
    watching = watched(run, model, phase, label, f"{epochs}")
    with penalised(model, asked(run).penalty) as guide:
        settings = replace(settings, guide=guide, compiled=False)  # choices are read beside the forward pass
        fit(model, run.data, settings, begin=point, watch=watching, team=run.team)


@contextmanager
def penalised(model: nn.Module, weight: float) -> Iterator[Guide]:
    """Yield what adds ``weight`` times the L1 norm of the saliencies, mean over the images, to the loss of a step."""
    with watch(model) as choices:

        def guide(inputs: torch.Tensor) -> Callable[[Any, torch.Tensor], torch.Tensor]:
            return lambda output, loss: loss + weight * penalty(choices)

        yield guide


def restored(run: Run, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return the gated model of a saved state."""
    model = wrapped(asked(run), ungated(run), run.example).model
    model.load_state_dict(tensors)
    return model


def ungated(run: Run) -> nn.Module:
    """Return the model that the gates were put on."""
    with run.team.copy_of(run.folder / UNGATED) as path:
        return load(path, model=run.dense.model).to(run.example.device)


def spent(run: Run, model: nn.Module, part: str) -> torch.Tensor:
    """Return the multiply-accumulates (n,) float64 of each image of a part of the data."""
    count, found = meter(model, run.example), []
    with torch.no_grad(), watch(model.eval()) as choices:
        for inputs, _ in run.data.batches(part, max(256, run.recipe.train.batch_size)):
            model(inputs)
            found.append(count(choices, len(inputs)).cpu())
    return torch.cat(found)


STAGES = {ON: put_on, ALONE: alone, LOWER: lower}
