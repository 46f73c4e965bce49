"""Layers beyond convolution and ReLU in the engine and in ONNX Runtime: clamps, pools to a size, heads of training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gated_nets import curious, lived, varied
from secateur.runtime.engine import compile_engine
from secateur.runtime.gates import gate
from secateur.runtime.portable import compile_portable
from secateur.types import EngineError

WAYS = {"engine": compile_engine, "portable": compile_portable}


class Helped(nn.Module):
    """A network with a second head in training, as GoogLeNet has."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.head, self.helper = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.body(x).flatten(1)
        return (self.head(y), self.helper(y)) if self.training else self.head(y)


class Doubled(nn.Module):
    """Maps times maps."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x


class Residual(nn.Module):
    """An inverted bottleneck: ReLU6, a depthwise convolution, a sum that nothing follows."""

    def __init__(self) -> None:
        super().__init__()
        wide = [nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6(inplace=True)]
        deep = [nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), nn.BatchNorm2d(24), nn.ReLU6(inplace=True)]
        self.block = nn.Sequential(*wide, *deep, nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class Excited(nn.Module):
    """Squeeze and excitation (Hu et al. 2018): channels scaled by what the mean over their pixels says."""

    def __init__(self, act: nn.Module, linear: bool, first: bool) -> None:
        super().__init__()
        self.linear, self.first = linear, first
        make = nn.Linear if linear else lambda before, after: nn.Conv2d(before, after, 1)
        self.gains = nn.Sequential(make(8, 3), nn.ReLU(), make(3, 8), act)
        self.before = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        means = y.mean((2, 3)) if self.linear else nn.functional.adaptive_avg_pool2d(y, 1)
        gains = self.gains(means)
        gains = gains.view(len(gains), 8, 1, 1) if self.linear else gains
        return gains * y if self.first else y * gains


def chain(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *layers, nn.Conv2d(8, 7, 3), nn.ReLU(), nn.Conv2d(7, 5, 1))


NETS = {
    "ReLU6": lambda: chain(nn.ReLU6()),
    "in place": lambda: chain(nn.ReLU6(inplace=True)),
    "hard tanh": lambda: chain(nn.Hardtanh(-0.5, 0.7)),
    "residual": lambda: chain(nn.ReLU6(), Residual(), Residual()),
    "pooled to a part": lambda: chain(nn.ReLU(), nn.AdaptiveAvgPool2d((6, 10))),
    "pooled to its size": lambda: chain(nn.ReLU(), nn.AdaptiveAvgPool2d((12, 20))),
    "helped": Helped,
    "SiLU": lambda: chain(nn.SiLU()),
    "hard swish": lambda: chain(nn.Hardswish(inplace=True)),
    "tanh": lambda: chain(nn.Tanh()),
    "leaky": lambda: chain(nn.LeakyReLU(0.2)),
    "excited": lambda: chain(nn.ReLU(), Excited(nn.Sigmoid(), linear=False, first=True)),
    "hard excited": lambda: chain(nn.ReLU(), Excited(nn.Hardsigmoid(), linear=False, first=False)),
    "excited by vectors": lambda: chain(nn.ReLU(), Excited(nn.Sigmoid(), linear=True, first=False)),
    "sigmoid": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.Sigmoid()),
}


def gated(name: str, density: float = 0.5) -> tuple[nn.Module, Tensor]:
    """One of ``NETS`` with gates, and images for it."""
    torch.manual_seed(4)
    x = 8 * varied(3, 3, 12, 20)  # so that clamps do something, and curves are curved
    return curious(gate(lived(NETS[name]()), density, x).model, x), x


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("density", [0.5, 1.0])
def test_they_equal_their_masks(way: str, name: str, density: float) -> None:
    model, x = gated(name, density)
    run = WAYS[way](model, x[:1], strict=True)
    with torch.no_grad():
        expected = model(x)
    assert run(x).shape == expected.shape
    assert (run(x) - expected).abs().max() / expected.abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        (nn.Hardtanh(0.5, 2.0), "leaves no 0 for what is skipped"),
        (nn.AdaptiveAvgPool2d((5, 20)), "windows of many sizes"),
        (nn.AdaptiveAvgPool2d((24, 40)), "windows of many sizes"),
        (nn.GELU(), "aten::gelu"),
        (Doubled(), "not of maps and one number per channel"),
    ],
)
def test_what_they_do_not_know_is_told(layer: nn.Module, told: str) -> None:
    x = varied(1, 3, 12, 20)
    model = gate(chain(nn.ReLU(), layer).eval(), 0.5, x).model
    for way in WAYS.values():
        with pytest.raises(EngineError, match=told):
            way(model, x, strict=True)


def test_a_gate_before_a_sigmoid_needs_masks() -> None:
    """The engine keeps no zeros for what it skips; ONNX Runtime writes them first."""
    torch.manual_seed(4)
    x = varied(3, 3, 12, 20)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Sigmoid(), nn.Conv2d(8, 5, 1))
    model = curious(gate(lived(model), 0.5, x).model, x)
    with pytest.raises(EngineError, match="sigmoid at '2' needs all channels"):
        compile_engine(model, x, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(compile_portable(model, x, strict=True)(x), model(x), rtol=1e-4, atol=1e-5)
