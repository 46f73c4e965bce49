"""The running threshold of FBS: winners on average, cheap at run time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gated_nets import curious, lived, varied
from secateur.models.cifarnet import cifarnet
from secateur.runtime.gates import FBS, gate, watch
from secateur.types import PlanError


def looking(density: float, threshold: str = "local") -> FBS:
    made = FBS(4, 8, density, threshold=threshold)
    nn.init.normal_(made.predictor.weight)
    nn.init.constant_(made.predictor.bias, 3.0)
    return made


def batch(number: int, size: int = 16) -> Tensor:
    return torch.rand(size, 4, 2, 2, generator=torch.Generator().manual_seed(number))


def test_the_threshold_is_the_running_mean_of_the_next_largest() -> None:
    made = looking(0.5).train()
    level = None
    for step in range(30):
        saliency = made(batch(step)).saliency
        seen = saliency.sort(dim=1, descending=True).values[:, 4].mean()  # the fifth: four of eight win
        decay = min((1 + step) / (10 + step), 0.9997)
        level = seen if level is None else decay * level + (1 - decay) * seen
        torch.testing.assert_close(made.level, level.detach())
    assert made.steps == 30


def test_it_decides_alone_in_eval_mode_and_keeps_the_density_on_average() -> None:
    made = looking(0.5).train()
    for step in range(100):
        made(batch(step))
    made.eval()
    level = made.level.clone()
    choice = made(batch(1000, 512))
    assert torch.equal(choice.mask, choice.saliency > level)
    assert torch.equal(made.level, level)
    counts = choice.mask.sum(1).float()
    assert 4 <= float(counts.mean()) < 5  # the (k + 1)-th is itself above its mean half of the time
    assert counts.unique().numel() > 1  # unlike exactly k
    whole = made(batch(1000, 512)[:1])
    assert torch.equal(whole.mask[0], choice.mask[0])


def test_a_new_density_starts_anew_and_a_full_one_computes_everything() -> None:
    made = looking(1.0).train()
    assert made(batch(0)).mask.all()
    assert made.level < 0
    made.density = 0.5
    made(batch(0))
    first = made.level.clone()
    for step in range(20):
        made(batch(step))
    made.density = 0.25
    saliency = made(batch(0)).saliency
    torch.testing.assert_close(made.level, saliency.sort(dim=1, descending=True).values[:, 2].mean().detach())
    assert made.level > first


def test_its_state_is_saved_with_the_model() -> None:
    made, again = looking(0.5).train(), looking(0.5).train()
    for step in range(5):
        made(batch(step))
    again.load_state_dict(made.state_dict())
    for step in range(5, 9):
        assert torch.equal(made(batch(step)).mask, again(batch(step)).mask)
    assert torch.equal(made.level, again.level)
    assert list(looking(0.5, "online").state_dict()) == ["predictor.weight", "predictor.bias"]  # as ever


def test_a_network_with_running_thresholds_trains() -> None:
    x = varied(8)
    model = curious(gate(lived(cifarnet(widths=[8] * 8)), 0.5, x, threshold="local").model, x).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        with watch(model) as choices:
            nn.functional.cross_entropy(model(x), torch.arange(8)).backward()
        optimizer.step()
    active = [float(choice.mask.float().mean()) for choice in choices.values()]
    assert all(0.2 < share < 0.8 for share in active)
    assert model.get_submodule("0").conv.weight.grad.isfinite().all()


def test_other_words_are_refused() -> None:
    with pytest.raises(PlanError, match="online, local"):
        FBS(4, 8, threshold="global")
