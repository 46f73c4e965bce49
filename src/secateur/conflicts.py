"""Values of a recipe that are right one by one and wrong together: dotted key -> what to do."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from secateur import during
from secateur.yaml_source import Path

if TYPE_CHECKING:
    from secateur.recipe import Recipe


def conflicts(recipe: Recipe) -> dict[Path, str]:
    """Return path -> rule for each value of ``recipe`` that another value rules out."""
    checks = (_warmups, _recoveries, _schedules, _secrets, _evidence, _images, _gates, during.conflicts)
    return {path: rule for check in checks for path, rule in check(recipe).items()}


def _warmups(recipe: Recipe) -> dict[Path, str]:
    train, recover = recipe.train, recipe.recover
    found: dict[Path, str] = {}
    if 0 < train.epochs <= train.warmup:
        found["train", "warmup"] = f"must be less than train.epochs = {train.epochs}"
    if recover.name in ("none", "rewind", "scratch"):
        return found
    last = recover.epochs if recover.final_epochs is None else recover.final_epochs
    shortest = min([last, *([recover.epochs] if recipe.prune.schedule.several else [])])
    if 0 < shortest <= recover.warmup:
        found["recover", "warmup"] = f"must be less than the shortest recovery, {shortest} epochs"
    return found


def _recoveries(recipe: Recipe) -> dict[Path, str]:
    train, recover = recipe.train, recipe.recover
    found: dict[Path, str] = {}
    if recover.name == "rewind" and recover.rewind >= max(train.epochs, 1):
        found["recover", "rewind"] = f"must be less than train.epochs = {train.epochs}: that training is run again"
    if recover.name == "scratch" and not (train.epochs if recover.final_epochs is None else recover.final_epochs):
        found["recover", "name"] = "new weights must be trained: set recover.final_epochs (or train.epochs)"
    if recover.name in ("rewind", "scratch"):
        why = f"does nothing with {recover.name}, which begins with other weights; leave it out"
        keys = {"carry_optimizer": recover.carry_optimizer, "recalibrate": recover.recalibrate}
        found |= {("recover", key): why for key, value in keys.items() if value}
    return found


def _schedules(recipe: Recipe) -> dict[Path, str]:
    prune, recover = recipe.prune, recipe.recover
    found: dict[Path, str] = {}
    if prune.schedule.name == "every":
        if prune.budget.units is None:
            found["prune", "budget"] = "the schedule every counts units: give budget.units"
        if prune.round_to is not None:
            found["prune", "round_to"] = "the schedule every takes units one by one: set round_to to null"
    found |= _masks_first(recipe) | _given(recipe)
    if prune.granularity in ("kernel", "weight") and prune.budget.macs is not None:
        found["prune", "budget"] = f"masks of {prune.granularity}s save no time: give budget.params or budget.units"
    if recover.steps is not None and recover.name in ("none", "rewind"):
        found["recover", "steps"] = f"does nothing with {recover.name}; leave it out"
    if recover.steps is not None and recover.warmup > 0:
        found["recover", "warmup"] = "counts epochs; leave it out where recover.steps counts steps"
    return found


def _gates(recipe: Recipe) -> dict[Path, str]:
    if recipe.rnp is None:
        return {}
    if recipe.fbs is not None:
        return {("rnp",): "a convolution has one gate: give fbs or rnp, not both"}
    return {}


def _secrets(recipe: Recipe) -> dict[Path, str]:
    if "@" not in (recipe.track.mlflow or "").partition("://")[2].partition("/")[0]:
        return {}
    why = "a recipe is copied into every record and report, so it must not hold a name or password"
    return {("track", "mlflow"): f"{why}; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"}


def _evidence(recipe: Recipe) -> dict[Path, str]:
    """Evidence from training needs training before every cut."""
    if not recipe.prune.criterion.rides:
        return {}
    from secateur.criteria import REGISTRY
    from secateur.criteria.evidence import STREAMED

    wanted = recipe.prune.criterion
    streamed = REGISTRY[wanted.name](**wanted.args).evidence & STREAMED
    if streamed and recipe.train.compile:
        return {("prune", "criterion", "evidence"): f"{wanted.name} does not ride on compiled steps: take pass"}
    recover, several = recipe.recover, recipe.prune.schedule.several
    idle = recover.name == "none" or (recover.steps is None and recover.epochs == 0)
    why = "is gathered in the training before each cut: "
    if recipe.train.epochs == 0:
        return {("prune", "criterion", "evidence"): why + "set train.epochs, or take pass"}
    if several and idle:
        return {("prune", "criterion", "evidence"): why + "there is none between the cuts; take pass"}
    return {}


def _masks_first(recipe: Recipe) -> dict[Path, str]:
    prune, recover = recipe.prune, recipe.recover
    if prune.save_every is None:
        return {}
    found: dict[Path, str] = {}
    if prune.schedule.name != "every" or prune.granularity in ("kernel", "weight"):
        found["prune", "save_every"] = "goes with the schedule every, and units that are cut out"
    if recover.steps is None:
        found["recover", "steps"] = "with prune.save_every, say how many optimiser steps lie before each cut"
    why = "does nothing with prune.save_every; leave it out"
    keys = {"keep": prune.keep, "stop_drop": prune.stop_drop}
    return found | {("prune", key): why for key, value in keys.items() if value}


def _given(recipe: Recipe) -> dict[Path, str]:
    prune = recipe.prune
    found: dict[Path, str] = {}
    if prune.plan is not None and prune.schedule.several:
        found["prune", "schedule"] = "a plan that is given is cut at once: name: once"
    if prune.plan is not None and prune.granularity is not None:
        found["prune", "granularity"] = "does nothing with prune.plan; leave it out"
    if prune.plan is not None and prune.profile is not None:
        found["prune", "profile"] = "give a plan or a profile, not both"
    if prune.plan is None and prune.events is not None:
        found["prune", "events"] = "counts the events of the history in prune.plan; give that too"
    if prune.normalise != "auto" and (prune.profile is not None or prune.allocation == "uniform"):
        found["prune", "normalise"] = "compares scores of different groups, which this allocation does not"
    return found


def _images(recipe: Recipe) -> dict[Path, str]:
    """Models of the registry that take no classes make images; others are asked when they are built."""
    from secateur.models import MODELS

    builder = MODELS.get(recipe.model.name)
    makes_images = builder is not None and "classes" not in inspect.signature(builder).parameters
    return without_classes(recipe) if makes_images else {}


def without_classes(recipe: Recipe) -> dict[Path, str]:
    """Return path -> rule for each value that a model which makes images, not scores of classes, rules out."""
    found: dict[Path, str] = {}
    if recipe.data.normalize:
        found["data", "normalize"] = "an autoencoder compares images in [0, 1]: leave them as they are (false)"
    if "light" in recipe.data.augment:
        found["data", "augment"] = "an autoencoder compares images in [0, 1], which light leaves; take another"
    why = "needs labels, which an autoencoder does not use; leave it out"
    keys = {"label_smoothing": recipe.train.label_smoothing, "mixup": recipe.train.mixup}
    found |= {("train", key): why for key, value in keys.items() if value}
    if recipe.rnp is not None:
        found["rnp",] = "the rewards need labels, which an autoencoder does not use; leave it out, or take fbs"
    if recipe.recover.name == "distil":
        found["recover", "name"] = "distil teaches scores of classes, which an autoencoder has not; take finetune"
    return found
