"""Runtime neural pruning (Lin et al., NIPS 2017): a controller looks at each map and says how many groups to compute.

One recurrent network walks over the layers of one forward pass: it reads the pooled input of a gated convolution
through an encoder of that layer's own, and answers with one value Q per number of groups.  The groups are nested, so
action i computes groups 1 to i.  Rewards are negative, so nothing follows the linear decoder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.runtime.gates.fbs import pooled as means
from secateur.runtime.gates.prefix import Prefix
from secateur.types import PlanError

LARGEST = 4096  # units of a controller's layers that a file may ask for


class Controller(nn.Module):
    """The decision network of section 3.2: an encoder per layer, a recurrent cell over the layers, a linear decoder.

    ``widths`` are the input channels of the layers that are decided about.  The cell is a GRU (the paper names an
    RNN and no size).

    >>> controller = Controller([8, 16], groups=4)
    >>> controller([torch.rand(3, 8), torch.rand(3, 16)]).shape
    torch.Size([3, 2, 4])
    """

    def __init__(self, widths: Sequence[int], groups: int = 4, embed: int = 64, hidden: int = 128) -> None:
        super().__init__()
        if not widths or groups < 1:
            raise PlanError(f"a controller needs a layer and a group; got widths {list(widths)}, groups {groups}.")
        self.encoders = nn.ModuleList(nn.Linear(width, embed) for width in widths)
        self.cell = nn.GRUCell(embed, hidden)
        self.decoder = nn.Linear(hidden, groups)

    def step(self, layer: int, pooled: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the values Q (B, groups) of ``layer`` for its pooled input (B, C), and the state (B, hidden)."""
        after: Tensor = self.cell(self.encoders[layer](pooled), state)
        return self.decoder(after), after

    def forward(self, pooled: Sequence[Tensor]) -> Tensor:
        """Return the values (B, layers, groups) along the whole way."""
        state, values = None, []
        for layer, seen in enumerate(pooled):
            value, state = self.step(layer, seen, state)
            values.append(value)
        return torch.stack(values, 1)

    @property
    def sizes(self) -> dict[str, int]:
        """Width of the embedding and of the state: what makes an equal controller for the same gates."""
        return {"embed": self.cell.input_size, "hidden": self.cell.hidden_size}

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all decisions about one sample."""
        cell = self.cell.weight_ih.numel() + self.cell.weight_hh.numel()
        encoders = [module.weight.numel() for module in self.encoders if isinstance(module, nn.Linear)]
        return sum(encoders) + len(encoders) * (cell + self.decoder.weight.numel())


@dataclass(eq=False)
class Episode:
    """What one forward pass saw and did: pooled inputs (B, C) and actions (B,) of 1 .. groups, layer by layer."""

    pooled: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)

    @property
    def actions(self) -> Tensor:
        """Actions (B, layers)."""
        return torch.stack(self.steps, 1)


def steered(model: nn.Module) -> list[str]:
    """Return the paths of the layers that a controller decides about: all prefix gates but the first.

    The first convolution of the paper is always computed whole: there is nothing to look at before it.
    """
    return [path.rpartition(".")[0] for path, module in model.named_modules() if isinstance(module, Prefix)][1:]


def controller_for(model: nn.Module, embed: int = 64, hidden: int = 128) -> Controller:
    """Return a fresh controller for the prefix gates of ``model``; raises ``PlanError`` when there are too few."""
    layers = [model.get_submodule(path) for path in steered(model)]
    if not layers:
        raise PlanError("a controller decides from the second gated layer on; gate at least two convolutions.")
    groups = {layer.gate.groups for layer in layers}  # type: ignore[union-attr]
    if len(groups) > 1:
        raise PlanError(f"one decoder serves all layers, so they have one number of groups; got {sorted(groups)}.")
    return Controller([layer.before for layer in layers], groups.pop(), embed, hidden)  # type: ignore[union-attr]


@contextlib.contextmanager
def deciding(
    model: nn.Module,
    controller: Controller,
    *,
    epsilon: float = 0.0,
    bias: float = 0.0,
    generator: torch.Generator | None = None,
) -> Iterator[Episode]:
    """Let ``controller`` decide in ``model`` inside a ``with`` block; the episode is that of the last forward pass.

    Each decision is drawn at random with probability ``epsilon``, else it is the best value after ``bias`` for each
    further group: below 0 it buys speed from a trained model, like a larger penalty in training.  Decisions carry
    no gradient.
    """
    episode = Episode()
    gates: list[Any] = [model.get_submodule(path).gate for path in steered(model)]
    if len(gates) != len(controller.encoders):
        raise PlanError(f"the controller decides about {len(controller.encoders)} layers, the model has {len(gates)}.")
    state: Tensor | None = None

    def policy(layer: int, x: Tensor) -> Tensor:
        nonlocal state
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            pooled = means(x.detach().float(), "avg")
            if layer == 0:
                state = None
                episode.pooled.clear()
                episode.steps.clear()
            values, state = controller.step(layer, pooled, state)
            groups = values.shape[1]
            action = (values + bias * torch.arange(groups, device=values.device)).argmax(1)
            if epsilon > 0:
                drawn = torch.randint(groups, action.shape, generator=generator).to(action.device)
                wild = torch.rand(action.shape, generator=generator).to(action.device) < epsilon
                action = torch.where(wild, drawn, action)
        episode.pooled.append(pooled)
        episode.steps.append(action + 1)
        return action + 1

    before = [gate.policy for gate in gates]
    try:
        for layer, gate in enumerate(gates):
            gate.policy = lambda x, layer=layer: policy(layer, x)
        yield episode
    finally:
        for gate, old in zip(gates, before, strict=True):
            gate.policy = old


class Steered(nn.Module):
    """A model with prefix gates and the controller that decides in it: one module to evaluate, save and ship.

    ``bias`` is that of ``deciding``: below 0 it buys speed.  Not for several threads at once.
    """

    def __init__(self, model: nn.Module, controller: Controller, bias: float = 0.0) -> None:
        super().__init__()
        self.model, self.controller, self.bias = model, controller, bias

    @classmethod
    def of(cls, model: nn.Module, sizes: Mapping[str, int]) -> Steered:
        """Return ``model`` with a fresh controller of ``sizes``; raises ``PlanError`` for sizes that make none."""
        if sizes.keys() != {"embed", "hidden"} or not all(0 < size <= LARGEST for size in sizes.values()):
            raise PlanError(f"a controller has embed and hidden in 1 .. {LARGEST}; got {dict(sizes)}.")
        return cls(model, controller_for(model, **sizes))

    def forward(self, x: Tensor) -> Tensor:
        """Return what the model answers under the controller's decisions."""
        with deciding(self.model, self.controller, bias=self.bias):
            return self.model(x)


