"""Cuts that zero: kernels and single weights go as masks on a model that keeps its shape."""

from __future__ import annotations

import torch

from secateur.granularity import masks
from secateur.train.held import astray
from secateur.types import Check, Graph, Plan, Proof, Scores, VerificationError


def fallen(scores: Scores, done: Plan) -> Scores:
    """Return ``scores`` with the units that ``done`` masked below all others, so that what went stays away."""
    if not done.keep:
        return scores
    lowest = min(float(values.min()) for values in scores.values.values())
    below = lowest - max(1.0, abs(lowest))
    values = dict(scores.values)
    for name, _, indices in done.keep:
        if name in values:
            stays = torch.zeros(len(values[name]), dtype=torch.bool, device=values[name].device)
            stays[torch.as_tensor(indices, device=stays.device)] = True
            values[name] = values[name].masked_fill(~stays, below)
    return Scores(scores.graph, scores.criterion, values)


def proved(graph: Graph, plan: Plan) -> Proof:
    """Return one row per masked tensor of ``graph.model``: its largest masked weight, which must be exactly 0.

    Raises ``VerificationError`` naming the tensors where it is not.
    """
    rows = tuple(
        Check(name, "masked", value, 0.0, value == 0) for name, value in astray(graph.model, masks(graph, plan)).items()
    ) if plan.keep else ()
    wrong = [row.group for row in rows if not row.ok]
    if wrong:
        raise VerificationError(
            f"masked weights of {', '.join(wrong)} are not zero: something wrote to them after the mask was set; "
            "train inside secateur.train.held.held, and report it if a run did this."
        )
    return Proof(rows)
