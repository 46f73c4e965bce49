"""A commented recipe for `secateur init`, written from the schema itself."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel

from secateur.recipe import Recipe

HEAD = """\
# A recipe: one experiment of secateur. Run it with: secateur run {name}
# Every key is shown with its default; delete what you do not change. Unknown keys are refused.
# Any value can be set from the command line too: secateur run {name} train.lr=0.01
"""


def starter(name: str) -> str:
    """Return the YAML text of a recipe with every key, its default and what it means."""
    recipe = Recipe(version=1, name="first")
    return HEAD.format(name=name) + "\n".join(_lines(recipe, 0)) + "\n"


def _lines(section: BaseModel, depth: int) -> list[str]:
    indent = "  " * depth
    lines: list[str] = []
    for key, field in type(section).model_fields.items():
        value: Any = getattr(section, key)
        comment = f" # {field.description}" if field.description else ""
        if isinstance(value, BaseModel):
            if depth == 0:
                lines.append("")
            about = (type(value).__doc__ or "").strip().split("\n")[0]
            lines += [f"{indent}{key}: # {about}", *_lines(value, depth + 1)]
        else:
            plain = json.dumps(list(value) if isinstance(value, tuple) else value)
            lines.append(f"{indent}{key}: {plain}{comment}")
    return lines
