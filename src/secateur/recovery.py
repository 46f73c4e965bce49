"""Recover: what a model begins with after a cut, who teaches it, and what its optimiser remembers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from secateur import resolve
from secateur.compact import LINEAGE, Surgery, compact_optimizer, reshape
from secateur.folder import HELD, REWIND
from secateur.measure.quality import Quality
from secateur.progressive import whole
from secateur.session import Run, costs
from secateur.track.local import read
from secateur.train.average import tensors_of
from secateur.train.distil import taught
from secateur.train.held import held
from secateur.train.loop import Cursor, Guide, Point, Settings, draw, shuffled
from secateur.train.precision import half_pays
from secateur.train.restart import begin_anew, cut_along, recalibrate
from secateur.train.resume import State, atomic_write, read_state, write_state
from secateur.types import CheckpointError, Graph, Plan


def settings(run: Run, step: int) -> Settings:
    """Return how to train in phase ``step`` (0: the dense model)."""
    left = dict(run.plan.achieved).get("macs", 1.0)
    return resolve.training(run.recipe, step, last=step == len(run.targets), left=left, half=half(run))


def half(run: Run) -> bool:
    """Return whether bfloat16 pays for the dense model, and so for all phases."""
    macs = costs(run.dense)["macs"] * run.recipe.train.batch_size
    return half_pays(run.dense.model, run.example.device, macs)


def begin(run: Run, model: nn.Module, step: int, point: Point) -> Point:
    """Bring ``model`` to the beginning of its recovery after cut ``step``; return where training begins.

    A recovery that was interrupted (its ``point`` is past the beginning) is left as it is.
    """
    if point.cursor != Cursor():
        return point
    recover, data = run.recipe.recover, run.data
    if recover.recalibrate:
        chosen = shuffled(data.train, run.recipe.train.batch_size, draw(run.recipe.seed, step, 0))
        batches = chosen[: recover.recalibrate]
        norms = recalibrate(model, (data.batch(indices)[0] for indices in batches))
        quality = run.quality(model)
        run.log.append("recalibrated", step=step, norms=norms, batches=len(batches), **quality.figures())
        run.screen.line(
            f"{norms} batch norms recalibrated on {len(batches)} batches: {run.task.told(quality.figures())}"
        )
    return BEGINNINGS[recover.name](run, model, step, point)


def _as_cut(run: Run, model: nn.Module, step: int, point: Point) -> Point:
    return point


def _anew(run: Run, model: nn.Module, step: int, point: Point) -> Point:
    """After the last cut: draw all weights again."""
    if step < len(run.targets):
        return point
    recipe = run.recipe
    built = recipe.model.model_copy(update={"checkpoint": None})
    other = recipe.model_copy(update={"seed": draw(recipe.seed, step), "model": built})
    fresh = resolve.model(other, run.data).to(run.example.device)
    before = run.dense.model.__dict__.get(LINEAGE)  # the run may have started from a model that was cut before
    begin_anew(model, reshape(fresh, before) if isinstance(before, Surgery) else fresh, _sliced(run))
    return point


def _rewound(run: Run, model: nn.Module, step: int, point: Point) -> Point:
    """Go back to the weights and the rate of an epoch of the dense training (Renda et al. 2020, arXiv 2003.02389)."""
    path = run.folder / REWIND
    try:
        with run.team.copy_of(path) as here:
            dense = load_file(here)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}, the weights to rewind to, cannot be read ({error}); start anew.") from error
    model.load_state_dict(cut_along(model, dense, _sliced(run)))
    return Point(Cursor(run.recipe.recover.rewind))


def _sliced(run: Run) -> bool:
    """Return whether the model has smaller tensors than the dense one; masks are set again when training begins."""
    return bool(run.plan.keep) and not run.masking


BEGINNINGS: dict[str, Callable[[Run, nn.Module, int, Point], Point]] = {
    "distil": _as_cut,
    "finetune": _as_cut,
    "none": _as_cut,
    "rewind": _rewound,
    "scratch": _anew,
}


def mark(run: Run, model: nn.Module, point: Point) -> None:
    """Write the weights that the recipe rewinds to, when the dense training is there."""
    recover = run.recipe.recover
    wanted = {"rewind": Cursor(recover.rewind)}.get(recover.name)
    if point.cursor == wanted and run.team.lead:
        plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors_of(model).items()}
        atomic_write(Path(run.folder / REWIND), save(plain))


def holds(run: Run, model: nn.Module, step: int, quality: Quality) -> bool:
    """Return whether the recovered ``model`` is as good as ``prune.stop_drop`` asks; if so, keep it on the disk."""
    allowed = run.recipe.prune.stop_drop
    if allowed is None:
        return True
    with run.team.copy_of(run.log.path) as here:
        dense = next(record.data for record in read(here) if record.stage == "dense")
    if run.task.drop(dense, quality.figures()) > allowed:
        return False
    if run.team.lead:
        write_state(run.folder / HELD, State(step, run.log.count, Point(), tensors_of(model), run.plan.to_json()))
    return True


def back(run: Run, step: int) -> nn.Module:
    """Return the last model that held, or a copy of the dense one; the run's plan becomes that of it."""
    with run.team.copy_of(run.folder / HELD) as path:
        state = read_state(path) if path.exists() else State(0, 0, Point(), tensors_of(run.dense.model))
    run.plan = Plan.from_json(state.plan) if state.plan else whole(run.dense)
    model = run.shrunk(state.model)
    run.log.append("stopped", step=step, back_to=state.stage, **run.quality(model).figures())
    kept = f"the model of cut {state.stage}" if state.stage else "the dense model"
    run.screen.line(
        f"stopped: after cut {step} the model is more than {run.recipe.prune.stop_drop:.2%} worse on validation images "
        f"than the dense one; {kept} is kept"
    )
    return model


