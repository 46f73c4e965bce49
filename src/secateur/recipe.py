"""The recipe of one experiment: a strict, versioned schema; every mistake is named with its line.

Only this module and ``cli`` compare strings that a user wrote; everything behind them gets values.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from secateur.conflicts import conflicts
from secateur.during import spell_out
from secateur.problems import at, listing, nearest, schema_problems, shown
from secateur.sections import Count, Data, Fbs, Measure, Model, Prune, Recover, Rnp, Score, Section, Track, Train
from secateur.types import Budget, RecipeError, SecateurError
from secateur.yaml_source import Path, parse


class Recipe(Section):
    """One experiment."""

    version: Literal[1]
    """version of this schema"""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """name of the experiment, and of its folder under runs/"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    """auto, cpu, cuda or cuda:N"""
    threads: Count | None = None
    """threads of the CPU kernels (null: what torch chooses)"""
    data: Data = Data()
    model: Model = Model()
    train: Train = Train()
    prune: Prune = Prune()
    recover: Recover = Recover()
    fbs: Fbs | None = None
    """run-time pruning of what the cuts left, by gates (null: none)"""
    rnp: Rnp | None = None
    """run-time pruning of what the cuts left, by a controller (null: none)"""
    measure: Measure = Measure()
    track: Track = Track()
    out: str | None = None
    """folder of the run (null: runs/NAME, with a number when that is taken)"""

    @property
    def hash(self) -> str:
        """SHA-256 over every value but ``out`` and ``track``, which say where to and not what; 16 hex digits."""
        values = self.model_dump(mode="json", exclude={"out", "track"})
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def budget(self) -> Budget:
        """The final budget."""
        return Budget(**{k: v for k, v in self.prune.budget if v is not None})


def load(path: str | FilePath, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe in the YAML file ``path``, with ``key=value`` overrides put on top.

    A value is YAML: ``train.lr=0.01``, ``prune.budget={macs: 0.5}``, ``prune.freeze=[conv1]``.
    Raises ``RecipeError`` that lists every problem as file:line:column, dotted key, value, rule, and the
    nearest valid name.
    """
    try:
        text = FilePath(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe {str(path)!r} cannot be read: {error}. `secateur init` writes one.") from error
    return loads(text, str(path), overrides)


def loads(text: str, where: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe in YAML ``text``; ``where`` names its file in messages.  See ``load``.

    >>> loads("{version: 1, name: tiny}", overrides=["train.lr=0.1"]).train.lr
    0.1
    """
    values, marks = parse(text, where)
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise RecipeError(f"{where}:1:1: a recipe is a mapping that starts with version and name; found {found}.")
    places = {path: f"{where}:{mark.line}:{mark.column}" for path, mark in marks.items()}
    for override in overrides:
        _override(values, places, override)
    spell_out(values)
    problems = _registry_problems(values)
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems = {**schema_problems(Recipe, values, error), **problems}
    problems = problems or conflicts(recipe) if recipe else problems
    if problems or recipe is None:
        raise RecipeError(listing(where, values, places, problems))
    return recipe


def _override(values: dict[str, Any], places: dict[Path, str], text: str) -> None:
    """Put ``a.b=value`` into ``values`` and note that its place is the command line."""
    dotted, equals, raw = text.partition("=")
    path = tuple(dotted.strip().split("."))
    if not equals or not all(path):
        raise RecipeError(f"override {text!r} must be key=value, for example train.lr=0.01.")
    value, _ = parse(raw, f"override {dotted}")
    here: Any = values
    for depth, key in enumerate(path[:-1]):
        if here.get(key) is None:
            here[key] = {}
        here = here[key]
        if not isinstance(here, dict):
            section = ".".join(path[: depth + 1])
            raise RecipeError(f"override {text!r}: {section} is {shown(here)}, which has no keys inside.")
    here[path[-1]] = value
    for old in [p for p in places if p[: len(path)] == path]:
        del places[old]
    for depth in range(1, len(path) + 1):
        places.setdefault(path[:depth], "command line")


def _registry_problems(values: Mapping[str, Any]) -> dict[Path, str]:
    """Return path -> rule for names that no registry has, and for options that a criterion doesn't take."""
    from secateur import data
    from secateur.criteria import REGISTRY
    from secateur.models import MODELS

    problems: dict[Path, str] = {}
    for path, names, forms in (
        (("data", "name"), data.SOURCES, "".join(f", {form}" for form in data.SPELLED)),
        (("prune", "criterion", "name"), REGISTRY, ""),
        (
            ("model", "name"),
            MODELS,
            ", torchvision:NAME, timm:NAME, transformers:CLASS, package.module:factory",
        ),
    ):
        name = at(values, path)
        formed = data.known(str(name)) if path[0] == "data" else forms and ":" in str(name)
        if isinstance(name, str) and name not in names and not formed:
            problems[path] = f"must be one of {', '.join(names)}{forms}{nearest(name, names, bare=True)}"
    kind = REGISTRY.get(str(at(values, ("prune", "criterion", "name")) or Score().name))
    args = at(values, ("prune", "criterion", "args")) or {}
    if kind is not None and isinstance(args, dict):
        known = list(inspect.signature(kind).parameters)
        bad = {key: f"unknown option of {kind.name}{nearest(str(key), known)}" for key in args if key not in known}
        problems |= {("prune", "criterion", "args", key): rule for key, rule in bad.items()}
        try:
            if not bad:
                kind(**args)
        except (SecateurError, TypeError, ValueError) as error:
            problems["prune", "criterion", "args"] = str(error)
    return problems


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of recipes, with the registered names, so that editors can complete them."""
    from secateur.criteria import REGISTRY
    from secateur.data import FORMS, SOURCES
    from secateur.models import MODELS

    schema = Recipe.model_json_schema()
    parts = schema["$defs"]
    parts["Data"]["properties"]["name"]["anyOf"] = [
        {"enum": list(SOURCES)},
        {"pattern": f"^({'|'.join(FORMS)}):."},
    ]
    parts["Score"]["properties"]["name"]["enum"] = list(REGISTRY)
    parts["Model"]["properties"]["name"]["examples"] = [*MODELS, "torchvision:resnet18", "timm:convnext_atto"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
