"""One cut: what goes, by the options of a recipe, and the proof that it may."""

from __future__ import annotations

from glob import escape

from torch import nn

from secateur import during, resolve
from secateur.allocate import allocate as choose
from secateur.allocate import matching
from secateur.compact import compact
from secateur.graph.verify import check_compact, verify
from secateur.mask import masked
from secateur.recipe import Recipe
from secateur.types import Budget, Graph, Plan, Proof, Scores, VerificationError


def allocate(recipe: Recipe, dense: Graph, scores: Scores, budget: Budget) -> Plan:
    """Call ``allocate`` with the options of the recipe.

    Name patterns are matched on the dense graph.  Fractions in ``keep`` are of the dense model and reached by
    the first cut; later cuts leave these groups as they are.  Where the schedule has a keep of its own, every group
    keeps that fraction of its present units, rounded down, and the budget is only what they come to.
    """
    prune, graph = recipe.prune, scores.graph
    present = {group.name for group in graph.groups}
    first = graph is dense
    fixed = [escape(name) for name in matching(dense, tuple(prune.keep)) if name in present]
    whole = [name for name in matching(dense, prune.freeze) if name in present]
    frozen = [escape(name) for name in whole]
    keep = prune.keep if first else dict.fromkeys(fixed, 1.0)
    if prune.schedule.keep is not None:
        budget, shares = during.event(graph.groups, prune.schedule.keep, whole)
        keep = {escape(name): share for name, share in shares.items()}
    return choose(
        scores,
        budget,
        resolve.allocation(recipe, dense),
        round_to=prune.round_to,
        min_units=prune.min_units,
        exact_only=prune.exact_only,
        keep=keep,
        freeze=prune.freeze if first else frozen,
    )


def proved(graph: Graph, plan: Plan, *, joint: bool = False) -> tuple[Proof, nn.Module]:
    """Cut, after the permutation proof of the groups that are cut, and compare masked with compact.

    ``joint`` permutes all groups in one run.  Raises ``VerificationError`` naming the groups that fail.
    """
    rows = verify(graph, [name for name, _, _ in plan.keep], joint=joint).rows if plan.keep else ()
    wrong = [row.group for row in rows if not row.ok]
    if wrong:
        raise VerificationError(
            f"permuting the units of {', '.join(wrong)} changes the output, so they must not be cut; "
            "freeze them (prune.freeze) and report the model."
        )
    small = compact(graph, plan, verify=False)
    with masked(graph, plan):
        rows = (*rows, check_compact(graph, plan, small)) if plan.keep else rows
    return Proof(rows), small
