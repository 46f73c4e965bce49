"""Gates: acceptance checks 14 to 16 of FBS, prefixes, what cannot be gated."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import secateur as sc
from gated_nets import curious, lived, varied
from secateur.models.cifar_resnet import resnet20
from secateur.models.cifarnet import cifarnet
from secateur.models.s0 import s0
from secateur.models.vgg import vgg
from secateur.runtime.engine import compile_engine
from secateur.runtime.gates import FBS, Gated, acting, gate, layers, penalty, watch
from secateur.runtime.gates.fbs import pooled, quota, winners
from secateur.runtime.plain import plain
from secateur.types import PlanError

NARROW = (8, 8, 12, 12, 12, 16, 16, 16)


MODELS = {
    "cifarnet": lambda: cifarnet(widths=NARROW),
    "vgg": lambda: vgg(depth=11, width=0.1),
    "resnet20": lambda: resnet20(width=8, depth=8),
    "resnet18": lambda: torchvision.models.resnet18(num_classes=5),
    "s0": lambda: s0(),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("density", [1.0, None], ids=["fbs", "prefix"])
def test_acceptance_14_a_gate_that_computes_everything_changes_nothing(name: str, density: float | None) -> None:
    model = lived(MODELS[name]())
    x = torch.randn(2, 3, 32, 32)
    done = gate(model, density, x)
    expected = model(x)
    assert done.gated
    torch.testing.assert_close(done.model(x), expected, rtol=2e-4, atol=2e-5 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("name", ["cifarnet", "resnet18", "s0"])
def test_acceptance_14_a_disabled_gate_is_the_base_network(name: str) -> None:
    model = lived(MODELS[name]())
    x = torch.randn(2, 3, 32, 32)
    done = curious(gate(model, 0.3, x).model, x)
    assert not torch.allclose(done(x), model(x), rtol=1e-2)
    for module in done.modules():
        if isinstance(module, FBS):
            module.enabled = False
    torch.testing.assert_close(done(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["cifarnet", "resnet20", "resnet18", "s0"])
@pytest.mark.parametrize("density", [0.5, 0.3, 0.01])
def test_acceptance_15_exactly_k_winners_whoever_else_is_in_the_batch(name: str, density: float) -> None:
    x = varied(5)
    model = curious(gate(lived(MODELS[name]()), density, x).model, x)
    outs: dict[str, torch.Tensor] = {}
    layers = {path: m for path, m in model.named_modules() if isinstance(m, Gated)}
    for path, module in layers.items():
        module.register_forward_hook(lambda m, a, out, p=path: outs.update({p: out.clone()}))
    with watch(model) as choices:
        whole = model(x)
    assert set(choices) == set(layers)
    for path, choice in choices.items():
        assert choice.mask.sum(1).tolist() == [quota(density, choice.mask.shape[1])] * 5
        assert not outs[path][~choice.mask].any()
    masks = {path: choice.mask for path, choice in choices.items()}
    assert density == 0.01 or any((m != m[:1]).any() for m in masks.values()), "the gates should look at their inputs"
    for number in range(5):
        with watch(model) as alone:
            one = model(x[number : number + 1])
        torch.testing.assert_close(one[0], whole[number], rtol=1e-4, atol=1e-5)
        assert all(torch.equal(alone[path].mask[0], masks[path][number]) for path in masks)


def test_the_scale_can_stay_with_the_batch_norm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain_model, x = lived(cifarnet(widths=(8,) * 8)), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        plain_model[1].weight[2] = -0.3
    whole = gate(plain_model, 1.0, x, scale="norm").model
    with torch.no_grad():
        torch.testing.assert_close(whole(x), plain_model(x), rtol=0, atol=0)
        assert {float(v) for m in whole.modules() if isinstance(m, FBS) for v in m.predictor.bias} == {1.0}
        torch.testing.assert_close(plain(whole)(x), plain_model(x), rtol=0, atol=0)
        half = curious(gate(plain_model, 0.5, x, scale="norm").model, x)
        torch.testing.assert_close(compile_engine(half, x, strict=True)(x), half(x), rtol=1e-4, atol=1e-5)
        sc.save(half, tmp_path / "half.safetensors")
        again = sc.load(tmp_path / "half.safetensors", model=plain_model)
        torch.testing.assert_close(again(x), half(x), rtol=0, atol=0)
    assert {layer.scale for layer in layers(again)} == {"norm"}
    with pytest.raises(PlanError, match="scale of a batch norm"):
        gate(plain_model, 0.5, x, scale="both")


def test_acceptance_15_of_equal_saliencies_the_lower_index_wins() -> None:
    assert winners(torch.zeros(1, 5), 2).tolist() == [[True, True, False, False, False]]
    many = torch.arange(3000).remainder(2)[None].float()
    assert winners(many, 700)[0].nonzero().ravel().tolist() == list(range(1, 1400, 2))
    assert winners(torch.tensor([[1.0, 3.0, 3.0, 3.0]]), 2).tolist() == [[False, True, True, False]]
    assert [quota(0.7, 10), quota(0.1, 30), quota(1, 3), quota(1e-3, 8)] == [7, 3, 3, 1]


@pytest.mark.parametrize("name", ["cifarnet", "resnet18", "s0"])
def test_acceptance_16_filters_that_do_not_run_get_no_gradient(name: str) -> None:
    x = torch.randn(1, 3, 64, 64) if name == "resnet18" else torch.randn(1, 3, 32, 32)
    model = gate(MODELS[name](), 0.5, x).model
    curious(model, x).train()
    with watch(model) as choices:
        model(x.expand(2, -1, -1, -1)).square().sum().backward()
    for path, choice in choices.items():
        grad = model.get_submodule(path).conv.weight.grad
        idle = ~choice.mask.any(0)
        assert idle.any()
        assert grad is None or not grad[idle].any()
        assert grad[~idle].any()


def test_acceptance_16_the_penalty_is_the_mean_over_the_batch() -> None:
    x = torch.randn(3, 3, 32, 32)
    model = curious(gate(cifarnet(widths=NARROW), 0.5, x).model, x)
    predictor = model.get_submodule("0").gate.predictor

    def slope(batch: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        with watch(model) as choices:
            model(batch)
        penalty({"0": choices["0"]}).backward()
        return predictor.bias.grad.clone()

    one = slope(x)
    torch.testing.assert_close(slope(x.repeat(4, 1, 1, 1)), one)
    positive = (predictor(pooled(x, "l1")) > 0).float().mean(0)
    torch.testing.assert_close(one, positive)  # the sign of a saliency, 0 where ReLU is silent


@pytest.mark.parametrize("how", ["l1", "avg", "max", "l2"])
def test_pooling_has_a_gradient_at_zero(how: str) -> None:
    x = torch.zeros(1, 2, 3, 3, requires_grad=True)
    pooled(x, how).sum().backward()
    assert x.grad.isfinite().all()


def test_a_prefix_computes_the_first_groups_and_forgets() -> None:
    model = lived(s0())
    done = gate(model, None, torch.randn(1, 3, 32, 32), groups=4)
    x = torch.randn(4, 3, 32, 32)
    keys, before = list(done.model.state_dict()), done.model(x)
    actions = {path: torch.tensor([1, 2, 3, 4]) for path in done.gated}
    with watch(done.model) as choices, acting(done.model, actions):
        out = done.model(x)
    for path in done.gated:
        layer = done.model.get_submodule(path).gate
        assert choices[path].mask.sum(1).tolist() == layer.sizes
        assert (choices[path].mask.long().diff(dim=1) <= 0).all()
    torch.testing.assert_close(out[3], before[3])
    assert not torch.allclose(out[0], before[0])
    assert torch.equal(done.model(x), before)
    assert list(done.model.state_dict()) == keys


def test_what_cannot_be_gated_says_why() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
            self.e = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x).relu()
            x = self.b(self.b(x)).relu()
            return self.d(self.e(self.c(x).sigmoid()).relu())

    x = torch.randn(1, 4, 8, 8)
    done = gate(Odd(), 0.5, x)
    assert done.gated == ("a",)
    reasons = dict(done.dense)
    assert "2 times" in reasons["b"]
    assert "sigmoid" in reasons["c"]
    assert "output" in reasons["d"]
    assert "circular" in reasons["e"]
    with pytest.raises(PlanError, match="sigmoid"):
        gate(Odd(), {"c": 0.5}, x)
    with pytest.raises(PlanError, match="no prefix gate at a"), acting(done.model, {"a": torch.ones(1)}):
        pass
    with pytest.raises(PlanError, match="in \\(0, 1\\]"):
        gate(Odd(), 0, x)


def test_densities_per_layer_and_the_original_is_untouched() -> None:
    model = lived(cifarnet(widths=NARROW))
    before = copy.deepcopy(model.state_dict())
    done = gate(model, {"3": 0.25, "6": 0.5}, torch.randn(1, 3, 32, 32))
    assert done.gated == ("3", "6")
    assert [done.model.get_submodule(path).gate.k for path in done.gated] == [2, 6]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
