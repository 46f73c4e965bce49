"""Cuts that zero: kernels and single weights go as masks on a model that keeps its shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from secateur.checkpoint import save
from secateur.fold import Folded, fold
from secateur.folder import COMPACT
from secateur.granularity import left, masks
from secateur.measure.latency import compare, describe
from secateur.session import Run, costs, traced
from secateur.train.held import astray
from secateur.types import Check, Graph, Measurement, Plan, Proof, Scores, VerificationError


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


def proved(graph: Graph, plan: Plan, kind: str = "masked") -> Proof:
    """Return one row per masked tensor of ``graph.model``: its largest masked weight, which must be exactly 0.

    Raises ``VerificationError`` naming the tensors where it is not.
    """
    values = astray(graph.model, masks(graph, plan)) if plan.keep else {}
    rows = tuple(Check(name, kind, value, 0.0, value == 0) for name, value in values.items())
    wrong = [row.group for row in rows if not row.ok]
    if wrong:
        raise VerificationError(
            f"masked weights of {', '.join(wrong)} are not zero: something wrote to them after the mask was set; "
            "train inside secateur.train.held.held, and report it if a run did this."
        )
    return Proof(rows)


def unmasked(run: Run, model: nn.Module) -> list[Measurement]:
    """Return how many parameters and multiply-accumulates the masks on ``model`` leave; all of the dense model's."""
    masked = run.plan.keep and model is not run.dense.model
    params, macs = left(run.dense, run.plan if masked else Plan(run.dense.fingerprint, (), "kernel"))
    device, count = describe(run.example.device), len(run.example)
    return [
        Measurement("unmasked params", params, "params", 1, 0.0, device, "counted from the masks"),
        Measurement("unmasked macs", round(macs / count), "macs", 1, 0.0, device, "theory: dense kernels skip no zero"),
    ]


def told(run: Run, model: nn.Module) -> list[str]:
    """Return what a reader of the latencies of a masked model must know."""
    params, all_params = (unmasked(run, net)[0].value for net in (model, run.dense.model))
    if params == all_params:
        return []
    return [
        f"MASKS SAVE NO TIME AND NO MEMORY: {1 - params / all_params:.1%} of the parameters are zero, and are stored "
        "and multiplied all the same. Latencies are those of dense kernels; the fewer multiply-accumulates are theory."
    ]


def compacted(run: Run, model: nn.Module, extra: Mapping[str, Any]) -> Folded:
    """Take out of ``model`` what its masks left idle; record that and write the smaller model, if there is one."""
    found = fold(traced(model, run.data))
    rows: list[Measurement] = []
    device = describe(run.example.device)
    if found.plans:
        how = "counted from the traced graph"
        counted = costs(traced(found.model, run.data)).items()
        rows = [Measurement(name, value, name, 1, 0.0, device, how) for name, value in counted]
        save(found.model, run.folder / COMPACT, measurements=rows, recipe=run.recipe.hash, extra=extra)
        for size in run.recipe.measure.batch_sizes:
            inputs = run.data.batch(run.data.train[torch.arange(size) % len(run.data.train)])[0]
            rows += compare(run.dense.model, found.model, inputs, repeats=run.recipe.measure.repeats)[1:]
    stays = [{"group": name, "units": units, "why": why} for name, units, why in found.stays]
    run.log.append(
        "folded",
        removed=found.removed,
        stays=stays,
        error=found.error,
        validation=run.quality(found.model).figures(),
        measurements=[asdict(row) for row in rows],
    )
    gone, left_over = sum(found.removed.values()), sum(row["units"] for row in stays)
    params = f"{rows[0].value:,} parameters are left in {COMPACT}" if rows else f"there is no {COMPACT}"
    run.screen.line(
        f"{gone} units that the masks left idle are taken out, {params}"
        + (f"; {left_over} idle ones stay: {stays[0]['why']}" if stays else "")
    )
    return found
