"""Unit ids as one line of text: a letter per position, the same letter for the same unit.

``.`` is a position that can't go (no unit, or a frozen one), ``-`` an axis without units.  Letters start anew at
``a`` for each model and follow the parameters in order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from secateur.types import Graph

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def letters(graph: Graph) -> dict[str, str]:
    """Return for each parameter its axes, joined by ``|``."""
    free = {g.offset + k for g in graph.groups if g.prunable for k in range(g.units)}
    seen: dict[int, str] = {}
    out = {}
    for name, axes in graph.axes.items():
        parts = []
        for ids in axes:
            if ids is None:
                parts.append("-")
                continue
            text = ""
            for unit in ids.tolist():
                if unit in free and unit not in seen:
                    seen[unit] = LETTERS[len(seen)]
                text += seen[unit] if unit in free else "."
            parts.append(text)
        out[name] = "|".join(parts)
    return out


class Between(nn.Module):
    """x times ``a`` -> n units -> ``run`` -> times ``c`` -> 2 outputs; further parameters go to ``run``."""

    def __init__(self, kind: str, n: int, run: Callable[..., Tensor], shapes: tuple[tuple[int, ...], ...]) -> None:
        super().__init__()
        self.kind, self.run = kind, run
        torch.manual_seed(0)
        self.a = nn.Parameter(torch.randn(n, 3))
        for k, shape in enumerate(shapes):
            self.register_parameter("pqrs"[k], nn.Parameter(torch.randn(shape)))
        self.more = [getattr(self, "pqrs"[k]) for k in range(len(shapes))]
        with torch.no_grad():
            width = self.run(self.first(self.example()), *self.more).shape[1 if kind == "maps" else -1]
        self.c = nn.Parameter(torch.randn(2, width))

    def example(self) -> Tensor:
        return torch.rand({"rows": (2, 3), "maps": (2, 3, 4, 4), "tokens": (2, 5, 3)}[self.kind])

    def first(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.a[:, :, None, None]) if self.kind == "maps" else F.linear(x, self.a)

    def forward(self, x: Tensor) -> Tensor:
        h = self.run(self.first(x), *self.more)
        return F.conv2d(h, self.c[:, :, None, None]) if self.kind == "maps" else F.linear(h, self.c)


def between(kind: str, n: int, run: Callable[..., Tensor], *shapes: tuple[int, ...]) -> tuple[str, str, Any]:
    """Return (units of the parameters as text, exactness of what is free, graph)."""
    model = Between(kind, n, run, shapes).double()
    graph = sc.trace(model, model.example().double())
    axes = letters(graph)
    text = " ".join([axes["a"].split("|")[0], *(axes["pqrs"[k]] for k in range(len(shapes))), axes["c"].split("|")[1]])
    free = [g for g in graph.groups if g.prunable]
    marks = {g.exact for g in free}
    return text, "".join("=" if m else "~" for m in sorted(marks, reverse=True)) or "frozen", graph
