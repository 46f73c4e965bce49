"""The portable path equals the masked reference, and computes no channel that was not chosen."""

from __future__ import annotations

import concurrent.futures
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from onnx import TensorProto, helper
from torch import nn

from gated_nets import curious, lived, varied
from random_nets import actions, margin, network
from secateur.models.cifar_resnet import resnet20
from secateur.models.cifarnet import cifarnet
from secateur.models.s0 import s0
from secateur.models.vgg import vgg
from secateur.runtime.gates import Steered, acting, controller_for, gate, watch
from secateur.runtime.gates import fbs as reference
from secateur.runtime.portable import Fallback, Portable, compile_portable, gates, layers
from secateur.runtime.portable.graph import Graph
from secateur.types import EngineError

NARROW = (8, 8, 12, 12, 12, 16, 16, 16)
MODELS = {
    "cifarnet": lambda: cifarnet(widths=NARROW),
    "vgg": lambda: vgg(depth=11, width=0.2),
    "resnet20": lambda: resnet20(width=8, depth=8),
    "resnet18": lambda: torchvision.models.resnet18(num_classes=5),
}


def off(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    assert got.shape == expected.shape
    assert expected.isfinite().all(), "the test network explodes"
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-20)) if expected.numel() else 0.0


@pytest.mark.parametrize("rich", [False, True])
@pytest.mark.parametrize("seed", range(100, 116))
def test_random_networks_equal_their_masks(seed: int, rich: bool) -> None:
    model, x = network(seed, rich)
    portable = compile_portable(model, x, strict=True)
    chosen = actions(model, len(x))
    with acting(model, chosen), torch.no_grad():
        expected = model(x)
    error = off(portable(x, chosen) if chosen else portable(x), expected)
    assert error <= 1e-4 or margin(model, x) < 1e-5, f"off by {error}"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("density", [1.0, 0.5, 0.3])
def test_fbs_equals_the_masks(name: str, density: float) -> None:
    x = varied(3, 3, 64, 64) if name == "resnet18" else varied(3, 3, 35, 27)
    model = curious(gate(lived(MODELS[name]()), density, x).model, x)
    portable = compile_portable(model, x, strict=True)
    with torch.no_grad():
        assert off(portable(x), model(x)) <= 1e-4


@pytest.mark.parametrize("pair", [0, 1e9])
def test_inputs_are_picked_or_computed_with_zeros(pair: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "PAIR", pair)
    x = varied(2)
    model = curious(gate(lived(cifarnet(widths=NARROW)), 0.5, x).model, x)
    portable = compile_portable(model, x, strict=True)
    with torch.no_grad():
        assert off(portable(x), model(x)) <= 1e-4
    inputs = [shapes[1][1] for shapes in convolutions(portable, x[:1])]
    assert inputs[1:] == ([4, 4, 6, 6, 6, 8, 8] if pair == 0 else [8, 8, 12, 12, 12, 16, 16])


