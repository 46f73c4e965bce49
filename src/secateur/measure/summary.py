"""A model as a table: every module that holds parameters, its output shape and its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from secateur.graph.state import eval_mode


@dataclass(frozen=True)
class Layer:
    """One module with parameters of its own: path, class, shape of its output, number of parameters."""

    name: str
    kind: str
    output: tuple[int, ...]
    params: int


def layers(model: nn.Module, inputs: torch.Tensor) -> tuple[Layer, ...]:
    """Return the modules that hold parameters, in the order of their names; one forward pass on ``inputs``.

    A parameter that several modules share counts at the first one.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    handles = []
    for name, module in model.named_modules():

        def note(module: nn.Module, args: object, output: object, name: str = name) -> None:
            first = output[0] if isinstance(output, tuple | list) and output else output
            if isinstance(first, torch.Tensor):
                shapes.setdefault(name, tuple(first.shape))

        handles.append(module.register_forward_hook(note))
    try:
        with eval_mode(model), torch.no_grad():
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    seen: set[int] = set()
    rows = []
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen |= {id(p) for p in own}
        if own:
            rows.append(Layer(name, type(module).__name__, shapes.get(name, ()), sum(p.numel() for p in own)))
    return tuple(rows)


def table(rows: tuple[Layer, ...], totals: Mapping[str, int]) -> str:
    """Return the layers as text, with the ``totals`` below.

    >>> print(table((Layer("fc", "Linear", (1, 3), 9),), {"params": 9}).splitlines()[2])
    fc                               Linear             (1, 3)                            9
    """
    lines = [f"{'layer':<32} {'class':<18} {'output':<20} {'parameters':>14}", "-" * 87]
    lines += [f"{r.name or '(model)':<32} {r.kind:<18} {r.output!s:<20} {r.params:>14,}" for r in rows]
    lines += ["-" * 87, *(f"{name:<72} {value:>14,}" for name, value in totals.items())]
    return "\n".join(lines) + "\n"
