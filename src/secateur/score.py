"""Scores: collect the evidence that a criterion declares in one pass, then apply it to each group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.criteria.evidence import COSTS, DATA, SLICES, Criterion, Evidence, Slice, unit_slices
from secateur.criteria.gather import REDUCTIONS, Loss, Pass, Rows, gather
from secateur.criteria.riding import Sums
from secateur.granularity import MASKED, unit_shares
from secateur.measure.counts import Counter
from secateur.types import Graph, Group, PlanError, Scores


def score(
    graph: Graph,
    criterion: Criterion,
    batches: Iterable[Any] | None = None,
    *,
    loss: Loss | None = None,
    reduction: str = "mean",
    samples: int | None = None,
    sums: Sums | None = None,
) -> Scores:
    """Return the scores of every prunable group.

    ``batches`` yields (inputs, targets), or anything that ``loss(model, batch)`` understands; ``loss``
    returns the scalar loss of the batch (``reduction`` says whether it is the ``mean`` or the ``sum``
    over its samples) or one loss per sample (n,).  Default: cross-entropy of ``model(inputs)`` against
    ``targets``.  ``samples`` stops the pass after that many samples.  ``sums`` that ``criteria.riding`` gathered for
    this criterion during training stand for a pass.  The pass runs in eval mode and
    leaves parameters, buffers, ``.grad``, modes and random state as they were; float32 (samples, units)
    is held per name of evidence, of contributions only sums and maxima (units,).

    Unit evidence is read at ``group.sites``.  For consumers without a site (raw weights used in functions)
    the identity sum of w * dL/dw over their weights = sum of a * dL/da is added; it is exact for the batch
    but not per sample: each sample counts with the mean of its batch.

    Raises ``PlanError`` when the criterion needs batches that are not there, or when a loss is not finite.
    """
    groups = [group for group in graph.groups if group.prunable]
    names = criterion.evidence
    rows: dict[str, Rows] = {}
    gathered = sums is not None and bool(names & DATA)
    if gathered and sums is not None and not sums.samples:
        raise PlanError("sums holds no samples: no training step was watched.")
    if names & DATA and not gathered:
        if batches is None:
            raise PlanError(f"{criterion!r} needs data; pass sc.score(graph, criterion, batches).")
        if reduction not in REDUCTIONS:
            raise PlanError(f"score(reduction=...) is one of {', '.join(REDUCTIONS)}; got {reduction!r}.")
        how = Pass(loss or cross_entropy, reduction, samples)
        rows = gather(graph, names & DATA, batches, how)
    costs = _unit_costs(graph, names & COSTS)
    tensors = dict(graph.model.named_parameters())
    values = {}
    for number, group in enumerate(graph.groups):
        parts = rows.get(group.name, {})
        total = sums.values.get(group.name) if sums is not None and gathered else None
        parts = sums.streamed.get(group.name, parts) if sums is not None and gathered else parts
        if not group.prunable or (names & DATA and not parts and total is None):
            continue  # frozen, or never seen in the pass
        found: dict[str, Any] = dict(_slices(group, names, tensors))
        found |= parts
        found |= {kind: torch.full((group.units,), saved[number]) for kind, saved in costs.items()}
        evidence = Evidence(group.name, torch.arange(group.units), **found)
        if criterion.applies(evidence):
            mean = None if total is None or sums is None else total / sums.samples
            values[group.name] = criterion(evidence) if mean is None else criterion.finish(mean, evidence)
    if not values:
        raise PlanError(f"{criterion!r} applies to none of the {len(groups)} prunable groups; see print(graph).")
    return Scores(graph, repr(criterion), values)


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Return the mean cross-entropy of a batch (inputs, targets); raises ``PlanError`` for other batches."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise PlanError(
            f"the default loss takes batches (inputs, targets); got {type(batch).__name__}. "
            "Pass loss=lambda model, batch: ... for anything else."
        )
    output = model(batch[0])
    return nn.functional.cross_entropy(getattr(output, "logits", output), batch[1])


def _slices(group: Group, names: frozenset[str], tensors: Mapping[str, Tensor]) -> dict[str, tuple[Slice, ...]]:
    """Return the weights of ``group`` under the names of evidence that are asked for."""
    found = {}
    for name in names & SLICES.keys():
        members = [m for m in group.members if m.role in SLICES[name] and m.tensor in tensors]
        weights = [(m, tensors[m.tensor].detach()) for m in members if tensors[m.tensor].is_floating_point()]
        found[name] = tuple(Slice(m.tensor, m.role, unit_slices(m, weight)) for m, weight in weights)
    return found


def _unit_costs(graph: Graph, kinds: frozenset[str]) -> dict[str, np.ndarray]:
    """Return per kind the fraction of the model that one unit of each group (G,) costs."""
    if not kinds:
        return {}
    if graph.groups and graph.groups[0].granularity in MASKED:
        return {kind: unit_shares(graph, kind) for kind in kinds}
    counter = Counter.of(graph)
    dense = np.array([float(group.units) for group in graph.groups])
    fewer = dense - np.eye(len(dense))
    return {kind: 1 - counter(kind, fewer) / max(float(counter(kind, dense)), 1.0) for kind in kinds}
