"""The stages of a run: train, cut, recover.  Each takes the model and the point before, and returns those after."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from secateur import recovery, resolve, sharing
from secateur.checkpoint import save
from secateur.criteria.evidence import DATA
from secateur.criteria.riding import Riding, Sums
from secateur.criteria.streaming import Streaming, rider
from secateur.cutting import allocate, proved
from secateur.erode import Erosion
from secateur.folder import DENSE
from secateur.masking import fallen
from secateur.masking import proved as zeroes_proved
from secateur.progressive import compose, relative, whole
from secateur.score import score
from secateur.session import Run, passport, prunable, scored, traced
from secateur.track.local import read
from secateur.train.loop import Point, fit
from secateur.train.resume import atomic_write
from secateur.types import Budget, Graph, Proof, Scores
from secateur.watching import Out, watched

SPARSE = 8  # of the images of an epoch, at least each so-many-th is evidence


def train(run: Run, model: nn.Module, step: int, point: Point) -> Out:
    """Train the dense model, or take the training that another run shares; save it, and record its accuracy."""
    with sharing.turn(run) as place:
        if place is not None and place.exists():
            end = sharing.take(run, place, model)
        else:
            recovery.mark(run, model, point)
            end = _fit(run, model, 0, point)
            run.log.append("dense", **run.quality(model).figures())
            if place is not None:
                sharing.offer(run, place, model, end)
    if run.team.lead:
        save(model, run.folder / DENSE, recipe=run.recipe.hash, extra=passport(run.recipe, run.data))
    return model, end


def recover(run: Run, model: nn.Module, step: int, point: Point) -> Out:
    """Train the model after cut ``step``, and record its accuracy."""
    end = _fit(run, model, step, recovery.begin(run, model, step, point))
    quality = run.quality(model)
    run.log.append("recovered", step=step, **quality.figures())
    run.stopped = not recovery.holds(run, model, step, quality)
    return (recovery.back(run, step) if run.stopped else model), end


def _fit(run: Run, model: nn.Module, step: int, point: Point) -> Point:
    """Train; return the memory of the optimiser where the recipe carries it on."""
    settings = recovery.settings(run, step)
    length = f"{settings.epochs}" if settings.steps is None else f"{settings.steps} steps"
    label = f"{run.recipe.recover.name} after cut {step}" if step else "train"
    watch = watched(run, model, step, label, length)
    with (
        recovery.masked(run, model, settings) as holding,
        recovery.guided(run, model, holding) if step else nullcontext(holding) as chosen,
    ):
        settings = replace(chosen, riding=_riding(run, model, step))
        end = fit(model, run.data, settings, begin=point, watch=watch, team=run.team)
    return Point(optimizer=end.optimizer if run.recipe.recover.carry_optimizer else None, evidence=end.evidence)


def _riding(run: Run, model: nn.Module, step: int) -> Riding | Streaming | None:
    """Return what gathers the evidence for the cut that follows phase ``step``, where the recipe wants that."""
    chosen, wanted = resolve.criterion(run.recipe), run.recipe.prune.criterion
    if not wanted.rides or step == len(run.targets) or not chosen.evidence & DATA:
        return None
    graph = run.dense if model is run.dense.model else traced(model, run.data, run.recipe)
    return rider(graph, chosen, wanted.every or max(1, min(SPARSE, len(run.data.train) // wanted.samples)))


def cut(run: Run, model: nn.Module, step: int, point: Point) -> Out:
    """Score, allocate, prove and cut (or zero); return the model without the units that went."""
    recipe, target = run.recipe, run.targets[step - 1]
    begin = time.perf_counter()
    graph = run.dense if model is run.dense.model else traced(model, run.data, recipe)
    before = run.quality(model)
    scores = None if run.given else judged(run, graph, step - 1, point.evidence)
    budget = Budget(**{recipe.budget.kind: target})
    small, proof, end = (_zeroed if run.masking else _smaller)(run, scores, graph, budget, step, point)
    after = run.quality(small)
    _cut_record(run, step, target, proof, (before.figures(), after.figures()), begin)
    return small, end


def judged(run: Run, graph: Graph, index: int, evidence: Mapping[str, torch.Tensor] | None = None) -> Scores:
    """Return the scores of the recipe's criterion at cut ``index`` (from 0); ``evidence`` is what training gathered."""
    wanted = run.recipe.prune.criterion
    batches = (run.data.batch(part) for part in run.data.train[: wanted.samples].split(wanted.batch_size))
    chosen, shown = resolve.criterion(run.recipe, index), scored(run.recipe, graph)
    if not prunable(shown):
        return Scores(shown, repr(chosen), {})
    return score(shown, chosen, batches, loss=run.task.scoring(), sums=None if evidence is None else Sums.of(evidence))


