"""The chain in one call."""

from __future__ import annotations

from typing import Any

from torch import nn

from secateur.allocate import allocate
from secateur.compact import compact
from secateur.criteria import Magnitude
from secateur.graph.groups import trace
from secateur.score import score
from secateur.types import Budget


def prune(model: nn.Module, example_inputs: Any, keep: float | Budget = 0.5, **options: Any) -> nn.Module:
    """Return a smaller copy of ``model``: trace, magnitude scores, allocate, compact, verified.

    ``keep`` is the fraction of multiply-accumulates that stays, or a ``Budget``.  ``options`` go to ``allocate``
    (``allocation``, ``round_to``, ``min_units``, ``exact_only``, ``keep`` patterns as ``keep_groups``, ``freeze``).

    Raises what the stages raise: ``TraceError``, ``PlanError``, ``VerificationError``.

    >>> import torch, secateur as sc
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    >>> sc.prune(net, torch.rand(1, 4), keep=0.5)[2]
    Linear(in_features=32, out_features=2, bias=True)
    """
    graph = trace(model, example_inputs)
    budget = keep if isinstance(keep, Budget) else Budget(macs=keep)
    if "keep_groups" in options:
        options["keep"] = options.pop("keep_groups")
    plan = allocate(score(graph, Magnitude()), budget, options.pop("allocation", "global"), **options)
    return compact(graph, plan)
