"""The folder of a run: which one it is, and whether it fits the recipe."""

from __future__ import annotations

import io
from pathlib import Path

from ruamel.yaml import YAML

from secateur.recipe import Recipe, load
from secateur.report.arms import flat
from secateur.sections import Track
from secateur.track.local import read
from secateur.train.resume import atomic_write
from secateur.types import RecipeError

RECIPE, RECORDS, STATE, REPORT = "recipe.yaml", "records.jsonl", "state.safetensors", "report.html"
REWIND, HELD = "rewind.safetensors", "held.safetensors"
DENSE, PRUNED, PLAN, PROOF = "dense.safetensors", "pruned.safetensors", "plan.json", "proof.json"
CHECKPOINTS, HISTORY = "checkpoints", "history.json"
UNGATED, GATED = "ungated.safetensors", "gated.safetensors"  # what gates were put on, and what they made of it
DENSITIES = "densities"  # a gated model at the end of its training at each density
COMPACT = "compact.safetensors"  # of a masked model, without what its masks left idle


def choose(recipe: Recipe, resume: bool) -> Path:
    """Return the folder of a run: the recipe's ``out``, or a new (``resume``: the newest) one under ``runs/``.

    Raises ``RecipeError`` when ``out`` holds a run already, or when there is nothing to resume or it was made
    by another recipe.
    """
    if recipe.out is not None:
        folder = Path(recipe.out)
        if not resume and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RecipeError(f"{folder} is not empty; continue its run with --resume, or choose another --out.")
    else:
        folder = _numbered(Path("runs") / recipe.name, resume)
    if resume:
        _check_same(recipe, folder)
    return folder


def _numbered(base: Path, resume: bool) -> Path:
    """Return the first of base, base-2, base-3, ... that is free, or the last that is taken."""
    number, free = 1, base
    while free.exists():
        number, free = number + 1, base.with_name(f"{base.name}-{number + 1}")
    if not resume or number == 1:
        return free
    return base if number == 2 else base.with_name(f"{base.name}-{number - 1}")


def _check_same(recipe: Recipe, folder: Path) -> None:
    path = folder / RECIPE
    if not path.exists():
        if folder.is_dir() and all(file.name.startswith(".") for file in folder.iterdir()):
            return  # killed before its first file was whole
        raise RecipeError(f"{folder} holds no run to resume ({RECIPE} is missing); run without --resume.")
    before = load(path)
    if before.hash != recipe.hash:
        old, new = flat(before.model_dump(mode="json")), flat(recipe.model_dump(mode="json"))
        keys = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
        told = [key for key in keys if key != "out" and not key.startswith("track.")]
        rows = [f"{k}: {old.get(k)!r} there, {new.get(k)!r} here" for k in told]
        raise RecipeError(
            f"{folder} was made by another recipe, and a run continues only unchanged:\n  " + "\n  ".join(rows)
        )


def write_recipe(recipe: Recipe, folder: Path) -> None:
    """Write the resolved recipe (every default filled in) to the folder."""
    text = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(recipe.model_dump(mode="json"), text)
    head = f"# every value of this run, defaults filled in; hash {recipe.hash}\n"
    atomic_write(folder / RECIPE, (head + text.getvalue()).encode())


def tracked(folder: Path) -> Track:
    """Return where the run in ``folder`` is copied to, as its recipe says (``mlflow`` None: what MLflow is set to)."""
    path = folder / RECIPE
    track = load(path).track if path.exists() else Track()
    return track.model_copy(update={"mlflow": None}) if track.mlflow == "env" else track


def complete(folder: Path) -> bool:
    """Return whether the run in ``folder`` went to its end."""
    records = folder / RECORDS
    return records.exists() and any(record.stage == "end" for record in read(records))
