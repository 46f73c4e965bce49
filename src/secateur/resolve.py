"""From the words of a recipe to the objects they name."""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from secateur.allocation import ALLOCATIONS, Allocation, Global, Isomorphic, Profile, stretched
from secateur.checkpoint import load
from secateur.criteria import REGISTRY, Costed, Criterion, Normalised, Worst
from secateur.data import Dataset, open_source, split
from secateur.data.augment import AUGMENTATIONS
from secateur.granularity import MASKED
from secateur.header import KEY
from secateur.history import History, shape_of
from secateur.models import MODELS
from secateur.models.build import build
from secateur.progressive import achieved
from secateur.recipe import Recipe
from secateur.schedules import SCHEDULES
from secateur.sections import Data, Fbs, Rnp, Train
from secateur.train.loop import Settings, draw
from secateur.train.optimizers import OPTIMIZERS
from secateur.train.rates import RATES, Rate, step, warmed
from secateur.types import CheckpointError, Graph, Plan, PlanError, RecipeError


def device(recipe: Recipe) -> torch.device:
    """Return the device of the run; raises ``RecipeError`` when it is not there."""
    present = torch.cuda.is_available()
    if recipe.device == "auto":
        return torch.device("cuda" if present else "cpu")
    chosen = torch.device(recipe.device)
    if chosen.type == "cuda" and (not present or (chosen.index or 0) >= torch.cuda.device_count()):
        count = torch.cuda.device_count() if present else 0
        raise RecipeError(f"device = {recipe.device!r}: {count} CUDA devices were found; use auto or cpu.")
    return chosen


def tracking(recipe: Recipe) -> str | None:
    """Return the address of the MLflow store that the run is copied to, None for none.

    Raises ``RecipeError`` where one is asked for that cannot be: no MLflow, or no address.  Nothing is asked of
    the store itself, which may come up later.
    """
    if recipe.track.mlflow is None:
        return None
    missing = [name for name in ("mlflow", "sqlalchemy") if importlib.util.find_spec(name) is None]
    if missing:
        raise RecipeError(
            f"track.mlflow = {recipe.track.mlflow!r}: {missing[0]} is not installed; install the extra `track` "
            "(pip install 'secateur[track]'), or run with track.mlflow=null and push later."
        )
    found = os.environ.get("MLFLOW_TRACKING_URI") if recipe.track.mlflow == "env" else recipe.track.mlflow
    if not found:
        raise RecipeError("track.mlflow = 'env', but MLFLOW_TRACKING_URI is not set; set it, or name the store here.")
    return found


def dataset(data: Data, seed: int) -> Dataset:
    """Return the dataset of a recipe, split by ``seed``."""
    source = open_source(data.name, data.root, data.download, data.image_size)
    return split(
        source,
        validation=data.validation,
        test=data.test,
        seed=seed,
        limit=data.limit,
        normalize=data.normalize,
    )


def model(recipe: Recipe, data: Dataset) -> nn.Module:
    """Return the model of a recipe for the images and classes of ``data``, with its checkpoint's weights.

    Weights are drawn from the recipe's seed.  A builder of the registry, torchvision or timm is told the
    number of classes (and channels and image size where it takes them) unless the recipe says otherwise.
    """
    name, args = recipe.model.name, dict(recipe.model.args)
    channels, height, width = data.shape
    facts = {
        "classes": len(data.classes),
        "num_classes": len(data.classes),
        "in_channels": channels,
        "in_chans": channels,
        "image_size": height if height == width else [height, width],
    }
    args = {key: facts[key] for key in _takes(name) if key in facts} | args
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(recipe.seed))
        network = build(name, **args)
    return network if recipe.model.checkpoint is None else _filled(network, Path(recipe.model.checkpoint))


def _takes(name: str) -> Iterable[str]:
    """Return the names of the facts about the data that builder ``name`` takes."""
    library, colon, _ = name.rpartition(":")
    if not colon and name in MODELS:
        return inspect.signature(MODELS[name]).parameters
    return {"torchvision": ("num_classes",), "timm": ("num_classes", "in_chans")}.get(library, ())


