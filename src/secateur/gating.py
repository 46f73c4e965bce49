"""Run-time pruning in a run: put gates on what the cuts left, lower their density step by step, train at each.

The training recipe of FBS (Gao et al. 2019, section 3.3): warm start at density 1, then a little less each time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from secateur import recovery, resolve
from secateur.checkpoint import load, save
from secateur.folder import DENSITIES, UNGATED
from secateur.runtime import macs
from secateur.runtime.gates import FBS, Gated, Gating, gate, layers, penalty, watch
from secateur.runtime.gates.cost import meter
from secateur.sections import Fbs
from secateur.session import Run, passport
from secateur.train.loop import Guide, Point, fit
from secateur.types import PlanError, RecipeError, SecateurError
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
        how = {"everywhere": fbs.everywhere, "pooling": fbs.pooling, "threshold": fbs.threshold, "scale": fbs.scale}
        gating = gate(model, 1.0, example, **how)
    except PlanError as error:
        raise RecipeError(f"fbs: {error}") from error
    for pattern in fbs.layers:
        if not any(fnmatchcase(path, pattern) for path in gating.gated):
            raise RecipeError(
                f"fbs.layers: {pattern!r} names no layer with a gate; there are {', '.join(gating.gated)}."
            )
    return gating


def loaded(fbs: Fbs, model: nn.Module) -> nn.Module:
    """Give the gated ``model`` the weights that the recipe names; raises ``RecipeError`` when they do not fit."""
    if fbs.load is not None:
        try:
            tensors = load(fbs.load).state_dict()
            model.load_state_dict(tensors)
        except (SecateurError, RuntimeError) as error:
            why = str(error).splitlines()[-1].strip()
            raise RecipeError(f"fbs.load: {fbs.load} does not hold this network with its gates: {why}") from error
    return model


def asked(run: Run) -> Fbs:
    """Return what the recipe says about gates."""
    return run.recipe.fbs or Fbs()


def put_on(run: Run, model: nn.Module, step: int, point: Point) -> Out:
    """Keep the model as the cuts left it in a file, and return it with gates."""
    if run.team.lead:
        save(model, run.folder / UNGATED)
    gating = wrapped(asked(run), model, run.example)
    noted(run, gating, meter(gating.model, run.example).dense)
    return loaded(asked(run), gating.model), Point()


def noted(run: Run, gating: Gating, macs: float, **more: Any) -> None:
    """Record and tell what has gates now, and why the rest has none; ``macs`` of one image when all is computed."""
    rows = [{"path": layer.conv, "norm": layer.norm} for layer in layers(gating.model)]
    dense = [{"path": path, "why": why} for path, why in gating.dense]
    run.log.append("gates", macs=macs, gated=rows, dense=dense, sharing=list(gating.sharing), **more)
    shared = f", {len(gating.sharing)} share their masks" if gating.sharing else ""
    run.screen.line(f"gates on {len(rows)} layers{shared}, {len(gating.dense)} are computed whole")
    for path, why in gating.dense:
        run.screen.line(f"no gate on {path}: {why}")


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
    _train(run, model, len(run.targets) + 1 + step, asked(run).epochs, f"density {density:g}", point, step - 1)
    row = {"density": density, **standing(run, model, "validation")}
    run.log.append("gated", step=step, seconds=time.perf_counter() - begin, **row)
    told = run.task.told(row)
    run.screen.line(f"density {density:g}: {row['macs']:,.0f} MACs per image, {told} on validation images")
    if run.team.lead:
        _file(run, density).parent.mkdir(exist_ok=True)
        save(model, _file(run, density), recipe=run.recipe.hash, extra=passport(run.recipe, run.data))
    return model, Point()


def _file(run: Run, density: float) -> Path:
    return run.folder / DENSITIES / f"{density:g}.safetensors"


def tested(run: Run) -> list[dict[str, Any]]:
    """Return how good the model was at the end of each density, and what it computed, on the test images.

    Reads the test set, so it belongs to the end of a run.
    """
    rows = []
    numbers = {density: number for number, density in enumerate(asked(run).densities)}  # the last of equal ones
    for density, number in numbers.items():
        with run.team.copy_of(_file(run, density)) as path:
            model = restored(run, load_file(path))
        densities(model, run, number)
        rows.append({"density": density, **standing(run, model, "test")})
    return rows


def densities(model: nn.Module, run: Run, number: int) -> float:
    """Set the densities of entry ``number`` of the schedule; return that of the layers without one of their own."""
    density, own = asked(run).densities[number], asked(run).layers
    for path, module in model.named_modules():
        if isinstance(module, Gated) and isinstance(module.gate, FBS):
            module.gate.density = next((d for pattern, d in own.items() if fnmatchcase(path, pattern)), density)
    return density


def _train(
    run: Run, model: nn.Module, phase: int, epochs: int, label: str, point: Point, number: int | None = None
) -> None:
    settings = resolve.gating(run.recipe, phase, epochs, recovery.half(run), number)
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


def standing(run: Run, model: nn.Module, part: str) -> dict[str, Any]:
    """Return the mean multiply-accumulates of an image of a part of the data, and how good the gated model is on it."""
    return {"macs": float(spent(run, model, part).mean()), **run.quality(model, part).figures()}


def spent(run: Run, model: nn.Module, part: str) -> torch.Tensor:
    """Return the multiply-accumulates (n,) float64 of each image of a part of the data."""
    batches = run.data.batches(part, max(256, run.recipe.train.batch_size))
    return macs.spent(model, meter(model, run.example), (inputs for inputs, _ in batches))


STAGES = {ON: put_on, ALONE: alone, LOWER: lower}
