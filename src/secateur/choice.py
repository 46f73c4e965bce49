"""A name that stands for several recipes: ``recipes/s1`` for ``recipes/s1_*.yaml``, one of which is chosen.

The dataset decides: given as ``data.name=...`` on the command line, or asked for in a terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from secateur.recipe import load
from secateur.types import RecipeError

FIRST = ("mnist", "fashion_mnist", "cifar10", "cifar100")  # numbers 1 to 4, as in the reference system's question
Ask = Callable[[str], str]


def chosen(path: Path, overrides: Sequence[str], ask: Ask | None) -> Path:
    """Return ``path``, or the recipe that it stands for; ``ask`` shows a question and returns the answer (None: nobody
    is there to answer).

    Raises ``RecipeError`` where nothing decides, or the answer is none of the choices.
    """
    base = path.with_suffix("") if path.suffix in (".yaml", ".yml") else path
    files = [] if path.exists() else sorted(base.parent.glob(f"{base.name}_*.yaml"))
    recipes = {name: file for file in files if file.stem == f"{base.name}_{(name := load(file).data.name)}"}
    if not recipes:
        return path
    names = sorted(recipes, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))
    given = [word.partition("=")[2].strip() for word in overrides if word.partition("=")[0].strip() == "data.name"]
    rows = "\n".join(f"  {number}  {name:<14} {recipes[name]}" for number, name in enumerate(names, 1))
    about = f"{path} stands for {len(names)} recipes:\n{rows}"
    if not given and ask is None:
        raise RecipeError(
            f"{about}\nname one of these files, or give data.name={names[0]} (there is no terminal to ask)."
        )
    answer = (
        given[-1] if given or ask is None else ask(f"{about}\nWhich dataset (1 to {len(names)}, or its name)?").strip()
    )
    numbered = {str(number): name for number, name in enumerate(names, 1)}
    name = answer if given else numbered.get(answer, answer)
    if name not in recipes:
        raise RecipeError(f"{answer!r} is none of the datasets of {path}: {', '.join(names)}.")
    return recipes[name]
