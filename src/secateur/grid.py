"""The cells of a sweep: every combination of the values of a grid and its arms, each a recipe of its own, checked."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from secateur.folder import RECIPE, choose
from secateur.recipe import Recipe, load
from secateur.types import RecipeError

LONGEST = 100  # characters of a folder's name
OPEN, CLOSED = "[{(", "]})"


@dataclass(frozen=True)
class Cell:
    """One point of the grid: its name, the recipe with the values of this point, its folder.

    ``source`` is the folder of the recipe that the grid was put over.
    """

    name: str
    recipe: Recipe
    folder: Path
    source: Path


def parse_grid(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return dotted key -> values of ``key=a,b,c`` texts; commas inside brackets and quotes do not separate.

    >>> parse_grid(["seed=0,1", "prune.freeze=[a, b],[]"])
    {'seed': ('0', '1'), 'prune.freeze': ('[a, b]', '[]')}
    """
    grid: dict[str, tuple[str, ...]] = {}
    for text in texts:
        key, equals, raw = (part.strip() for part in text.partition("="))
        values = tuple(part.strip() for part in _split(raw))
        if not key or not equals or not all(values):
            raise RecipeError(f"--grid {text!r} must be key=value,value,... , for example seed=0,1,2.")
        if key in grid or key == "out":
            why = "is given twice" if key in grid else "is made by the sweep, one folder for each cell"
            raise RecipeError(f"--grid {text!r}: {key} {why}.")
        if len(set(values)) < len(values):
            raise RecipeError(f"--grid {text!r}: a value is there twice.")
        grid[key] = values
    return grid


def parse_arms(texts: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Return the overrides of each arm: ``key=value`` words, spaces between them; those in brackets and quotes do not.

    >>> parse_arms(["name=none prune.schedule.keep=1", "prune.criterion={name: random}"])
    (('name=none', 'prune.schedule.keep=1'), ('prune.criterion={name: random}',))
    """
    arms = tuple(tuple(word for word in _split(text, " ") if word) for text in texts)
    for text, words in zip(texts, arms, strict=True):
        if not words or not all(word.partition("=")[1] for word in words):
            raise RecipeError(
                f"--arm {text!r} must be key=value words with spaces between them; values with spaces go in brackets "
                "or quotes, for example 'name=random prune.criterion={name: random}'."
            )
    if len(set(arms)) < len(arms):
        raise RecipeError("an --arm is there twice.")
    return arms


def _split(text: str, separator: str = ",") -> list[str]:
    """Return the parts of ``text`` between the separators that are in no brackets and no quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in OPEN) - (letter in CLOSED)
        if letter == separator and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def cells(
    recipe: Path, grid: Sequence[str], folder: Path, overrides: Sequence[str] = (), arms: Sequence[str] = ()
) -> tuple[Cell, ...]:
    """Return every cell, checked: a recipe that loads, a folder that no other recipe has.

    Each of ``arms``, overrides that belong together, goes with every point of ``grid``.  Raises ``RecipeError`` that
    names the cell.
    """
    table, sides = parse_grid(grid), parse_arms(arms)
    if not table and not sides:
        raise RecipeError("a sweep needs at least one --grid key=value,value,... , for example --grid seed=0,1,2.")
    found: list[Cell] = []
    hashes: dict[str, str] = {}
    for side, *values in itertools.product(sides or ((),), *table.values()):
        words = [*side, *(f"{key}={value}" for key, value in zip(table, values, strict=True))]
        name = folder_name(words)
        chosen = load(recipe, [*overrides, *words])
        if chosen.hash in hashes:
            raise RecipeError(f"the cells {hashes[chosen.hash]} and {name} are the same recipe; leave one out.")
        hashes[chosen.hash] = name
        cell = Cell(name, chosen.model_copy(update={"out": str(folder / name)}), folder / name, recipe.resolve().parent)
        choose(cell.recipe, resume=(cell.folder / RECIPE).exists())
        found.append(cell)
    return tuple(found)


def folder_name(words: Sequence[str]) -> str:
    """Return a name for a cell that can be a folder: the last two parts of each key and the value.

    >>> folder_name(["prune.criterion.name=taylor", "seed=0"])
    'criterion.name=taylor,seed=0'
    """
    short = ",".join(".".join(word.partition("=")[0].split(".")[-2:]) + "=" + word.partition("=")[2] for word in words)
    safe = re.sub(r"[^A-Za-z0-9._=,+-]+", "_", short)
    if safe == short and len(safe) <= LONGEST:
        return safe
    digest = hashlib.sha256(",".join(words).encode()).hexdigest()[:8]  # keeps apart what looks alike now
    return f"{safe[:LONGEST]}-{digest}"
