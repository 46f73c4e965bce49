"""One steered model at several budgets: which bias on its values makes it compute so much."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from secateur.runtime.gates import Steered
from secateur.runtime.gates.cost import Meter, meter
from secateur.runtime.macs import spent
from secateur.types import PlanError

REACH = 64.0  # values are sums of rewards: a bias beyond this decides alone
STEPS = 20


def bias_for(model: Steered, inputs: Iterable[Tensor], budget: float) -> float:
    """Return the largest bias at which ``model`` computes at most ``budget`` of its multiply-accumulates.

    ``inputs`` are batches (B, C, H, W) on which the mean is taken, those of a validation set; the work of the
    controller counts.  The mean grows with the bias nearly always, so it is found by bisection.  The model keeps the
    bias that it has.  Raises ``PlanError`` when the first group of every layer alone is more than the budget.

    >>> import torch
    >>> from secateur.models.s0 import s0
    >>> from secateur.runtime.gates import gate
    >>> from secateur.runtime.gates.rnp import controller_for
    >>> x = torch.rand(8, 3, 8, 8)
    >>> inner = gate(s0(image_size=8), None, x).model
    >>> bias_for(Steered(inner, controller_for(inner, 4, 4)), [x], 1.0)
    64.0
    """
    batches = list(inputs)
    count = meter(model, batches[0])

    def share(bias: float) -> float:
        return float(_at(model, bias, count, batches).mean()) / count.dense

    if share(REACH) <= budget:
        return REACH
    low, high = -REACH, REACH
    if (least := share(low)) > budget:
        raise PlanError(
            f"the first groups alone are {least:.1%} of the work of the whole model, the budget is {budget:.1%}; give "
            " a larger budget, or train with more groups."
        )
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) <= budget else (low, middle)
    return low


def _at(model: Steered, bias: float, count: Meter, batches: Iterable[Tensor]) -> Tensor:
    before = model.bias
    try:
        model.bias = bias
        return spent(model, count, batches)
    finally:
        model.bias = before