def _filled(network: nn.Module, path: Path) -> nn.Module:
    """Return ``network`` with the weights in ``path``: a checkpoint of secateur or a plain state dict."""
    try:
        with safe_open(path, framework="pt") as file:
            ours = KEY in (file.metadata() or {})
        if not ours:
            network.load_state_dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"model.checkpoint: {path} cannot be read: {error}") from error
    except RuntimeError as error:
        raise CheckpointError(f"model.checkpoint: {path} does not fit the model: {error}") from error
    return load(path, model=network) if ours else network


def criterion(recipe: Recipe, before: int = 0) -> Criterion:
    """Return the criterion of a recipe, with its cost terms, or its reverse; one that draws takes the recipe's seed.

    ``before`` is the number of cuts before this one: units are numbered anew after each, so they are drawn anew.
    """
    wanted = recipe.prune.criterion
    args = dict(wanted.args)
    if wanted.name == "random":
        seed = wanted.args.get("seed", recipe.seed)
        args["seed"] = draw(int(str(seed)), before) if before else seed
    chosen = REGISTRY[wanted.name](**args)
    chosen = Normalised(chosen) if wanted.normalise else chosen
    cost = wanted.cost
    priced = Costed(chosen, macs=cost.macs, params=cost.params) if cost.macs or cost.params else chosen
    return Worst(priced) if wanted.worst else priced


def allocation(recipe: Recipe, dense: Graph) -> Allocation:
    """Return how the recipe splits its budget over the groups of ``dense``."""
    prune = recipe.prune
    if prune.profile is not None:
        return Profile(_fractions(_shape("profile", prune.profile), dense))
    chosen = ALLOCATIONS[prune.allocation]
    if prune.normalise != "auto" and isinstance(chosen, Global | Isomorphic):
        return replace(chosen, normalise=prune.normalise)
    return chosen


def _fractions(shape: History | Plan, dense: Graph) -> tuple[tuple[str, float], ...]:
    """Return the fraction that stays in each group: of a history by place along the depth, of a plan by name."""
    names = [group.name for group in dense.groups if group.prunable]
    if isinstance(shape, History):
        shares = stretched([fraction for _, fraction in shape.fractions()], len(names))
        return tuple(zip(names, shares, strict=True))
    found = tuple((name, len(indices) / units) for name, units, indices in shape.keep)
    unknown = [name for name, _ in found if name not in names]
    if unknown:
        raise RecipeError(
            f"prune.profile: the model has no prunable group {unknown[0]!r}; a plan is matched by names, a history "
            "(schedule every with save_every) by place, so that it fits other depths."
        )
    return found


def given(recipe: Recipe, dense: Graph) -> Plan | None:
    """Return the plan that the recipe names, as one of ``dense``, or None where it names none.

    Raises ``RecipeError`` for a file that is not there, ``PlanError`` for another model's plan.
    """
    if recipe.prune.plan is None:
        return None
    shape, events = _shape("plan", recipe.prune.plan), recipe.prune.events
    if isinstance(shape, History):
        plan = (shape if events is None else shape.until(events)).plan(dense)
    elif events is None:
        plan = shape
    else:
        raise RecipeError(f"prune.events counts the events of a history; {recipe.prune.plan} is a plan.")
    if plan.granularity in MASKED:
        raise RecipeError(f"prune.plan: {recipe.prune.plan} masks single {plan.granularity}s; give a plan that cuts.")
    return replace(plan, achieved=achieved(dense, plan))


def _shape(key: str, path: str) -> History | Plan:
    try:
        return shape_of(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"prune.{key}: {path} cannot be read: {error}.") from error
    except PlanError as error:
        raise PlanError(f"prune.{key}: {path}: {error}") from error


def targets(recipe: Recipe, total: int) -> tuple[float, ...]:
    """Return the fraction of the dense model, with its ``total`` prunable units, that stays after each cut.

    None where gates are put on a model that stays whole.  Of a schedule whose cuts are masks first
    (``prune.save_every``) the one cut at its end counts.
    """
    when = recipe.prune.schedule
    if recipe.fbs is not None and recipe.budget.keep == 1:
        return ()  # gates on the dense model
    if recipe.prune.save_every is not None:
        return (recipe.budget.keep,)
    return SCHEDULES[when.name](recipe.budget.keep, when.cuts, total, when.units)


