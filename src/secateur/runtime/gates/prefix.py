"""Prefixes of ordered channel groups (Lin et al. 2017, RNP): an action per layer and sample says how many run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from secateur.runtime.gates.choice import Choice, Gate
from secateur.types import PlanError


class Prefix(Gate):
    """The first ``action`` of ``groups`` nested groups of channels are computed, group of c = floor(c groups / C).

    ``gain`` (C,) scales the normalised output, like the weight of the batch norm it comes from.  ``policy`` maps the
    input of the convolution to the actions (B,), integers in 1 .. groups; without one, everything is computed.
    """

    policy: Callable[[torch.Tensor], torch.Tensor] | None

    def __init__(self, after: int, groups: int = 4) -> None:
        super().__init__()
        if not 1 <= groups <= after:
            raise PlanError(f"{after} channels form 1 to {after} groups; got {groups}.")
        self.groups = groups
        self.gain = nn.Parameter(torch.ones(after))
        self.policy = None

    @property
    def sizes(self) -> list[int]:
        """How many channels each action computes, for actions 1 .. groups."""
        after = len(self.gain)
        return [-(-action * after // self.groups) for action in range(1, self.groups + 1)]

    def forward(self, x: torch.Tensor) -> Choice:
        """Return the gains and the prefix of each sample of ``x`` (B, C_in, ...)."""
        saliency = self.gain.expand(len(x), -1)
        if self.policy is None:
            return Choice(saliency, torch.ones_like(saliency, dtype=torch.bool))
        action = self.policy(x)
        if action.shape != (len(x),) or bool(((action < 1) | (action > self.groups)).any()):
            raise PlanError(f"a policy gives one action in 1 .. {self.groups} per sample; got {action.tolist()}.")
        group = torch.arange(saliency.shape[1], device=x.device) * self.groups // saliency.shape[1]
        return Choice(saliency, group < action.to(x.device)[:, None])

    def extra_repr(self) -> str:
        """Number of groups, for ``print(model)``."""
        return f"groups={self.groups}"


@contextlib.contextmanager
def acting(model: nn.Module, actions: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Give the gated layers named in ``actions`` fixed actions (B,) inside a ``with`` block; then as before.

    Raises ``PlanError`` for a path without a prefix gate.
    """
    gates = {path.rpartition(".")[0]: m for path, m in model.named_modules() if isinstance(m, Prefix)}
    strangers = sorted(set(actions) - set(gates))
    if strangers:
        raise PlanError(f"no prefix gate at {', '.join(strangers)}; there are gates at {', '.join(gates) or 'none'}.")
    before = {path: gates[path].policy for path in actions}
    try:
        for path, action in actions.items():
            gates[path].policy = lambda x, action=action: action
        yield
    finally:
        for path, policy in before.items():
            gates[path].policy = policy
