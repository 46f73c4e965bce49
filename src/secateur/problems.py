"""What is wrong with a recipe, said so that it can be mended: place, key, value, rule, nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from secateur.yaml_source import Path


def schema_problems(schema: type[BaseModel], values: Any, error: ValidationError) -> dict[Path, str]:
    """Return path -> rule for each value that the schema refuses (the branches of a union are joined)."""
    found: dict[Path, list[str]] = {}
    for item in error.errors(include_url=False):
        path = _inside(values, item["loc"], keep=item["type"] == "missing")
        found.setdefault(path, []).append(_rule(schema, path, item))
    return {path: " or ".join(dict.fromkeys(rules)) for path, rules in found.items()}


def _inside(values: Any, loc: tuple[str | int, ...], keep: bool) -> Path:
    """Return the part of ``loc`` that exists in the recipe (pydantic adds the names of union branches)."""
    path: list[str | int] = []
    for key in loc:
        try:
            values = values[key]
        except (KeyError, IndexError, TypeError):
            return (*path, key) if keep else tuple(path)
        path.append(key)
    return tuple(path)


def _rule(schema: type[BaseModel], path: Path, item: Any) -> str:
    """Return one sentence for an error of pydantic."""
    if item["type"] == "extra_forbidden":
        return f"unknown key{nearest(str(path[-1]), _fields(schema, path[:-1]))}"
    if item["type"] == "missing":
        return "this key is required"
    message = str(item["msg"]).replace("Input should be", "must be").removeprefix("Value error, ")
    expected = str(item.get("ctx", {}).get("expected", ""))
    near = nearest(str(item["input"]), expected.replace(" or ", ", ").replace("'", "").split(", "), bare=True)
    return message[:1].lower() + message[1:] + near


def _fields(schema: type[BaseModel], path: Path) -> list[str]:
    """Return the keys of the section at ``path``."""
    section: Any = schema
    for key in path:
        inner = getattr(section, "model_fields", {}).get(key)
        section = inner.annotation if inner else None
        section = next((kind for kind in get_args(section) if hasattr(kind, "model_fields")), section)
    return list(getattr(section, "model_fields", {}))


def at(values: Any, path: Path) -> Any:
    """Return the value at ``path``, None where there is none."""
    for key in path:
        try:
            values = values[key]
        except (KeyError, IndexError, TypeError):
            return None
    return values


def nearest(name: str, names: Iterable[str], bare: bool = False) -> str:
    """Return ``; did you mean 'x'?`` for the nearest name, else all names (nothing when ``bare``)."""
    names = list(names)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if near and near[0] != name:
        return f"; did you mean {near[0]!r}?"
    return "" if bare or not names else f"; known: {', '.join(names)}"


def listing(where: str, values: Any, places: Mapping[Path, str], problems: Mapping[Path, str]) -> str:
    """Return all problems, one a line, in the order of the file."""
    order = {path: number for number, path in enumerate(places)}
    lines = []
    for path, rule in problems.items():
        near = path
        while near and near not in places:
            near = near[:-1]
        value = at(values, path) if path else None
        key = ".".join(map(str, path)) or "recipe"
        text = f"{places.get(near, where)}: {key}{'' if value is None else f' = {shown(value)}'}: {rule}"
        lines.append((order.get(near, 0), text if text.endswith("?") else f"{text.rstrip('.')}."))
    count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
    return "\n  ".join([f"the recipe {where} has {count}:", *(text for _, text in sorted(lines))])


def shown(value: Any) -> str:
    """Return a short form of ``value`` for a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
