"""run(recipe): the stages in order, no cleverness.

A run is a list of stages: train, then cut and recover for each step of the schedule, then finish.  Between
any two, and after each epoch, the whole state is in one file; ``resume`` continues from it.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur import gating, resolve, steering
from secateur.allocate import matching
from secateur.checkpoint import load
from secateur.conflicts import without_classes
from secateur.criteria import Magnitude
from secateur.criteria.evidence import DATA
from secateur.cutting import allocate
from secateur.data import Dataset
from secateur.folder import DENSE, HELD, RECORDS, REWIND, STATE, UNGATED, choose, complete, write_recipe
from secateur.measure.latency import describe
from secateur.measure.task import task_of
from secateur.progressive import whole
from secateur.recipe import Recipe
from secateur.score import score
from secateur.session import Run, Screen, costs, scored, traced
from secateur.ship import finish
from secateur.stages import STAGES
from secateur.track.git import revision
from secateur.track.live import following
from secateur.track.local import Log
from secateur.train.devices import Team, joined
from secateur.train.loop import Point
from secateur.train.resume import State, read_state
from secateur.types import Graph, Plan, RecipeError


def run(
    recipe: Recipe,
    folder: Path | None = None,
    *,
    resume: bool = False,
    screen: Screen | None = None,
    shared: Path | None = None,
    source: Path | None = None,
) -> Path:
    """Carry out ``recipe`` and return the folder of the run (``folder``, or what ``folder.choose`` says).

    Everything that can be checked early (data, model, budget, name patterns) is checked before the folder is
    made.  ``shared`` is a folder of dense trainings that runs share (see ``sharing``), ``source`` the folder whose
    git revision is recorded (None: the working directory).  Raises the errors of the parts; what is on the disk
    then is a state that ``resume`` continues.

    Under ``torchrun`` all processes call this alike: they divide every batch, the first one writes, and nothing is
    shared with other runs.
    """
    with joined(resolve.device(recipe)) as team:
        screen = screen if screen and team.lead else Screen()
        chosen = Path(team.decided(lambda: str(folder or choose(recipe, resume))))
        if team.decided(lambda: "complete" if resume and complete(chosen) else ""):
            screen.line(f"{chosen} is complete; nothing to resume.")
        else:
            at, track = revision(source or Path.cwd()), recipe.track
            follower = following(resolve.tracking(recipe), track.experiment, track.wait, screen.line)
            with follower if team.lead else nullcontext(lambda folder: None) as news:
                _carry_out(recipe, chosen, resume, screen, None if team.several else shared, team, at, news)
        return chosen


def _carry_out(
    recipe: Recipe,
    folder: Path,
    resume: bool,
    screen: Screen,
    shared: Path | None,
    team: Team,
    at: dict[str, Any] | None,
    news: Callable[[Path], None],
) -> None:
    """Carry out a run that is at git revision ``at``; ``news`` is called with its folder whenever a state was saved."""
    begin = time.perf_counter()
    team.same(recipe.hash + json.dumps(_versions()), "the recipe, or a version of torch or secateur,")
    if team.several and recipe.prune.criterion.rides:
        raise RecipeError("prune.criterion.evidence: training sees one process's images; take pass with several.")
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    with team.first_here():  # which may download
        data = resolve.dataset(recipe.data, recipe.seed).to(team.device)
    dense = traced(resolve.model(recipe, data).to(team.device), data, recipe)
    given = resolve.given(recipe, dense)
    _check_early(recipe, dense, data)
    with team.copy_of(folder / STATE) as path:
        saved = read_state(path) if resume and path.exists() else None
    if team.lead:
        folder.mkdir(parents=True, exist_ok=True)
        write_recipe(recipe, folder)
    log = Log(folder / RECORDS, saved.records if saved else 0, mute=not team.lead)
    run = Run(
        recipe,
        folder,
        data,
        dense,
        log,
        screen,
        whole(dense),
        shared=shared,
        news=news,
        given=given,
        team=team,
    )
    screen.line(f"run folder: {folder}")
    model = _restored(run, saved, at) if saved else _started(run, at)
    point = saved.point if saved else Point()
    stages = _stages(run)
    for run.stage in range(saved.stage if saved else 0, len(stages)):
        kind, step = stages[run.stage]
        if run.stopped and kind in STAGES:
            continue  # no cut follows; gates go on what there is
        model, point = {**STAGES, **gating.STAGES, **steering.STAGES}[kind](run, model, step, point)
        follows = stages[run.stage + 1 : run.stage + 2]
        if follows and not (run.stopped and follows[0][0] in STAGES):
            run.save_state(run.stage + 1, model, point)
    finish(run, model)
    log.append("end", seconds=time.perf_counter() - begin, resumed=saved is not None)
    for name in (STATE, REWIND, HELD, UNGATED) if team.lead else ():
        (folder / name).unlink(missing_ok=True)
    news(folder)


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("secateur", "torch", "numpy")}


def _stages(run: Run) -> list[tuple[str, int]]:
    """Return all stages of a run but the last, ``finish``."""
    cuts = plan_stages(len(run.targets), masks=run.recipe.prune.save_every is not None)
    return cuts + gating.stages(run) + steering.stages(run)


def plan_stages(cuts: int, masks: bool = False) -> list[tuple[str, int]]:
    """Return the stages as (kind, step): train, then cut and recover for each of the ``cuts``.

    With ``masks`` the cut is made little by little while training goes on.
    """
    steps, how = range(1, cuts + 1), "erode" if masks else "cut"
    return [("train", 0), *((kind, step) for step in steps for kind in (how, "recover"))]


def _check_early(recipe: Recipe, dense: Graph, data: Dataset) -> None:
    """Try the last cut on the untrained model, and its output; raises what would come too late."""
    with torch.no_grad():
        output = dense.model.eval()(*dense.args)
    task = task_of(dense.model)
    if wrong := task.misfit(output, dense.args[0], len(data.classes)):
        raise RecipeError(
            f"model.name = {recipe.model.name!r} on {data.source.name!r}: {wrong}; set the builder's arguments in "
            "model.args."
        )
    if problems := {"reconstruction": without_classes(recipe)}.get(task.name):
        rows = [f"{'.'.join(map(str, path))}: {rule}" for path, rule in problems.items()]
        raise RecipeError(f"model.name = {recipe.model.name!r} makes images: " + "; ".join(rows) + ".")
    if recipe.fbs is not None:
        gating.loaded(recipe.fbs, gating.wrapped(recipe.fbs, dense.model, dense.args[0]).model)
    if recipe.rnp is not None:
        steering.wrapped(recipe.rnp, dense.model, dense.args[0], recipe.seed)
    wanted = resolve.criterion(recipe)
    graph = scored(recipe, dense)
    matching(graph, recipe.prune.only)
    mixed = [g for g in graph.groups if g.prunable and not g.exact]
    if recipe.prune.save_every is not None and mixed and not recipe.prune.exact_only:
        raise RecipeError(
            f"prune.save_every holds units at zero while training goes on, but {mixed[0].why_inexact} mixes those of "
            f"{mixed[0].name!r}; leave such groups whole with prune.exact_only=true, or drop save_every."
        )
    if recipe.prune.plan is not None:
        return
    scores = score(graph, Magnitude() if wanted.evidence & DATA else wanted)
    allocate(recipe, graph, scores, recipe.budget)


def _started(run: Run, at: dict[str, Any] | None) -> nn.Module:
    """Write the first records of a run; return the dense model."""
    recipe, data, graph = run.recipe, run.data, run.dense
    run.log.append(
        "run",
        recipe=recipe.model_dump(mode="json"),
        hash=recipe.hash,
        revision=at,
        device=describe(run.team.device),
        processes=run.team.size,
        threads=torch.get_num_threads(),
        platform=platform.platform(),
        versions={**_versions(), "python": platform.python_version()},
    )
    sizes = {part: len(data.part(part)) for part in ("train", "validation", "test")}
    run.log.append("data", name=data.source.name, classes=data.classes, shape=data.shape, **sizes)
    groups = [
        {"name": g.name, "units": g.units, "kind": g.granularity, "exact": g.exact, "frozen": g.frozen}
        for g in scored(recipe, graph).groups
    ]
    figures = costs(graph)
    run.log.append("model", name=recipe.model.name, task=run.task.name, groups=groups, seconds=graph.seconds, **figures)
    run.screen.line(
        f"{recipe.model.name} on {data.source.name}: {figures['params']:,} parameters, "
        f"{figures['macs']:,} MACs; {sizes['train']:,} images to train, {sizes['validation']:,} to validate, "
        f"{sizes['test']:,} to test"
    )
    return graph.model


def _restored(run: Run, state: State, at: dict[str, Any] | None) -> nn.Module:
    """Return the model of a saved state; the run's dense graph and plan are brought to it."""
    run.log.append("resume", at=state.stage, revision=at)
    run.screen.line(f"resuming at stage {state.stage + 1} of {len(_stages(run)) + 1}")
    if state.stage > 0:
        with run.team.copy_of(run.folder / DENSE) as path:
            run.dense = traced(load(path, model=run.dense.model).to(run.team.device), run.data, run.recipe)
    run.plan = Plan.from_json(state.plan) if state.plan else whole(run.dense)
    if any(kind == gating.ON for kind, _ in _stages(run)[: state.stage]):
        return gating.restored(run, state.model)
    if any(kind == steering.ON for kind, _ in _stages(run)[: state.stage]):
        return steering.restored(run, state.model)
    if state.stage == 1 and run.recipe.prune.save_every is not None:  # masks: all tensors have their dense shape
        model = copy.deepcopy(run.dense.model)
        model.load_state_dict(state.model)
        return model
    if state.stage < 2 and not run.plan.keep:  # before the first cut
        run.dense.model.load_state_dict(state.model)
        return run.dense.model
    return run.shrunk(state.model)
