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
from secateur.train.layout import like_weights
from secateur.train.loop import Cursor, Point, draw
from secateur.train.rates import Rate, constant

Batches = Callable[[int], tuple[Tensor, Tensor]]  # number of an update -> inputs and labels, always the same


@dataclass(frozen=True)
class Interleaving:
    """How RNP trains: ``rounds`` times ``policy_steps`` updates of the controller, ``backbone_steps`` of the network.

    ``penalty`` (p < 0) is the reward of each further group.  ``alpha`` None chooses it such that alpha * loss has a
    running mean of 1.  ``anneal`` is the share of all policy updates over which epsilon falls from 1 to 0.1; the
    target network is renewed every ``renew`` updates.  ``rate`` maps the progress of the network's updates to a
    factor of its learning rate; ``autocast`` is the type of its products and convolutions (None: float32).
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
    rate: Rate = constant
    autocast: torch.dtype | None = None


class Interleaved:
    """State of a training: network, controller, target network, both optimisers, counters.

    The network is trained under the actions of the current policy with its current epsilon, as the policy is: a
    network that meets only greedy actions forgets the others.  ``seed`` and the number of an update decide every
    draw, so a training that continues from ``point()`` ends like one that was never stopped.  ``stepped`` is called
    after every update.
    """

    def __init__(
        self,
        model: nn.Module,
        controller: Controller,
        optimizer: torch.optim.Optimizer,
        batches: Batches,
        settings: Interleaving,
        seed: int = 0,
        stepped: Callable[[], None] = lambda: None,
    ) -> None:
        self.stepped = stepped
        self.model, self.controller, self.optimizer = model, controller, optimizer
        self.batches, self.settings, self.seed = batches, settings, seed
        self.twin = copy.deepcopy(controller).requires_grad_(False)
        self.policy_optimizer = torch.optim.Adam(controller.parameters(), settings.policy_lr)
        self.policy_updates = self.backbone_updates = 0
        self.level: float | None = None  # running mean of the loss
        self.base = [group["lr"] for group in optimizer.param_groups]

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

    @property
    def rounds(self) -> int:
        """How many rounds are over."""
        return self.policy_updates // self.settings.policy_steps

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
            loss = self._loss(inputs, labels)
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
        self.stepped()
        return float(wrong.detach()), mean, float(episode.actions.double().mean())

    def _backbone_update(self) -> float:
        inputs, labels = self.batches(self.policy_updates + self.backbone_updates)
        self.model.train()
        torch.manual_seed(draw(self.seed, 1, self.backbone_updates))  # for dropout
        total = self.settings.rounds * self.settings.backbone_steps
        factor = self.settings.rate(self.backbone_updates / total)
        for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
            group["lr"] = base * factor
        with self._deciding():
            loss = self._loss(inputs, labels).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.backbone_updates += 1
        self.stepped()
        return float(loss.detach())

    def _loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each sample (B,)."""
        cast = self.settings.autocast
        with torch.autocast(inputs.device.type, cast, enabled=cast is not None):
            scores = self.model(inputs)
        return F.cross_entropy(scores.float(), labels, reduction="none")

    def _deciding(self) -> Any:
        drawn = torch.Generator().manual_seed(draw(self.seed, 0, self.policy_updates, self.backbone_updates))
        return deciding(self.model, self.controller, epsilon=self.epsilon, generator=drawn)

    def point(self) -> Point:
        """Return all that ``load`` needs to go on, beside the weights of the network."""
        tensors = {f"twin.{name}": tensor for name, tensor in self.twin.state_dict().items()}
        tensors |= {f"controller.{name}": tensor for name, tensor in self.controller.state_dict().items()}
        for index, values in self.policy_optimizer.state_dict()["state"].items():
            tensors |= {f"policy.{index}.{name}": tensor for name, tensor in values.items()}
        tensors["updates"] = torch.tensor([self.policy_updates, self.backbone_updates])
        tensors["level"] = torch.tensor([] if self.level is None else [self.level], dtype=torch.float64)
        return Point(Cursor(epoch=self.rounds), self.optimizer.state_dict(), evidence=tensors)

    def load(self, point: Point) -> None:
        """Go on from ``point``; one that holds nothing is the beginning."""
        if point.optimizer is None or point.evidence is None:
            return
        tensors = dict(point.evidence)
        self.policy_updates, self.backbone_updates = tensors.pop("updates").tolist()
        self.level = next(iter(tensors.pop("level").tolist()), None)
        for name, module in (("twin.", self.twin), ("controller.", self.controller)):
            module.load_state_dict({n.removeprefix(name): t for n, t in tensors.items() if n.startswith(name)})
        state: dict[int, dict[str, Tensor]] = {}
        for name in (name for name in tensors if name.startswith("policy.")):
            _, index, what = name.split(".")
            state.setdefault(int(index), {})[what] = tensors[name]
        self.policy_optimizer.load_state_dict({**self.policy_optimizer.state_dict(), "state": state})
        self.optimizer.load_state_dict(point.optimizer)
        like_weights(self.optimizer)
