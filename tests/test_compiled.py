"""``sc.runtime.compile`` takes the fastest layer that runs, and says why not another."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable

import pytest
import torch
from torch import nn

import secateur as sc
from gated_nets import curious, lived, varied
from random_nets import actions
from secateur.models.cifar_resnet import resnet20
from secateur.models.s0 import s0
from secateur.runtime import compiled
from secateur.runtime.engine import Engine
from secateur.runtime.gates import Steered, acting, controller_for, gate
from secateur.runtime.portable import Portable
from secateur.types import EngineError

LAYERS = ["engine", "portable", "reference"]


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make packages impossible to import, and secateur's own that need them not yet imported."""

    def hide(*names: str) -> None:
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)
        for name in list(sys.modules):
            if name.startswith(("secateur.runtime.engine", "secateur.runtime.portable")):
                monkeypatch.delitem(sys.modules, name)

    return hide


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(2)
    x = varied(3)
    return curious(gate(lived(resnet20(width=8, depth=8)), 0.5, x).model, x), x


@pytest.mark.parametrize("layer", [None, *LAYERS])
def test_every_layer_gives_the_answer_of_the_masks(layer: str | None, pair: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = pair
    run = sc.runtime.compile(model, x, layer=layer)
    assert run.layer == (layer or "engine")
    assert isinstance(run.run, {"engine": Engine, "portable": Portable}.get(run.layer, object))
    assert set(run.why) == set(LAYERS) - {run.layer}
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)


def test_the_next_layer_steps_in_and_the_reason_is_told(
    pair: tuple[nn.Module, torch.Tensor], without: Callable[..., None]
) -> None:
    model, x = pair
    without("llvmlite")
    run = sc.runtime.compile(model, x)
    assert run.layer == "portable"
    assert "pip install secateur[engine]" in run.why["engine"]
    assert "not engine: the engine needs llvmlite" in repr(run)
    without("llvmlite", "onnxruntime")
    run = sc.runtime.compile(model, x)
    assert run.layer == "reference"
    assert "pip install secateur[portable]" in run.why["portable"]
    with torch.no_grad():
        assert torch.equal(run(x), model(x))
    with pytest.raises(EngineError, match=r"layer='portable' cannot run .* needs onnx and onnxruntime"):
        sc.runtime.compile(model, x, layer="portable")


def test_a_network_that_only_torch_runs() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU()).eval()
    run = sc.runtime.compile(model, torch.rand(1, 3, 8, 8))
    assert run.layer == "reference"
    assert "gelu" in run.why["engine"]
    assert "gelu" in run.why["portable"]


def test_without_an_example_the_first_input_is_it(pair: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = pair
    run = sc.runtime.compile(model)
    assert "waits for its first input" in repr(run)
    assert (run.layer, run.why) == ("", {})
    assert run(x).shape == (3, 10)
    assert run.layer == "engine"


@pytest.mark.parametrize("layer", LAYERS)
def test_actions_reach_every_layer(layer: str) -> None:
    x = varied(3)
    model = gate(lived(s0(widths=[8, 8, 12, 12])), None, x).model
    chosen = actions(model, 3)
    with acting(model, chosen), torch.no_grad():
        expected = model(x)
    run = sc.runtime.compile(model, x, layer=layer)
    torch.testing.assert_close(run(x, chosen), expected, rtol=1e-4, atol=1e-5)


def test_a_steered_network_runs_compiled() -> None:
    x = varied(3)
    model = gate(lived(s0(widths=[8, 8, 12, 12])), None, x).model
    steered = Steered(model, controller_for(model)).eval()
    run = sc.runtime.compile(steered, x)
    assert run.layer != "reference"
    with torch.no_grad():
        torch.testing.assert_close(run(x), steered(x), rtol=1e-4, atol=1e-5)


def test_mistakes_are_told(pair: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = pair
    with pytest.raises(EngineError, match=r"layer='gpu' is not one of engine, portable, reference, .* on the CPU"):
        sc.runtime.compile(model, x, layer="gpu")
    with pytest.raises(EngineError, match="threads must be a whole number from 1 on; got 0"):
        sc.runtime.compile(model, x, threads=0)


def test_a_model_on_cuda_goes_its_own_way(
    pair: tuple[nn.Module, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = pair
    monkeypatch.setattr(compiled, "_layers", lambda model: compiled.CUDA)
    gpu = types.ModuleType("secateur.runtime.gpu")
    fast = lambda x: torch.zeros(len(x), 10)  # noqa: E731
    fast.reason = "gelu is not known"
    gpu.compile_cuda = lambda model, example: fast
    monkeypatch.setitem(sys.modules, "secateur.runtime.gpu", gpu)
    run = sc.runtime.compile(model, x)
    assert run.layer == "gpu"
    assert not run(x).any()
    assert "not gpu throughout: only its gated layers: gelu" in repr(run)
    monkeypatch.setitem(sys.modules, "secateur.runtime.gpu", None)
    run = sc.runtime.compile(model, x)
    assert run.layer == "reference"
    assert "the path for CUDA is not there" in run.why["gpu"]


def test_the_name_costs_nothing_until_it_is_used() -> None:
    code = (
        "import sys, secateur as sc; sc.runtime; "
        "print([m for m in ('torch', 'onnx', 'onnxruntime', 'llvmlite') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"