@contextmanager
def guided(run: Run, model: nn.Module, settings: Settings) -> Iterator[Settings]:
    """Yield ``settings``, with the dense model as the teacher where the recipe wants one."""
    recover = run.recipe.recover
    wanted = {"distil": recover.distil}.get(recover.name)
    if wanted is None or settings.epochs == 0:
        yield settings
        return
    options: dict[str, Any] = wanted.model_dump()
    guide: Guide
    with taught(model, run.dense.model, run.example, whole=run.team.whole, **options) as guide:
        yield replace(settings, guide=guide)


@contextmanager
def masked(run: Run, model: nn.Module, settings: Settings) -> Iterator[Settings]:
    """Yield ``settings`` with an optimiser that leaves masked weights at zero, where the run has masks."""
    masks = run.masks(model)
    if not masks:
        yield settings
        return
    with held(model, masks) as hold:
        yield replace(settings, optimizer=lambda parameters: hold(settings.optimizer(parameters)))


def carried_whole(run: Run, model: nn.Module, step: int, point: Point) -> Point:
    """Return the beginning of the recovery after a cut that left all tensors of ``model`` their shape."""
    if not run.recipe.recover.carry_optimizer or point.optimizer is None:
        return Point()
    made = settings(run, step).optimizer(p for p in model.parameters() if p.requires_grad)
    return Point(optimizer={"state": point.optimizer["state"], "param_groups": made.state_dict()["param_groups"]})


def carried(run: Run, graph: Graph, cut: nn.Module, small: nn.Module, step: int, point: Point) -> Point:
    """Return the beginning of the recovery after cut ``step``, with the optimiser's memory cut along.

    ``point`` is the end of the training of ``graph.model``, ``cut`` what ``compact`` made of it and ``small`` the
    same network that goes on.  Rates are those of the recovery.
    """
    if not run.recipe.recover.carry_optimizer or point.optimizer is None:
        return Point()
    make = settings(run, step).optimizer
    before = make(p for p in graph.model.parameters() if p.requires_grad)
    before.load_state_dict(point.optimizer)
    shapes = [{name: p.shape for name, p in net.named_parameters()} for net in (graph.model, cut)]
    same = shapes[0] == shapes[1]  # nothing was cut
    after = before if same else compact_optimizer(before, graph, cut)
    names = {id(p): name for name, p in (graph.model if same else cut).named_parameters(remove_duplicate=False)}
    memory = {names[id(p)]: state for p, state in after.state.items() if isinstance(p, torch.Tensor)}
    trained = [name for name, p in small.named_parameters() if p.requires_grad]
    groups = make(p for p in small.parameters() if p.requires_grad).state_dict()["param_groups"]
    state = {index: memory[name] for index, name in enumerate(trained) if name in memory}
    return Point(optimizer={"state": state, "param_groups": groups})