def rewards(actions: Tensor, loss: Tensor, penalty: float, alpha: float) -> Tensor:
    """Return (i - 1) p for each action i of (B, layers), and - alpha * ``loss`` (B,) on top at the last layer.

    >>> rewards(torch.tensor([[3, 1, 4]]), torch.tensor([2.0]), -0.1, 0.5)
    tensor([[-0.2000, -0.0000, -1.3000]])
    """
    found = (actions - 1) * penalty
    found[:, -1] -= alpha * loss
    return found


def targets(reward: Tensor, ahead: Tensor, gamma: float = 1.0) -> Tensor:
    """Return r_t + gamma * max_a Q(s_t+1, a) from ``reward`` (B, layers) and values ``ahead`` (B, layers, groups).

    Nothing follows the last layer.  ``ahead`` are the values of the target network along the same way.
    """
    best = ahead.max(2).values[:, 1:]
    return reward + gamma * F.pad(best, (0, 1))


def returns(reward: Tensor, gamma: float = 1.0) -> Tensor:
    """Return the sum of what ``reward`` (B, layers) gives from each layer on, the factor ``gamma`` per layer.

    >>> returns(torch.tensor([[-0.2, 0.0, -1.3]]))
    tensor([[-1.5000, -1.3000, -1.3000]])
    """
    weights = gamma ** torch.arange(reward.shape[1], dtype=reward.dtype, device=reward.device)
    return (reward * weights).flip(1).cumsum(1).flip(1) / weights


def loss_of(controller: Controller, twin: Controller, episode: Episode, reward: Tensor, gamma: float = 1.0) -> Tensor:
    """Return the mean over samples and layers of (target - Q(s, a))^2; ``twin`` is the target network."""
    chosen = controller(episode.pooled).gather(2, episode.actions[:, :, None] - 1)[:, :, 0]
    with torch.no_grad():
        aim = targets(reward, twin(episode.pooled), gamma)
    return F.mse_loss(chosen, aim)


def epsilon(step: int, total: int, begin: float = 1.0, end: float = 0.1) -> float:
    """Return the chance of a random action: from ``begin`` at step 0 in a line to ``end`` at ``total``, then held.

    >>> epsilon(0, 100), epsilon(50, 100), epsilon(1000, 100)
    (1.0, 0.55, 0.1)
    """
    return max(end, begin - (begin - end) * step / max(1, total))
