"""Models, plans and comparisons that the checkpoint tests share."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import secateur as sc
from secateur.header import KEY, canonical
from secateur.types import Graph, Plan


class Tied(nn.Module):
    """Embedding and head share one matrix; a temporary buffer decides the output; a cache appears later."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("offset", torch.zeros(7), persistent=False)
        self.register_buffer("cache", None, persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(tokens)) + self.offset


def net(width: int = 6, activation: str = "relu") -> nn.Module:
    """A factory with options, importable as ``stored:net``."""
    return nn.Sequential(
        nn.Linear(4, width), nn.GELU() if activation == "gelu" else nn.ReLU(), nn.Linear(width, 3)
    )


def every_second(graph: Graph) -> Plan:
    """Keep units 0, 2, 4, ... of every prunable group."""
    keep = tuple((g.name, g.units, tuple(range(0, g.units, 2))) for g in graph.groups if g.prunable)
    return Plan(graph.fingerprint, keep)


def halved(model: nn.Module, *inputs: Any) -> nn.Module:
    """The compacted model of ``every_second``."""
    graph = sc.trace(model, inputs)
    return sc.compact(graph, every_second(graph))


def outputs(model: nn.Module, *inputs: Any) -> list[torch.Tensor]:
    """Every tensor the model returns, in eval mode."""
    with torch.no_grad():
        return _tensors(model.eval()(*inputs))


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    """True when both lists hold equal tensors, and at least one."""
    return len(left) == len(right) > 0 and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def edited(path: Path, edit: Callable[[dict[str, Any]], Any], sign: bool = True) -> Path:
    """Rewrite the secateur header of a checkpoint, by default signed again, as a skilled stranger would."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    outer = json.loads(raw[8 : 8 + length])
    fields = json.loads(outer["__metadata__"][KEY])
    digest = fields.pop("digest")
    edit(fields)
    fields["digest"] = hashlib.sha256(canonical(fields).encode()).hexdigest() if sign else digest
    outer["__metadata__"][KEY] = canonical(fields)
    text = json.dumps(outer).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    return path