def _recovery_epochs(recipe: Recipe, last: bool, left: float) -> int:
    """Return the epochs of a recovery; of scratch (after the last cut) those of train unless the recipe says more."""
    recover = recipe.recover
    asked = recover.final_epochs if last and recover.final_epochs is not None else recover.epochs
    again = recipe.train.epochs if recover.final_epochs is None else recover.final_epochs
    scratch = round(again / {"epochs": 1.0, "compute": left}[recover.scratch]) if last else asked
    return {"none": 0, "scratch": scratch}.get(recover.name, asked)


def _recovery_steps(recipe: Recipe) -> int | None:
    """Return the optimiser steps of a recovery but the last, None where it is told in epochs."""
    return {"none": None, "rewind": None}.get(recipe.recover.name, recipe.recover.steps)


def precision(recipe: Recipe, half: bool) -> torch.dtype | None:
    """Return the type that training casts to, None for float32 throughout; ``half``: whether bfloat16 pays."""
    auto = torch.bfloat16 if half else None
    return {"auto": auto, "float32": None, "bfloat16": torch.bfloat16}[recipe.train.precision]


def _rate(name: str, train: Train) -> Rate:
    falls: dict[str, Rate] = {**RATES, "step": lambda progress: step(progress, train.drops, train.drop_factor)}
    return falls[name]


def training(recipe: Recipe, phase: int, last: bool = False, left: float = 1.0, half: bool = False) -> Settings:
    """Return how to train: ``phase`` 0 is the dense model, k the recovery after cut k (``last``: of all).

    ``left`` is the fraction of the dense model's multiply-accumulates that the model still needs; ``half`` says
    whether bfloat16 pays for it.
    """
    train, recover = recipe.train, recipe.recover
    epochs, rate, lr, warmup = train.epochs, train.rate, train.lr, train.warmup
    steps = _recovery_steps(recipe) if phase and not last else None
    if phase and {"rewind": False}.get(recover.name, True):
        epochs = _recovery_epochs(recipe, last, left)
        rate, lr, warmup = recover.rate or rate, recover.lr or lr, recover.warmup
    return replace(_settings(recipe, epochs, lr, rate, warmup, half), seed=draw(recipe.seed, phase), steps=steps)


def gating(recipe: Recipe, phase: int, epochs: int, half: bool, number: int | None = None) -> Settings:
    """Return how to train gates for ``epochs`` in ``phase``, counted on from the recoveries, at density ``number``."""
    train, recover, fbs = recipe.train, recipe.recover, recipe.fbs or Fbs()
    lr, rate = fbs.lr or recover.lr or train.lr, fbs.rate or recover.rate or train.rate
    settings = replace(_settings(recipe, epochs, lr, rate, 0.0, half), seed=draw(recipe.seed, phase))
    if fbs.reset_epochs or number is None:
        return settings
    falls, all_ = settings.rate, len(fbs.densities)
    return replace(settings, rate=lambda progress: falls((number + progress) / all_))


def steering(recipe: Recipe, phase: int, half: bool) -> Settings:
    """Return how the network learns under a controller; ``phase`` counts on from the recoveries."""
    train, recover, rnp = recipe.train, recipe.recover, recipe.rnp or Rnp()
    lr, rate = rnp.lr or recover.lr or train.lr, rnp.rate or recover.rate or train.rate
    return replace(_settings(recipe, 1, lr, rate, 0.0, half), seed=draw(recipe.seed, phase))


def _settings(recipe: Recipe, epochs: int, lr: float, rate: str, warmup: float, half: bool) -> Settings:
    train = recipe.train
    make = OPTIMIZERS[train.optimizer]
    return Settings(
        epochs,
        train.batch_size,
        lambda parameters: make(parameters, lr, train.weight_decay, train.momentum),
        warmed(_rate(rate, train), warmup / max(epochs, 1)),
        train.label_smoothing,
        train.clip_norm,
        AUGMENTATIONS[recipe.data.augment],
        0,
        train.mixup,
        train.ema,
        precision(recipe, half),
        {"auto": None, True: True, False: False}[train.channels_last],
        train.compile,
    )
