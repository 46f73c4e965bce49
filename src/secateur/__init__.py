"""secateur: prune any PyTorch model, prove the cut, measure what it bought, ship the file.

>>> import torch, secateur as sc
>>> net = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
>>> sc.prune(net, torch.rand(1, 4), keep=0.5)[0]
Linear(in_features=4, out_features=32, bias=True)
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur import criteria, runtime
    from secateur.allocate import allocate
    from secateur.checkpoint import load, save
    from secateur.compact import compact, compact_optimizer
    from secateur.granularity import units
    from secateur.graph.groups import trace
    from secateur.graph.verify import verify
    from secateur.mask import mask_, unmask_
    from secateur.models.build import build
    from secateur.prune import prune
    from secateur.score import score
    from secateur.types import Budget, Graph, Group, Measurement, Plan, Proof, Scores, SecateurError

# name -> where it lives; loaded on first use, so that `secateur --help` does not wait for torch
_HOMES = {
    "Budget": "secateur.types",
    "Graph": "secateur.types",
    "Group": "secateur.types",
    "Measurement": "secateur.types",
    "Plan": "secateur.types",
    "Proof": "secateur.types",
    "Scores": "secateur.types",
    "SecateurError": "secateur.types",
    "allocate": "secateur.allocate",
    "build": "secateur.models.build",
    "compact": "secateur.compact",
    "compact_optimizer": "secateur.compact",
    "load": "secateur.checkpoint",
    "mask_": "secateur.mask",
    "prune": "secateur.prune",
    "save": "secateur.checkpoint",
    "score": "secateur.score",
    "trace": "secateur.graph.groups",
    "units": "secateur.granularity",
    "unmask_": "secateur.mask",
    "verify": "secateur.graph.verify",
}

__all__ = [
    "Budget",
    "Graph",
    "Group",
    "Measurement",
    "Plan",
    "Proof",
    "Scores",
    "SecateurError",
    "allocate",
    "build",
    "compact",
    "compact_optimizer",
    "criteria",
    "load",
    "mask_",
    "prune",
    "runtime",
    "save",
    "score",
    "trace",
    "units",
    "unmask_",
    "verify",
]


class _Package(types.ModuleType):
    """The package as an object: public names win over submodules of the same name (``sc.score``, ``sc.prune``)."""

    def __getattribute__(self, name: str) -> Any:
        home = _HOMES.get(name)
        if home is not None:
            return getattr(importlib.import_module(home), name)
        return super().__getattribute__(name)

    def __getattr__(self, name: str) -> Any:
        if name in ("criteria", "runtime"):
            return importlib.import_module(f"secateur.{name}")
        raise AttributeError(f"secateur has no {name!r}; public names: {', '.join(__all__)}")


sys.modules[__name__].__class__ = _Package