def _cut_record(run: Run, step: int, target: float, proof: Proof, quality: tuple[Any, Any], begin: float) -> None:
    """Write the plan of cut ``step`` and its record; ``quality`` holds the figures before and after it."""
    recipe, (before, after) = run.recipe, quality
    run.team.same(run.plan.to_json(), f"the plan of cut {step}")
    if run.team.lead:
        (run.folder / "plans").mkdir(exist_ok=True)
        atomic_write(run.folder / "plans" / f"step_{step}.json", run.plan.to_json().encode())
    run.log.append(
        "cut",
        step=step,
        budget={recipe.budget.kind: target},
        achieved=dict(run.plan.achieved),
        groups=[{"name": name, "units": units, "kept": len(kept)} for name, units, kept in run.plan.keep],
        notes=run.plan.notes,
        proof=[asdict(row) for row in proof.rows],
        before=before,
        after=after,
        seconds=time.perf_counter() - begin,
    )
    kind, what = ("params", f"weights of {recipe.prune.granularity}s") if run.masking else ("units", "units")
    run.screen.line(
        f"cut {step}: {dict(run.plan.achieved)[kind]:.1%} of the {what} stay, "
        f"{run.task.told(before, after)} before fine-tuning"
    )
    for note in run.plan.notes:
        run.screen.line(f"note: {note}")


def _smaller(
    run: Run, scores: Scores | None, graph: Graph, budget: Budget, step: int, point: Point
) -> tuple[nn.Module, Proof, Point]:
    """Cut units out of the model of ``graph``; the run's plan becomes that of the result."""
    left = relative(run.dense, run.plan, graph, budget)
    plan = allocate(run.recipe, run.dense, scores, left) if scores is not None else run.given or whole(graph)
    proof, made = proved(graph, plan)
    run.plan = compose(run.dense, run.plan, plan, budget)
    small = run.shrunk(made.state_dict())
    return small, proof, recovery.carried(run, graph, made, small, step, point)


def _zeroed(
    run: Run, scores: Any, graph: Graph, budget: Budget, step: int, point: Point
) -> tuple[nn.Module, Proof, Point]:
    """Zero kernels or weights of a copy of the model of ``graph``; the run's plan becomes that of the result."""
    run.plan = allocate(run.recipe, scores.graph, fallen(scores, run.plan), budget)
    copy = run.shrunk(graph.model.state_dict())
    return copy, zeroes_proved(replace(graph, model=copy), run.plan), recovery.carried_whole(run, copy, step, point)


def erode(run: Run, model: nn.Module, step: int, point: Point) -> Out:
    """Cut by masks while training goes on, event after event; return the smaller model."""
    begin = time.perf_counter()
    dense = next(record.data for record in read(run.log.path) if record.stage == "dense")
    erosion = Erosion(run, model)
    settings = erosion.settings()
    watch = replace(
        watched(run, erosion.model, step, "cuts", f"{settings.steps} steps", erosion.write_history),
        stepped=erosion.stepped,
    )
    try:
        with recovery.guided(run, erosion.model, settings) as chosen:
            end = fit(erosion.model, run.data, chosen, begin=point, watch=watch, team=run.team)
    finally:
        erosion.close()
    erosion.write_history()
    proof, small = proved(erosion.graph, run.plan)
    _cut_record(run, step, run.targets[step - 1], proof, (dense, run.quality(small).figures()), begin)
    return small, recovery.carried(run, erosion.graph, small, small, step, end)


STAGES = {"train": train, "cut": cut, "erode": erode, "recover": recover}
