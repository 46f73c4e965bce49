"""Units in the order of their scores: the model computes the same, and the best come first."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.models.cifar_resnet import resnet20
from secateur.models.s0 import s0
from secateur.runtime.gates import order
from secateur.runtime.gates.order import ordered
from secateur.types import PlanError


class Joined(nn.Module):
    """Two convolutions side by side, their maps flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.norm, self.out = nn.BatchNorm2d(9), nn.Linear(9 * 16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(torch.cat([self.left(x), self.right(x)], 1)).relu().flatten(1))


NETS = {
    "flattened": lambda: s0(4, image_size=16, dropout=0.0),
    "residual": resnet20,
    "joined": Joined,
    "grouped": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 2, 1)),
}
SIZES = {"flattened": 16, "joined": 4}


def moved(name: str) -> tuple[nn.Module, nn.Module, sc.Graph, Tensor]:
    torch.manual_seed(3)
    net = NETS[name]().eval()
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
    x = torch.rand(2, 3, SIZES.get(name, 32), SIZES.get(name, 32))
    graph = sc.trace(net, x)
    return net, ordered(sc.score(graph, sc.criteria.Magnitude(p=1))), graph, x


@pytest.mark.parametrize("name", NETS)
def test_the_model_computes_the_same_and_the_best_units_come_first(name: str) -> None:
    net, after, graph, x = moved(name)
    torch.testing.assert_close(after(x), net(x), rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(one, two) for one, two in zip(net.parameters(), after.parameters(), strict=True))
    again = sc.score(sc.trace(after, x), sc.criteria.Magnitude(p=1)).values
    before = sc.score(graph, sc.criteria.Magnitude(p=1)).values
    assert again.keys() == before.keys()
    for group, scores in again.items():
        torch.testing.assert_close(scores, before[group].sort(descending=True).values)


def test_a_model_whose_units_have_their_places_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = order.rearranged
    monkeypatch.setattr(order, "rearranged", lambda graph, target: dict(list(real(graph, target).items())[:1]))
    with pytest.raises(PlanError, match="can't be put in another order"):
        moved("flattened")
