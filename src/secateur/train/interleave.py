"""The training of RNP (algorithm 1 of the paper): rounds of policy updates and of backbone updates."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.runtime.gates.rnp import Controller, deciding, epsilon, loss_of, rewards
from secateur.train.loop import draw

Batches = Callable[[int], tuple[Tensor, Tensor]]  # number of an update -> inputs and labels, always the same


@dataclass(frozen=True)
class Interleaving:
    """How RNP trains: ``rounds`` times ``policy_steps`` updates of the controller, ``backbone_steps`` of the network.

    ``penalty`` (p < 0) is the reward of each further group.  ``alpha`` None chooses it such that alpha * loss has a
    running mean of 1.  ``anneal`` is the share of all policy updates over which epsilon falls from 1 to 0.1; the
    target network is renewed every ``renew`` updates.
    """

    rounds: int = 10
    policy_steps: int = 100
    backbone_steps: int = 100
    penalty: float = -0.1
    alpha: float | None = None
    gamma: float = 1.0
    anneal: float = 0.5
    renew: int = 20
    policy_lr: float = 1e-3
    decay: float = 0.98  # of the running mean of the loss


class Interleaved:
    """State of a training: network, controller, target network, both optimisers, counters.

    The network is trained under the actions of the current policy with its current epsilon, as the policy is: a
    network that meets only greedy actions forgets the others.  ``seed`` and the number of an update decide every
    draw, so a training that continues from ``state()`` ends like one that was never stopped.
    """

    def __init__(
        self,
        model: nn.Module,
        controller: Controller,
        optimizer: torch.optim.Optimizer,
        batches: Batches,
        settings: Interleaving,
        seed: int = 0,
    ) -> None:
        self.model, self.controller, self.optimizer = model, controller, optimizer
        self.batches, self.settings, self.seed = batches, settings, seed
        self.twin = copy.deepcopy(controller).requires_grad_(False)
        self.policy_optimizer = torch.optim.Adam(controller.parameters(), settings.policy_lr)
        self.policy_updates = self.backbone_updates = 0
        self.level: float | None = None  # running mean of the loss

    @property
    def epsilon(self) -> float:
        """The present chance of a random action."""
        total = self.settings.rounds * self.settings.policy_steps
        return epsilon(self.policy_updates, round(self.settings.anneal * total))

    @property
    def alpha(self) -> float:
        """The present factor of the loss in the reward."""
        if self.settings.alpha is not None:
            return self.settings.alpha
        return 1.0 if not self.level else 1.0 / self.level

    def round_(self) -> dict[str, float]:
        """Run one outer round; return the means of its losses and of the actions."""
        policy = torch.tensor([self._policy_update() for _ in range(self.settings.policy_steps)]).mean(0)
        backbone = torch.tensor([self._backbone_update() for _ in range(self.settings.backbone_steps)])
        names = ("value_loss", "loss", "action")
        return dict(zip(names, policy.tolist(), strict=True)) | {
            "backbone_loss": float(backbone.mean()),
            "epsilon": self.epsilon,
            "alpha": self.alpha,
        }

    def _policy_update(self) -> tuple[float, float, float]:
        inputs, labels = self.batches(self.policy_updates + self.backbone_updates)
        self.model.eval()
        with torch.no_grad(), self._deciding() as episode:
            loss = F.cross_entropy(self.model(inputs), labels, reduction="none")
        mean = float(loss.mean())
        decay = self.settings.decay
        self.level = mean if self.level is None else decay * self.level + (1 - decay) * mean
        reward = rewards(episode.actions, loss, self.settings.penalty, self.alpha)
        wrong = loss_of(self.controller, self.twin, episode, reward, self.settings.gamma)
        self.policy_optimizer.zero_grad()
        wrong.backward()
        self.policy_optimizer.step()
        self.policy_updates += 1
        if self.policy_updates % self.settings.renew == 0:
            self.twin.load_state_dict(self.controller.state_dict())
        return float(wrong.detach()), mean, float(episode.actions.double().mean())

    def _backbone_update(self) -> float:
        inputs, labels = self.batches(self.policy_updates + self.backbone_updates)
        self.model.train()
        torch.manual_seed(draw(self.seed, 1, self.backbone_updates))  # for dropout
        with self._deciding():
            loss = F.cross_entropy(self.model(inputs), labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.backbone_updates += 1
        return float(loss.detach())

    def _deciding(self) -> Any:
        drawn = torch.Generator().manual_seed(draw(self.seed, 0, self.policy_updates, self.backbone_updates))
        return deciding(self.model, self.controller, epsilon=self.epsilon, generator=drawn)

    def state(self) -> dict[str, Any]:
        """Return all that ``load`` needs to go on, beside the weights of the network."""
        return {
            "controller": self.controller.state_dict(),
            "twin": self.twin.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "policy_optimizer": self.policy_optimizer.state_dict(),
            "updates": [self.policy_updates, self.backbone_updates],
            "level": self.level,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self.controller.load_state_dict(state["controller"])
        self.twin.load_state_dict(state["twin"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.policy_optimizer.load_state_dict(state["policy_optimizer"])
        self.policy_updates, self.backbone_updates = state["updates"]
        self.level = state["level"]
