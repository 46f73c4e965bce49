"""Runtime neural pruning in a run: put prefix gates on what the cuts left, then train controller and network in turns.

Algorithm 1 of Lin et al. (NIPS 2017); ``train.interleave`` holds one round of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import nn

from secateur import recovery, resolve
from secateur.checkpoint import save
from secateur.folder import UNGATED
from secateur.gating import noted, standing, ungated
from secateur.runtime.budget import bias_for
from secateur.runtime.gates import Steered, gate
from secateur.runtime.gates.cost import meter
from secateur.runtime.gates.order import ordered
from secateur.runtime.gates.rnp import controller_for
from secateur.sections import Rnp
from secateur.session import Run, traced
from secateur.stages import judged
from secateur.train.interleave import Interleaved, Interleaving
from secateur.train.layout import gradients_alike, laid_out
from secateur.train.loop import Point, Settings, draw, shuffled
from secateur.types import RecipeError
from secateur.watching import Out

ON, ROUNDS = "prefixes", "rounds"
SEEN = 1024  # validation images on which the bias of a budget is found


def stages(run: Run) -> list[tuple[str, int]]:
    """Return the stages that follow the cuts, as (kind, step); none in a recipe without a controller."""
    return [] if run.recipe.rnp is None else [(ON, 0), (ROUNDS, 0)]


def asked(run: Run) -> Rnp:
    """Return what the recipe says about the controller."""
    return run.recipe.rnp or Rnp()


def wrapped(rnp: Rnp, model: nn.Module, example: torch.Tensor, seed: int) -> Steered:
    """Return ``model`` with prefix gates and a fresh controller."""
    return under(rnp, gate(model, None, example, groups=rnp.groups).model, example, seed)


def under(rnp: Rnp, inner: nn.Module, example: torch.Tensor, seed: int) -> Steered:
    """Return the gated ``inner`` with a fresh controller."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(seed, 0))
        controller = controller_for(inner, rnp.embed, rnp.hidden)
    return Steered(inner, controller.to(example.device))


def put_on(run: Run, model: nn.Module, step: int, point: Point) -> Out:
    """Put the channels in order, keep that model in a file, and return it with gates and a controller."""
    if run.team.several:
        raise RecipeError("rnp: the controller and the network learn in one process; run it without torchrun.")
    if asked(run).order == "criterion":
        model = ordered(judged(run, traced(model, run.data, run.recipe), len(run.targets)))
    save(model, run.folder / UNGATED)
    chosen = gate(model, None, run.example, groups=asked(run).groups)
    steered = under(asked(run), chosen.model, run.example, run.recipe.seed)
    noted(run, chosen, meter(chosen.model, run.example).dense, controller=steered.controller.macs)
    return steered, Point()


def rounds(run: Run, model: nn.Module, step: int, point: Point) -> Out:
    """Train in rounds; record each, and at the end what the images compute and how good the model is."""
    model = cast(Steered, model)  # what put_on returned
    rnp, settings = asked(run), resolve.steering(run.recipe, len(run.targets) + 1, recovery.half(run))
    inputs, last = run.data.batch(run.data.train[:2])[0], settings.channels_last
    if laid_out(model, inputs) if last is None else last:
        model.to(memory_format=torch.channels_last)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    total = rnp.rounds * (rnp.policy_steps + rnp.backbone_steps)

    def stepped() -> None:
        run.screen.progress("controller and network", work.policy_updates + work.backbone_updates, total)

    names = ("rounds", "policy_steps", "backbone_steps", "penalty", "alpha", "gamma", "anneal", "renew", "policy_lr")
    how = Interleaving(**{name: getattr(rnp, name) for name in names}, rate=settings.rate, autocast=settings.autocast)
    optimizer = settings.optimizer(model.model.parameters())
    work = Interleaved(model.model, model.controller, optimizer, _batches(run, settings), how, settings.seed, stepped)
    work.load(point)
    with gradients_alike(model, inputs) if inputs.dim() == 4 else nullcontext():
        while work.rounds < rnp.rounds:
            _round(run, model, work)
    model.to(memory_format=torch.contiguous_format)
    row = standing(run, model, "validation")
    run.log.append("gated", step=1, **row)
    run.screen.line(f"{row['macs']:,.0f} MACs per image under the policy, {run.task.told(row)}")
    return model, Point()


def _round(run: Run, model: Steered, work: Interleaved) -> None:
    """Train one round; record it, tell it, save the state."""
    begin = time.perf_counter()
    row = work.round_()
    quality = run.quality(model)
    figures = {f"validation_{name}": value for name, value in quality.curve().items()}
    run.log.append("round", round=work.rounds, seconds=time.perf_counter() - begin, **row, **figures)
    run.screen.line(
        f"round {work.rounds}/{work.settings.rounds}: loss {row['backbone_loss']:.4f}, value loss "
        f"{row['value_loss']:.4f}, mean action {row['action']:.2f}, epsilon {row['epsilon']:.2f}; under the policy "
        f"{run.task.told(quality.figures())} on validation images"
    )
    run.save_state(run.stage, model, work.point())


def _batches(run: Run, settings: Settings) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
    """Return the batch of each update: passes over the training images, each in its own order."""
    data, size = run.data, settings.batch_size
    order: dict[int, list[torch.Tensor]] = {}
    length = len(shuffled(data.train, size, 0))

    def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, place = divmod(number, length)
        if epoch not in order:
            order.clear()
            order[epoch] = shuffled(data.train, size, draw(settings.seed, 2, epoch))
        inputs, labels = data.batch(order[epoch][place])
        if settings.augment is not None:
            torch.manual_seed(draw(settings.seed, 3, number))
            inputs = settings.augment(inputs)
        return (inputs.contiguous(memory_format=torch.channels_last) if inputs.dim() == 4 else inputs), labels

    return batch


def restored(run: Run, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return the steered model of a saved state."""
    model = wrapped(asked(run), ungated(run), run.example, run.recipe.seed)
    model.load_state_dict(tensors)
    return model


def tested(run: Run, model: nn.Module) -> list[dict[str, Any]]:
    """Return how good the model is at each budget, and what it computes, on the test images.

    The bias of a budget is found on validation images.  Reads the test set, so it belongs to the end of a run.
    """
    model = cast(Steered, model)
    rows: list[dict[str, Any]] = []
    images = [run.data.batch(part)[0] for part in run.data.validation[:SEEN].split(256)]
    for budget in asked(run).budgets:
        bias = bias_for(model, images, budget)
        before, model.bias = model.bias, bias
        rows.append({"budget": budget, "bias": bias, **standing(run, model, "test")})
        model.bias = before
    return rows


STAGES = {ON: put_on, ROUNDS: rounds}
