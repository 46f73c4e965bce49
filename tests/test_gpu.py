"""Gates on a GPU: the kernel in the interpreter, for real where there is a GPU; buckets of prefixes on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur.runtime.gpu as package
from gated_nets import curious, lived, varied
from on_gpu import off
from random_nets import actions
from secateur.models.cifar_resnet import resnet20
from secateur.runtime.gates import Steered, acting, controller_for, deciding, gate
from secateur.runtime.gpu import compile_cuda
from secateur.runtime.gpu.layers import Walk
from secateur.types import EngineError

HERE = Path(__file__).parent
ON_CUDA = pytest.param({}, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"), id="cuda")


@pytest.mark.parametrize(
    "where", [pytest.param({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}, id="interpreter"), ON_CUDA]
)
def test_the_kernel(where: dict[str, str]) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", str(HERE / "on_gpu.py")]
    ignored = ["-W", "ignore:TRITON_DEFAULT_FP_FUSION", "-p", "no:randomly"]
    done = subprocess.run(
        command + ignored, env={**os.environ, **where}, cwd=HERE.parent, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(("precision", "tensor_cores"), [("ieee", False), ("tf32", True)])
def test_the_kernel_becomes_machine_code(
    precision: str, tensor_cores: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton translates without a GPU, for one of compute capability 9.0; nothing runs."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from secateur.runtime.gpu import kernel
    from secateur.runtime.gpu.convolve import IN, OUT, PIXELS

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    fixed = {"TAPS_X": 3, "TAPS": 9, "LISTED_IN": True, "LISTED_OUT": True, "BOOSTED": True, "RELU": True}
    fixed |= {"PRECISION": precision, "OUT": OUT, "IN": IN, "PIXELS": PIXELS}
    kinds = dict.fromkeys(["x", "weight", "shift", "pi", "out"], "*fp32") | dict.fromkeys(["ids_in", "ids_out"], "*i64")
    kinds |= dict.fromkeys(fixed, "constexpr")
    signature = {name: kinds.get(name, "i32") for name in kernel.gathered.arg_names}
    source = triton.compiler.ASTSource(fn=kernel.gathered, signature=signature, constexprs=fixed)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert made.asm["cubin"]
    assert ("mma" in made.asm["ptx"]) == tensor_cores


@pytest.fixture
def prefixed() -> tuple[nn.Module, torch.Tensor]:
    x = varied(6, 3, 16, 16)
    return gate(lived(resnet20(width=8, depth=8)), None, x).model, x


def test_prefixes_per_layer_and_sample(prefixed: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = prefixed
    compiled = compile_cuda(model, x)
    assert compiled.reason == ""
    paths = actions(model, 6)
    for chosen in (paths, {path: torch.full((6,), 4) for path in paths}, dict(list(paths.items())[3:])):
        with acting(model, chosen), torch.no_grad():
            assert off(compiled(x, chosen), model(x)) <= 1e-4
    with torch.no_grad():
        assert off(compiled(x), model(x)) <= 1e-4


def test_a_bucket_convolves_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    x, seen = varied(5, 3, 8, 8), []
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU())
    compiled = compile_cuda(gate(net, None, x).model, x)
    real = torch.nn.functional.conv2d

    def noted(x: torch.Tensor, weight: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append((len(x), *weight.shape[:2]))
        return real(x, weight, *rest)

    monkeypatch.setattr(torch.nn.functional, "conv2d", noted)
    compiled(x, {"0": torch.tensor([1, 1, 2, 4, 4]), "2": torch.tensor([1, 1, 3, 3, 3])})
    assert seen == [(2, 2, 3), (1, 4, 3), (2, 8, 3), (2, 1, 2), (1, 3, 4), (2, 3, 8)]


@pytest.mark.parametrize(("bias", "several"), [(0.0, True), (-100.0, False)])
def test_under_a_controller(prefixed: tuple[nn.Module, torch.Tensor], bias: float, several: bool) -> None:
    model, x = prefixed
    steered = Steered(model, controller_for(model, 16, 16), bias).eval()
    nn.init.normal_(steered.controller.decoder.weight)
    compiled = compile_cuda(steered, x)
    with torch.no_grad():
        assert off(compiled(x), steered(x)) <= 1e-4
    with deciding(model, steered.controller, bias=bias) as episode, torch.no_grad():
        model(x)
    assert (len(episode.actions.unique()) > 1) == several


@pytest.mark.parametrize("side", [7, 8, 9])
def test_pools_that_round_up(side: int) -> None:
    x = varied(2, 3, side, side)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.ReLU(), nn.AvgPool2d(2))
    with torch.no_grad():
        assert off(compile_cuda(model, x)(x), model(x)) <= 1e-4


def test_a_network_and_the_settings_of_torch_stay_as_they_were() -> None:
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # torch's default
    model, x = lived(resnet20(width=8, depth=8)).train(), varied(2, 3, 16, 16)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    compiled = compile_cuda(model, x.half())
    assert model.training
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    with torch.no_grad():
        assert off(compiled(x), model.eval()(x)) <= 1e-4


def test_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    x = varied(1, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    model = curious(gate(net, 0.5, x).model, x)
    pytest.importorskip("triton")
    with pytest.raises(EngineError, match=r"takes CUDA tensors; these are on cpu\. Move model and inputs to the GPU"):
        compile_cuda(model, x)
    with pytest.raises(EngineError, match="one device; they are on meta and cpu"):
        compile_cuda(nn.Conv2d(3, 4, 3, device="meta"), x)
    monkeypatch.delattr(package, "kernel")
    monkeypatch.setitem(sys.modules, "secateur.runtime.gpu.kernel", None)
    with pytest.raises(EngineError, match="need triton, which comes with torch"):
        compile_cuda(model, x)
    monkeypatch.setattr(Walk, "__call__", lambda self, x: torch.zeros(1, 4, 6, 6))
    with pytest.raises(EngineError, match=r"off by 1.0e\+00 of the largest output"):
        compile_cuda(net, x)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_graph_needs_a_gpu() -> None:
    with pytest.raises(EngineError, match="needs a CUDA device"):
        compile_cuda(nn.Conv2d(3, 4, 3), torch.rand(1, 3, 8, 8), graph=True)
