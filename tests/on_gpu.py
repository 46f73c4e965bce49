"""What must hold of gates on a GPU: on a CUDA device where there is one, else in Triton's interpreter.

``test_gpu`` runs this file in a process of its own, because Triton decides as it is loaded which of the two it is.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from gated_nets import curious, lived, varied
from random_nets import actions, margin, network
from secateur.models.cifar_resnet import resnet20
from secateur.runtime.gates import acting, gate
from secateur.runtime.gpu import Compiled, compile_cuda
from secateur.runtime.gpu.convolve import gathered
from secateur.runtime.gpu.filters import Filters
from secateur.runtime.gpu.maps import Maps
from secateur.runtime.program import read
from secateur.types import EngineError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = 1e-3 if torch.cuda.is_available() else 1e-4
FEW = [1, 6, 14, 17, 18, 32, 44, 58]  # quick in the interpreter
SEEDS = range(60) if torch.cuda.is_available() else FEW
RICH = range(60) if torch.cuda.is_available() else [4, 5, 6, 9, 10]


@pytest.fixture(autouse=True, scope="module")
def _no_tf32() -> Iterator[None]:
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def off(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-20)) if expected.numel() else 0.0


@pytest.mark.parametrize(("seed", "rich"), [*((seed, False) for seed in SEEDS), *((seed, True) for seed in RICH)])
def test_random_networks_equal_their_masks(seed: int, rich: bool) -> None:
    model, x = network(seed, rich)
    model, x = model.to(DEVICE), x.to(DEVICE)
    compiled = compile_cuda(model, x)
    assert isinstance(compiled, Compiled)
    assert compiled.reason == ""
    chosen = actions(model, len(x))
    with acting(model, chosen), torch.no_grad():
        expected = model(x)
    error = off(compiled(x, chosen), expected)
    assert error <= CLOSE or margin(model, x) < 1e-5


@pytest.mark.parametrize("density", [0.5, None])
def test_gated_linear_layers(density: float | None) -> None:
    torch.manual_seed(2)
    x = varied(3, 3, 6, 6).to(DEVICE)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 12), nn.ReLU()]
    net = lived(nn.Sequential(*layers, nn.Linear(12, 4))).to(DEVICE)
    model = curious(gate(net, density, x, everywhere=True, groups=3).model, x)
    compiled = compile_cuda(model, x)
    assert compiled.reason == ""
    chosen = actions(model, len(x))
    with acting(model, chosen), torch.no_grad():
        expected = model(x)
    assert off(compiled(x, chosen), expected) <= CLOSE


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, Compiled]:
    torch.manual_seed(1)
    x = varied(2, 3, 8, 8).to(DEVICE)
    net = lived(resnet20(width=8, depth=8)).to(DEVICE)
    model = curious(gate(net, 0.5, x).model, x)
    return model, compile_cuda(model, x)


@pytest.mark.parametrize("batch", [0, 1, 5])
def test_sums_and_any_batch(pair: tuple[nn.Module, Compiled], batch: int) -> None:
    model, compiled = pair
    x = varied(batch, 3, 8, 8).to(DEVICE)
    with torch.no_grad():
        assert off(compiled(x), model(x)) <= CLOSE


def test_inputs_of_other_types_and_sizes(pair: tuple[nn.Module, Compiled]) -> None:
    model, compiled = pair
    x = varied(1, 3, 8, 8).to(DEVICE)
    with torch.no_grad():
        assert off(compiled(x.to(memory_format=torch.channels_last).double()), model(x)) <= CLOSE
    with pytest.raises(EngineError, match=r"compiled for \(B, 3, 8, 8\); got \(1, 3, 8, 7\)"):
        compiled(x[..., 1:])


def test_only_listed_pairs_are_touched() -> None:
    """Weights of every pair that is not listed are NaN, and so are the tiles' ends."""
    before, after, batch = 37, 70, 2
    conv = nn.Conv2d(before, after, 3, stride=2, padding=1)
    ids_in = torch.stack([torch.randperm(before)[:33].sort().values for _ in range(batch)])
    ids_out = torch.stack([torch.randperm(after)[:34].sort().values for _ in range(batch)])
    listed = torch.zeros(after, before, dtype=torch.bool)
    for some_in, some_out in zip(ids_in, ids_out, strict=True):
        listed[some_out[:, None], some_in] = True
    with torch.no_grad():
        conv.weight[~listed] = float("nan")
    (node,) = read(conv, torch.rand(1, before, 11, 13)).nodes
    maps = Maps(torch.randn(batch, 33, 11, 13).to(DEVICE), before, ids_in.to(DEVICE))
    pi = torch.rand(batch, 34)
    got = gathered(maps, Filters.of(node, None, torch.device(DEVICE)), ids_out.to(DEVICE), pi.to(DEVICE))
    assert got.values.shape == (batch, 34, 6, 7)
    for n in range(batch):
        x, weight = maps.values[n].cpu(), conv.weight.detach()[ids_out[n]][:, ids_in[n]]
        expected = nn.functional.conv2d(x, weight, conv.bias.detach()[ids_out[n]], 2, 1) * pi[n][:, None, None]
        assert off(got.values[n].cpu(), expected) <= CLOSE


@pytest.mark.parametrize("density", [0.5, None])
def test_between_modules_that_are_not_known(density: float | None) -> None:
    x = varied(3, 3, 6, 6).to(DEVICE)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.GELU(), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU()]
    model = curious(gate(lived(nn.Sequential(*layers)).to(DEVICE), density, x).model, x)
    compiled = compile_cuda(model, x)
    assert "aten::gelu in '3'" in compiled.reason
    chosen = actions(model, 3)
    with acting(model, chosen), torch.no_grad():
        assert off(compiled(x, chosen), model(x)) <= CLOSE


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_a_cuda_graph_gives_the_same(pair: tuple[nn.Module, Compiled]) -> None:
    model, compiled = pair
    whole = compile_cuda(model, varied(2, 3, 8, 8).to(DEVICE), graph=True)
    for batch in (1, 4, 1):
        x = varied(batch, 3, 8, 8).to(DEVICE)
        assert torch.equal(whole(x), compiled(x))
