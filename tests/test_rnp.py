"""RNP: acceptance checks 18 to 21, the decisions of the controller, its training."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torchvision
from torch import Tensor, nn

from gated_nets import lived
from secateur.models.cifarnet import cifarnet
from secateur.models.s0 import s0
from secateur.runtime.gates import acting, gate, watch
from secateur.runtime.gates.cost import meter
from secateur.runtime.gates.rnp import (
    Controller,
    Episode,
    controller_for,
    deciding,
    epsilon,
    loss_of,
    returns,
    rewards,
    steered,
    targets,
)
from secateur.train.interleave import Interleaved, Interleaving
from secateur.types import PlanError


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def four(image: int = 8) -> nn.Module:
    return lived(s0(widths=(8, 8, 12, 4), image_size=image, dropout=0.0))


def chosen(model: nn.Module, *actions: int, samples: int = 3) -> dict[str, Tensor]:
    return {path: torch.full((samples,), action) for path, action in zip(steered(model), actions, strict=True)}


WHOLE = {  # the networks of the acceptance checks, and how many layers a controller decides about
    "s0": (four, 8, 3),
    "cifarnet": (lambda: lived(cifarnet(widths=[8, 8, 12, 12, 12, 16, 16, 16])), 32, 7),
    "resnet18": (lambda: lived(torchvision.models.resnet18(num_classes=5)), 32, 19),
}


@pytest.mark.parametrize("name", WHOLE)
def test_acceptance_18_actions(name: str) -> None:
    make, size, decided = WHOLE[name]
    plain, x = make(), torch.rand(3, 3, size, size)
    model = gate(plain, None, x).model
    count = meter(model, x)
    keys = list(model.state_dict())
    assert len(steered(model)) == decided
    close = {"rtol": 1e-4, "atol": 1e-5 * max(1.0, float(plain(x).detach().abs().max()))}
    with acting(model, chosen(model, *[4] * decided)):
        torch.testing.assert_close(model(x), plain(x), **close)
    spent = []
    for action in range(1, 5):
        with acting(model, chosen(model, *[action] * decided)), watch(model) as choices:
            model(x)
        spent.append(count(choices, 3)[0].item())
        for path in steered(model):
            width = choices[path].mask.shape[1]
            assert choices[path].mask[:, : width * action // 4].all()
            assert not choices[path].mask[:, width * action // 4 :].any()
    assert spent == sorted(set(spent))
    mixed = {path: torch.tensor([1, 4, 2]) for path in steered(model)}
    with acting(model, mixed):
        together = model(x)
        for sample in range(3):
            with acting(model, {path: action[sample : sample + 1] for path, action in mixed.items()}):
                torch.testing.assert_close(model(x[sample : sample + 1]), together[sample : sample + 1], **close)
    torch.testing.assert_close(model(x), plain(x), **close)  # nothing is left of the masks
    assert list(model.state_dict()) == keys


def test_acceptance_19_rewards_returns_and_targets() -> None:
    reward = rewards(torch.tensor([[3, 1, 4]]), torch.tensor([2.0]), -0.1, 0.5)
    torch.testing.assert_close(reward, torch.tensor([[-0.2, 0.0, -1.3]]))
    torch.testing.assert_close(returns(reward), torch.tensor([[-1.5, -1.3, -1.3]]))
    torch.testing.assert_close(returns(reward, 0.5), torch.tensor([[-0.525, -0.65, -1.3]]))
    ahead = torch.tensor([[[9.0, 9.0], [-1.0, -2.0], [-4.0, -3.0]]])
    torch.testing.assert_close(targets(reward, ahead, 0.5), torch.tensor([[-0.2 - 0.5, -1.5, -1.3]]))
    values = Controller([4, 4], groups=3)([torch.randn(64, 4) * 5, torch.randn(64, 4) * 5])
    assert (values < 0).any()
    assert (values > 0).any()


def test_each_sample_learns_from_its_own_action_and_reward() -> None:
    controller = Controller([4, 6], groups=3)
    episode = Episode(
        [torch.rand(5, 4), torch.rand(5, 6)], [torch.tensor([1, 2, 3, 1, 2]), torch.tensor([3, 1, 2, 2, 1])]
    )
    reward = -torch.rand(5, 2)
    values = controller(episode.pooled).detach()
    wrong = 0.0
    for sample, layer in itertools.product(range(5), range(2)):
        aim = reward[sample, layer] + (0.9 * values[sample, 1].max() if layer == 0 else 0)
        wrong += float((values[sample, layer, episode.actions[sample, layer] - 1] - aim) ** 2) / 10
    found = loss_of(controller, copy.deepcopy(controller), episode, reward, 0.9)
    assert float(found.detach()) == pytest.approx(wrong, rel=1e-5)


def test_acceptance_20_epsilon() -> None:
    found = [epsilon(step, 40) for step in range(100)]
    assert found[0] == 1.0
    assert found[40:] == [0.1] * 60
    assert all(a > b for a, b in itertools.pairwise(found[:41]))


class Bandit(nn.Module):
    """Two gated convolutions of which only the second matters; bright images need its second group."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 2, 1, bias=False)
        with torch.no_grad():
            self.first.weight.fill_(1.0)
            self.second.weight.copy_(torch.tensor([[0.5, 0.5], [0.5, 0.5]])[:, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        seen = self.second(self.first(x).relu()).relu().mean((2, 3))
        return torch.stack([seen[:, 0] * 0 + 1.5, seen[:, 1] * 3], 1)


def bandit(update: int) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(update)
    bright = torch.rand(32, generator=drawn) < 0.5
    return bright[:, None, None, None].float().expand(-1, 1, 4, 4), bright.long()


def trained(penalty: float) -> tuple[nn.Module, Controller]:
    torch.manual_seed(0)
    model = gate(Bandit(), None, torch.rand(1, 1, 4, 4), groups=2).model
    controller = controller_for(model, embed=8, hidden=16)
    plan = Interleaving(1, 250, 0, penalty, alpha=1.0, policy_lr=0.01)
    Interleaved(model, controller, torch.optim.SGD(model.parameters(), 0.0), bandit, plan).round_()
    return model.eval(), controller


def test_acceptance_20_the_greedy_action_is_optimal_and_penalties_buy_speed() -> None:
    x, labels = bandit(10_000)
    means = []
    for penalty in (-0.01, -0.2, -5.0):
        model, controller = trained(penalty)
        with torch.no_grad(), deciding(model, controller) as episode:
            model(x)
        means.append(float(episode.actions.double().mean()))
        if penalty == -0.2:  # one more group costs 0.2 and saves a bright image 1.5 of its loss
            assert torch.equal(episode.actions[:, 0], labels + 1)
    assert means[0] >= means[1] > means[2] == 1.0


def test_a_bias_buys_speed_from_a_trained_model() -> None:
    plain, x = four(), torch.rand(16, 3, 8, 8)
    gating = gate(plain, None, x)
    count, controller = meter(gating.model, x), controller_for(gating.model)
    spent = []
    for bias in (1.0, 0.05, 0.0, -0.05, -1.0):
        with torch.no_grad(), deciding(gating.model, controller, bias=bias) as episode, watch(gating.model) as choices:
            gating.model(x)
        spent.append(float(count(choices, 16).mean()))
    assert spent == sorted(spent, reverse=True)
    assert spent[0] == count.dense
    assert (episode.actions == 1).all()


def test_acceptance_21_multiplications_of_the_four_convolutions() -> None:
    plain, x = s0().eval(), torch.rand(3, 3, 32, 32)
    gating = gate(plain, None, x)
    count = meter(gating.model, x)
    convolutions = gating.gated
    full = {term.path: term.scale * term.before.units * term.after.units for term in count.terms}
    assert sum(full[path] for path in convolutions) == 27_058_176
    with acting(gating.model, chosen(gating.model, 1, 1, 1)), watch(gating.model) as choices:
        gating.model(x)
    spent = count.of(choices, 3)
    widths, pixels = (3, 32, 13, 5, 3), 32 * 32  # ceil of a quarter of 50, 20 and 12; the first is whole
    for path, before, after in zip(convolutions, widths, widths[1:], strict=False):
        assert spent[path].tolist() == [9 * before * after * pixels] * 3
    mixed = {path: torch.tensor([1, 3, 4]) for path in steered(gating.model)}
    with acting(gating.model, mixed), watch(gating.model) as choices:
        gating.model(x)
    alone = []
    for sample in range(3):
        with acting(gating.model, {p: a[sample : sample + 1] for p, a in mixed.items()}), watch(gating.model) as one:
            gating.model(x[sample : sample + 1])
        alone.append(float(count(one, 1).sum()))
    assert count(choices, 3).tolist() == alone


def test_the_controller_decides_per_sample_whoever_else_is_in_the_batch() -> None:
    x = torch.rand(6, 3, 8, 8) * torch.linspace(0, 30, 6)[:, None, None, None]
    model = gate(four(), None, x).model
    controller = controller_for(model)
    for parameter in controller.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad(), deciding(model, controller) as episode:
        together = model(x)
        actions = episode.actions
        assert len(actions.unique(dim=0)) > 1
        for sample in range(6):
            torch.testing.assert_close(model(x[sample : sample + 1]), together[sample : sample + 1])
            assert torch.equal(episode.actions, actions[sample : sample + 1])
    assert all(model.get_submodule(path).gate.policy is None for path in steered(model))


def test_a_training_that_was_stopped_ends_like_one_that_was_not() -> None:
    def start() -> Interleaved:
        torch.manual_seed(0)
        model = gate(s0(widths=(4, 4, 4, 4), image_size=8, classes=2), None, torch.rand(1, 3, 8, 8)).model
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        return Interleaved(model, controller_for(model, 8, 8), optimizer, batches, Interleaving(3, 3, 3, renew=2), 5)

    def batches(update: int) -> tuple[Tensor, Tensor]:
        drawn = torch.Generator().manual_seed(update)
        return torch.rand(8, 3, 8, 8, generator=drawn), torch.randint(0, 2, (8,), generator=drawn)

    whole, first = start(), start()
    for _ in range(3):
        row = whole.round_()
    first.round_()
    again = start()
    again.model.load_state_dict(first.model.state_dict())
    again.load(copy.deepcopy(first.point()))
    torch.rand(7)
    for _ in range(2):
        assert again.round_()["epsilon"] >= 0.1
    for one, two in ((whole.model, again.model), (whole.controller, again.controller)):
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert row["alpha"] == pytest.approx(1 / whole.level)
    assert row["epsilon"] == 0.1


def test_what_cannot_be_steered_is_told() -> None:
    x = torch.rand(1, 3, 8, 8)
    one = gate(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), None, x).model
    with pytest.raises(PlanError, match="second gated layer"):
        controller_for(one)
    with pytest.raises(PlanError, match="2 layers, the model has 0"), deciding(one, Controller([3, 4])):
        pass
