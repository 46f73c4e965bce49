"""The stages of a run: train, cut, recover.  Each takes the model and the point before, and returns those after."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from glob import escape

from torch import nn

from secateur import during, recovery, resolve, sharing
from secateur.allocate import _matching as matching
from secateur.allocate import allocate as choose
from secateur.checkpoint import save
from secateur.compact import compact
from secateur.criteria.evidence import PER_SAMPLE
from secateur.criteria.riding import Riding, Sums
from secateur.folder import DENSE
from secateur.graph.verify import check_compact, verify
from secateur.mask import masked
from secateur.progressive import compose, relative
from secateur.recipe import Recipe
from secateur.score import score
from secateur.session import Run, figures, prunable, traced
from secateur.ship import passport
from secateur.train.loop import Epoch, Point, Watch, fit
from secateur.train.resume import atomic_write
from secateur.types import Budget, Graph, Plan, Proof, Scores, VerificationError

Out = tuple[nn.Module, Point]  # the model, and what the next stage begins with
SAVE_EVERY = 60.0  # seconds between saved states within an epoch


def train(run: Run, model: nn.Module, step: int, point: Point) -> Out:
    """Train the dense model, or take the training that another run shares; save it, and record its accuracy."""
    with sharing.turn(run) as place:
        if place is not None and place.exists():
            end = sharing.take(run, place, model)
        else:
            recovery.mark(run, model, point)
            end = _fit(run, model, 0, point)
            run.log.append("dense", **figures(run.quality(model)))
            if place is not None:
                sharing.offer(run, place, model, end)
    save(model, run.folder / DENSE, recipe=run.recipe.hash, extra=passport(run.recipe, run.data))
    return model, end


def recover(run: Run, model: nn.Module, step: int, point: Point) -> Out:
    """Train the model after cut ``step``, and record its accuracy."""
    end = _fit(run, model, step, recovery.begin(run, model, step, point))
    quality = run.quality(model)
    run.log.append("recovered", step=step, **figures(quality))
    run.stopped = not recovery.holds(run, model, step, quality)
    return (recovery.back(run, step) if run.stopped else model), end


def _fit(run: Run, model: nn.Module, step: int, point: Point) -> Point:
    """Train; return the memory of the optimiser where the recipe carries it on."""
    settings = recovery.settings(run, step)
    length = f"{settings.epochs}" if settings.steps is None else f"{settings.steps} steps"
    label = f"{run.recipe.recover.name} after cut {step}" if step else "train"
    saved = time.monotonic()

    def epoch(row: Epoch) -> None:
        run.log.append("epoch", step=step, **asdict(row))
        run.screen.line(
            f"{label}, epoch {row.epoch + 1}/{length}: loss {row.train_loss:.4f}, "
            f"validation loss {row.validation_loss:.4f}, accuracy {row.validation_accuracy:.2%}"
        )

    def keep(point: Point) -> None:
        nonlocal saved
        if step == 0:
            recovery.mark(run, model, point)
        run.save_state(run.stage, model, point)
        saved = time.monotonic()

    watch = Watch(
        keep,
        epoch,
        lambda done, total: run.screen.progress(label, done, total),
        lambda: time.monotonic() - saved > SAVE_EVERY,
    )
    with recovery.guided(run, model, settings) if step else nullcontext(settings) as chosen:
        end = fit(model, run.data, replace(chosen, riding=_riding(run, model, step)), begin=point, watch=watch)
    return Point(optimizer=end.optimizer if run.recipe.recover.carry_optimizer else None, evidence=end.evidence)


def _riding(run: Run, model: nn.Module, step: int) -> Riding | None:
    """Return what gathers the evidence for the cut that follows phase ``step``, where the recipe wants that."""
    chosen = resolve.criterion(run.recipe)
    if run.recipe.prune.criterion.evidence == "pass" or step == len(run.targets) or not chosen.evidence & PER_SAMPLE:
        return None
    return Riding(run.dense if model is run.dense.model else traced(model, run.data), chosen)


def cut(run: Run, model: nn.Module, step: int, point: Point) -> Out:
    """Score, allocate, prove and cut; return the smaller model."""
    recipe, target = run.recipe, run.targets[step - 1]
    begin = time.perf_counter()
    graph = run.dense if model is run.dense.model else traced(model, run.data)
    before = run.quality(model)
    wanted = recipe.prune.criterion
    batches = (run.data.batch(part) for part in run.data.train[: wanted.samples].split(wanted.batch_size))
    gathered = None if point.evidence is None else Sums.of(point.evidence)
    chosen = resolve.criterion(recipe)
    scores = score(graph, chosen, batches, sums=gathered) if prunable(graph) else Scores(graph, repr(chosen), {})
    budget = Budget(**{recipe.budget.kind: target})
    plan = allocate(recipe, run.dense, scores, relative(run.dense, run.plan, graph, budget))
    proof, made = _proved(graph, plan)
    run.plan = compose(run.dense, run.plan, plan, budget)
    small = run.shrunk(made.state_dict())
    after = run.quality(small)
    (run.folder / "plans").mkdir(exist_ok=True)
    atomic_write(run.folder / "plans" / f"step_{step}.json", run.plan.to_json().encode())
    run.log.append(
        "cut",
        step=step,
        budget={budget.kind: target},
        achieved=dict(run.plan.achieved),
        groups=[{"name": name, "units": units, "kept": len(kept)} for name, units, kept in run.plan.keep],
        notes=plan.notes,
        proof=[asdict(row) for row in proof.rows],
        before=figures(before),
        after=figures(after),
        seconds=time.perf_counter() - begin,
    )
    run.screen.line(
        f"cut {step}: {dict(run.plan.achieved)['units']:.1%} of the units stay, "
        f"accuracy {before.top1:.2%} -> {after.top1:.2%} before fine-tuning"
    )
    for note in plan.notes:
        run.screen.line(f"note: {note}")
    return small, recovery.carried(run, graph, made, small, step, point)


def _proved(graph: Graph, plan: Plan) -> tuple[Proof, nn.Module]:
    """Cut, after the permutation proof of the groups that are cut, and compare masked with compact.

    Raises ``VerificationError`` naming the groups that fail.
    """
    rows = verify(graph, [name for name, _, _ in plan.keep]).rows if plan.keep else ()
    wrong = [row.group for row in rows if not row.ok]
    if wrong:
        raise VerificationError(
            f"permuting the units of {', '.join(wrong)} changes the output, so they must not be cut; "
            "freeze them (prune.freeze) and report the model."
        )
    small = compact(graph, plan, verify=False)
    with masked(graph, plan):
        rows = (*rows, check_compact(graph, plan, small)) if plan.keep else rows
    return Proof(rows), small


def allocate(recipe: Recipe, dense: Graph, scores: Scores, budget: Budget) -> Plan:
    """Call ``allocate`` with the options of the recipe.

    Name patterns are matched on the dense graph.  Fractions in ``keep`` are of the dense model and reached by
    the first cut; later cuts leave these groups as they are.  Where the schedule has a keep of its own, every group
    keeps that fraction of its present units, rounded down, and the budget is only what they come to.
    """
    prune, graph = recipe.prune, scores.graph
    present = {group.name for group in graph.groups}
    first = graph is dense
    fixed = [escape(name) for name in matching(dense, tuple(prune.keep)) if name in present]
    whole = [name for name in matching(dense, prune.freeze) if name in present]
    frozen = [escape(name) for name in whole]
    keep = prune.keep if first else dict.fromkeys(fixed, 1.0)
    if prune.schedule.keep is not None:
        budget, shares = during.event(graph.groups, prune.schedule.keep, whole)
        keep = {escape(name): share for name, share in shares.items()}
    return choose(
        scores,
        budget,
        resolve.allocation(recipe),
        round_to=prune.round_to,
        min_units=prune.min_units,
        exact_only=prune.exact_only,
        keep=keep,
        freeze=prune.freeze if first else frozen,
    )


STAGES = {"train": train, "cut": cut, "recover": recover}
