"""One steered model at several budgets: which bias on its values makes it compute so much."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from secateur.graph.state import eval_mode
from secateur.runtime.gates import Steered
from secateur.runtime.gates.cost import Meter, meter
from secateur.runtime.macs import spent
from secateur.types import PlanError

STEPS = 12  # halvings of the range in which the bias lies


def bias_for(model: Steered, inputs: Iterable[Tensor], budget: float) -> float:
    """Return the largest bias at which ``model`` computes at most ``budget`` of the work of its whole network.

    ``inputs`` are batches (B, C, H, W) on which the mean is taken, those of a validation set.  The work of the
    controller counts, the network without one is the whole.  The mean grows with the bias nearly always, so it is
    found by bisection, to a 4,096th of its range: twice the widest gap between the values of a decision, beyond which
    the bias decides alone.  The model keeps the bias that it has.

    Raises ``PlanError`` when the first group of every layer alone is more than the budget.

    >>> from secateur.models.s0 import s0
    >>> from secateur.runtime.gates import gate
    >>> from secateur.runtime.gates.rnp import controller_for
    >>> x = torch.rand(8, 3, 8, 8)
    >>> inner = gate(s0(image_size=8), None, x).model
    >>> steered = Steered(inner, controller_for(inner, 4, 4))
    >>> bias_for(steered, [x], 0.8) <= bias_for(steered, [x], 1.0)
    True
    """
    batches = list(inputs)
    count, whole = meter(model, batches[0]), meter(model.model, batches[0]).dense

    def share(bias: float) -> float:
        return float(_at(model, bias, count, batches).mean()) / whole

    reach = 2 * _gap(model, batches[0]) + 1e-6
    if share(reach) <= budget:
        return reach
    low, high = -reach, reach
    if (least := share(low)) > budget:
        raise PlanError(
            f"the first groups alone are {least:.1%} of the work of the whole model, the budget is {budget:.1%}; give "
            "a larger budget, or train with more groups."
        )
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) <= budget else (low, middle)
    return low


def _gap(model: Steered, inputs: Tensor) -> float:
    """Return the widest gap between the values of one decision about one of ``inputs``."""
    gaps: list[float] = []

    def look(module: nn.Module, args: object, values: Tensor) -> None:
        gaps.append(float((values.amax(1) - values.amin(1)).max()))

    handle = model.controller.decoder.register_forward_hook(look)
    try:
        with eval_mode(model), torch.no_grad():
            model(inputs)
    finally:
        handle.remove()
    return max(gaps)


def _at(model: Steered, bias: float, count: Meter, batches: Iterable[Tensor]) -> Tensor:
    before = model.bias
    try:
        model.bias = bias
        return spent(model, count, batches)
    finally:
        model.bias = before