def convolutions(portable: Portable, x: torch.Tensor, **more: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes of the output and of the weights of every convolution."""
    model = onnx.load_from_string(portable.file)
    nodes = [node for node in model.graph.node if node.op_type == "Conv"]
    names = [name for node in nodes for name in (node.output[0], node.input[1])]
    constant = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    wanted = [name for name in names if name not in constant]
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in wanted)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(wanted, {"image": x.numpy(), **more})
    shapes = constant | {name: array.shape for name, array in zip(wanted, found, strict=True)}
    return [(shapes[a], shapes[b]) for a, b in zip(names[::2], names[1::2], strict=True)]


def test_only_the_winners_are_computed() -> None:
    x = varied(1)
    model = curious(gate(lived(cifarnet(widths=NARROW)), 0.5, x).model, x)
    found = convolutions(compile_portable(model, x, strict=True), x)
    assert [after[1] for after, _ in found] == [4, 4, 6, 6, 6, 8, 8, 8]
    assert [weight[0] for _, weight in found] == [4, 4, 6, 6, 6, 8, 8, 8]


def test_only_the_prefixes_are_computed() -> None:
    x = varied(1)
    portable = compile_portable(gate(lived(s0(widths=[8, 8, 12, 12])), None, x).model, x, strict=True)
    found = convolutions(portable, x, actions=np.array([4, 1, 3, 2]))
    assert [weight[:2] for _, weight in found] == [(8, 3), (2, 8), (9, 2), (6, 9)]
    assert [after[1] for after, _ in found] == [8, 2, 9, 6]


@pytest.mark.parametrize("k", [1, 3, 8, 39])
def test_of_equal_saliencies_the_lower_index_wins(k: int) -> None:
    saliency = torch.randint(0, 4, (200, 40)).float()
    graph = Graph()
    _, ids = gates.winners(graph, "image", k)
    nodes = graph.model({"image": (np.float32, [1, 40])}, ids)
    file = onnx.load_from_string(nodes)
    file.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    session = onnxruntime.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])
    found = torch.zeros(200, 40, dtype=torch.bool)
    for mask, row in zip(found, saliency, strict=True):
        mask[torch.from_numpy(session.run(None, {"image": row[None].numpy()})[0])] = True
    assert torch.equal(found, reference.winners(saliency, k))


@pytest.mark.parametrize("name", ["resnet20", "s0"])
def test_prefixes_per_layer_and_sample(name: str) -> None:
    x = varied(5)
    done = gate(lived(s0() if name == "s0" else resnet20(width=8, depth=8)), None, x, groups=4)
    portable = compile_portable(done.model, x, strict=True)
    for chosen in (actions(done.model, 5), {path: torch.full((5,), 4) for path in done.gated}):
        with acting(done.model, chosen), torch.no_grad():
            assert off(portable(x, chosen), done.model(x)) <= 1e-4
    with pytest.raises(EngineError, match="actions must name"):
        portable(x, {})
    with pytest.raises(EngineError, match="got 0 to 0"):
        portable(x, {path: torch.zeros(5) for path in done.gated})


@pytest.mark.parametrize("bias", [0.0, -0.05])
def test_the_controller_decides_in_the_graph(bias: float) -> None:
    x = varied(6)
    model = gate(lived(resnet20(width=8, depth=8)), None, x).model
    controller = controller_for(model, embed=6, hidden=10)
    for parameter in controller.parameters():
        nn.init.normal_(parameter, std=0.4)
    steered = Steered(model, controller, bias).eval()
    with watch(steered) as choices, torch.no_grad():
        expected = steered(x)
    assert any(len(set(choice.mask.sum(1).tolist())) > 1 for choice in choices.values()), "the policy is a constant"
    assert off(compile_portable(steered, x, strict=True)(x), expected) <= 1e-4


def test_a_gate_that_is_switched_off_is_told() -> None:
    x = varied(2)
    model = gate(lived(cifarnet(widths=NARROW)), 0.5, x).model
    model[3].gate.enabled = False
    assert "the gate '3.gate' is switched off" in compile_portable(model, x).reason


@pytest.mark.parametrize("gated", [True, False])
def test_any_batch_and_several_callers(gated: bool) -> None:
    x = varied(4)
    model = lived(resnet20(width=8, depth=8))
    model = curious(gate(model, 0.5, x).model, x) if gated else model
    portable = compile_portable(model, x, strict=True, threads=2)
    for batch in (0, 1, 5):
        images = varied(batch)
        with torch.no_grad():
            assert off(portable(images.half()), model(images.half().float())) <= 1e-4
    with pytest.raises(EngineError, match=r"compiled for \(B, 3, 32, 32\); got \(4, 3, 31, 32\)"):
        portable(x[:, :, 1:])
    expected = portable(x)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(got, expected) for got in pool.map(portable, [x] * 12))


def test_what_cannot_be_expressed_runs_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 2, 1)).eval()
    x = torch.rand(2, 3, 8, 8)
    portable = compile_portable(model, x)
    assert isinstance(portable, Fallback)
    assert "aten::gelu in '1'" in portable.reason
    with torch.no_grad():
        assert torch.equal(portable(x), model(x))
    with pytest.raises(EngineError, match="gelu"):
        compile_portable(model, x, strict=True)


def test_policies_that_are_python_are_refused() -> None:
    x = varied(1)
    done = gate(lived(s0()), None, x)
    with acting(done.model, {done.gated[1]: torch.ones(1, dtype=torch.int64)}):
        portable = compile_portable(done.model, x)
    assert "policy of its own" in portable.reason
