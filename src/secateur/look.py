"""What can be cut in a model: the text of `secateur inspect`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from secateur.checkpoint import load, read_header
from secateur.graph.groups import trace
from secateur.graph.verify import verify
from secateur.measure import counts
from secateur.models import MODELS
from secateur.models.build import build
from secateur.types import RecipeError
from secateur.yaml_source import parse

IMAGE = (1, 3, 224, 224)
SUFFIX = ".safetensors"


def look(
    model: str,
    arguments: Sequence[str] = (),
    shape: str | None = None,
    *,
    integers: bool = False,
    proof: bool = False,
    trust: Iterable[str] = (),
) -> str:
    """Return the table of groups of a model (a build spec or a checkpoint), its parameters and MACs."""
    given = _arguments(arguments)
    if model.endswith(SUFFIX):
        network = load(Path(model), trust=trust)
    else:
        network = build(model, **given)
    sizes = _sizes(shape) if shape else _fitting(model, given)
    torch.manual_seed(0)
    inputs = torch.randint(0, 2, sizes) if integers else torch.rand(sizes)
    graph = trace(network, inputs)
    figures = f"{counts.params(graph):,} parameters, {counts.macs(graph):,} MACs for input {tuple(sizes)}"
    return "\n".join([str(graph), figures, *([str(verify(graph))] if proof else [])])


def _arguments(texts: Sequence[str]) -> dict[str, Any]:
    given = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise RecipeError(f"argument {text!r} must be key=value, for example num_classes=10.")
        given[key] = parse(value, f"argument {key}")[0]
    return given


def _sizes(text: str) -> list[int]:
    parts = text.replace("x", ",").split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise RecipeError(f"--input-shape {text!r} must be whole numbers, for example 1,3,224,224.")
    return [int(part) for part in parts]


def _fitting(model: str, given: dict[str, Any]) -> Sequence[int]:
    """Return the shape of one image: what the checkpoint or the builder says, else 224 x 224 in colour."""
    if model.endswith(SUFFIX):
        form: Any = read_header(model).extra.get("input") or {}
        return 1, *form.get("shape", IMAGE[1:])
    if model not in MODELS:
        return IMAGE
    options = {name: option.default for name, option in inspect.signature(MODELS[model]).parameters.items()}
    options |= given
    size = options["image_size"]
    return 1, options["in_channels"], *([size, size] if isinstance(size, int) else size)
