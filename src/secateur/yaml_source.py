"""YAML text as plain values, with the line and column of every key and item."""

from __future__ import annotations

from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from secateur.types import RecipeError

LIMIT = 1_000_000  # characters; a recipe is a page
DEPTH = 40

Path = tuple[str | int, ...]


class Mark(NamedTuple):
    """Where something stands: 1-based line and column."""

    line: int
    column: int


def parse(text: str, where: str) -> tuple[Any, dict[Path, Mark]]:
    """Return the value of one YAML document and the mark of each path in it.

    Safe types only; duplicate keys, aliases, tags of other types and several documents are refused.
    Raises ``RecipeError`` as ``where:line:column: what is wrong``.
    """
    if len(text) > LIMIT:
        raise RecipeError(f"{where}: {len(text)} characters; a recipe has at most {LIMIT}.")
    yaml = YAML(typ="safe", pure=True)
    try:
        root = yaml.compose(text)
        marks: dict[Path, Mark] = {}
        if root is not None:
            _walk(root, (), where, marks, set())
        return YAML(typ="safe", pure=True).load(text), marks
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problem = str(error.problem or error.context).split("\n", 1)[0]
        raise RecipeError(f"{where}{at}: this is not valid YAML: {problem}.") from error
    except RecursionError as error:
        raise RecipeError(f"{where}: nested too deeply; a recipe has at most {DEPTH} levels.") from error
    except (YAMLError, ValueError, TypeError, AttributeError, LookupError, AssertionError) as error:
        # the constructors of ruamel raise plain errors on malformed scalars, e.g. `!!int x` or `2001-99-99`
        raise RecipeError(f"{where}: this is not valid YAML: {str(error).split(chr(10), 1)[0]}.") from error


def _walk(node: Node, path: Path, where: str, marks: dict[Path, Mark], seen: set[int]) -> None:
    """Note the mark of ``node`` and of everything below it."""
    mark = Mark(node.start_mark.line + 1, node.start_mark.column + 1)
    marks.setdefault(path, mark)
    if id(node) in seen or len(path) > DEPTH:
        rule = "aliases (*name) are not supported" if id(node) in seen else f"at most {DEPTH} levels are allowed"
        raise RecipeError(f"{where}:{mark.line}:{mark.column}: {rule}; write the value out.")
    seen.add(id(node))
    if isinstance(node, MappingNode):
        for key, value in node.value:
            at = (*path, str(key.value))
            marks[at] = Mark(key.start_mark.line + 1, key.start_mark.column + 1)
            _walk(value, at, where, marks, seen)
    elif isinstance(node, SequenceNode):
        for number, value in enumerate(node.value):
            _walk(value, (*path, number), where, marks, seen)
