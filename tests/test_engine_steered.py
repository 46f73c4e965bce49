"""A controller inside the engine decides what the one outside decides, and the network answers the same."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from gated_nets import lived, varied
from secateur.models.cifar_resnet import resnet20
from secateur.models.s0 import s0
from secateur.runtime.engine import Engine, Fallback, compile_engine, native
from secateur.runtime.gates import Steered, controller_for, deciding, gate
from secateur.types import EngineError

WIDTHS = [16, 8] if native.lanes() == 16 else [8]
MODELS = {
    "s0": lambda: s0(widths=(8, 10, 9, 12)),
    "resnet20": lambda: resnet20(width=8, depth=8),
    "resnet18": lambda: torchvision.models.resnet18(num_classes=5),
}


def steered(name: str, x: torch.Tensor, bias: float = 0.0) -> Steered:
    """A network whose fresh controller is made to see differences between images."""
    torch.manual_seed(1)
    model = gate(lived(MODELS[name]()), None, x, groups=4).model
    controller = controller_for(model, embed=12, hidden=20)
    with torch.no_grad():
        for layer in (*controller.encoders, controller.decoder):
            layer.weight.mul_(16)
    return Steered(model, controller, bias).eval()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_steered_network_equals_its_masks(name: str, width: int) -> None:
    torch.manual_seed(0)
    x = varied(16, 3, 64, 64) if name == "resnet18" else varied(16)
    model = steered(name, x)
    with torch.no_grad(), deciding(model.model, model.controller, bias=model.bias) as episode:
        expected = model.model(x)
    assert len(episode.actions.unique(dim=0)) > 1, "every image gets the same decisions"
    engine = compile_engine(model, x, strict=True, width=width)
    assert isinstance(engine, Engine)
    for _ in range(2):  # nothing stays behind in the state
        assert float((engine(x) - expected).abs().max() / expected.abs().max()) <= 1e-4


@pytest.mark.parametrize("bias", [-100.0, 100.0])
def test_the_bias_buys_speed(bias: float) -> None:
    x = varied(2)
    model = steered("s0", x, bias)
    with torch.no_grad(), deciding(model.model, model.controller, bias=bias) as episode:
        expected = model.model(x)
    assert set(episode.actions.flatten().tolist()) == {1 if bias < 0 else 4}
    assert torch.allclose(compile_engine(model, x, strict=True)(x), expected, rtol=1e-4, atol=1e-5)


def test_large_states_and_nan() -> None:
    x = varied(1)
    model = steered("s0", x)
    with torch.no_grad():
        model.controller.cell.bias_ih.copy_(torch.linspace(-200, 200, len(model.controller.cell.bias_ih)))
        expected = model(x)
    engine = compile_engine(model, x, strict=True)
    assert torch.allclose(engine(x), expected, rtol=1e-4, atol=1e-5)
    assert engine(x * float("nan")).isnan().all()
    assert torch.allclose(engine(x), expected, rtol=1e-4, atol=1e-5)


def test_actions_are_not_the_callers() -> None:
    x = varied(1)
    engine = compile_engine(steered("s0", x), x, strict=True)
    with pytest.raises(EngineError, match="actions must name"):
        engine(x, {"0": torch.tensor([1])})


class Reversed(nn.Module):
    """Two convolutions that run in another order than they are written."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.middle, self.first = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.end = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.first, self.middle, self.last):
            x = torch.relu(layer(x))
        return self.end(x)


def test_layers_in_another_order_run_as_they_are() -> None:
    x = torch.rand(2, 4, 8, 8)
    model = gate(Reversed().eval(), None, x, groups=2).model
    whole = Steered(model, controller_for(model, embed=4, hidden=4)).eval()
    engine = compile_engine(whole, x)
    assert isinstance(engine, Fallback)
    assert "but the network runs" in engine.reason
    with torch.no_grad():
        assert torch.equal(engine(x), whole(x))
