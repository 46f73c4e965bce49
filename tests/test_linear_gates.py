"""Gated linear layers in the engine and in ONNX Runtime: vectors, as maps of one pixel."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gated_nets import curious, lived, varied
from random_nets import actions, margin
from secateur.runtime.engine import compile_engine
from secateur.runtime.gates import acting, gate, layers
from secateur.runtime.portable import compile_portable

WAYS = {"engine": compile_engine, "portable": compile_portable}
HEADS = {
    "pooled": lambda: [nn.AdaptiveAvgPool2d(1), nn.Flatten()],
    "one pixel": lambda: [nn.Conv2d(13, 16, 6), nn.ReLU(), nn.Flatten()],
}
WIDTHS = {"pooled": 13, "one pixel": 16}


def classifier(head: str, density: float | None, pooling: str = "l1") -> tuple[nn.Module, torch.Tensor]:
    """Two convolutions and three linear layers; all but the last of each kind of output have gates."""
    torch.manual_seed(5)
    x = varied(33, 3, 8, 8)
    body = [nn.Conv2d(3, 9, 3, padding=1, bias=False), nn.BatchNorm2d(9), nn.ReLU(), nn.Conv2d(9, 13, 3), nn.ReLU()]
    hidden = [nn.Linear(WIDTHS[head], 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Dropout(0.5)]
    last = [nn.Linear(40, 23, bias=False), nn.ReLU(), nn.Linear(23, 7)]
    model = lived(nn.Sequential(*body, *HEADS[head](), *hidden, *last))
    return curious(gate(model, density, x, everywhere=True, pooling=pooling, groups=3).model, x), x


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("density", "pooling"), [(0.5, "l1"), (0.3, "avg"), (0.7, "max"), (0.5, "l2"), (1.0, "l1")])
def test_they_equal_their_masks(way: str, head: str, density: float, pooling: str) -> None:
    model, x = classifier(head, density, pooling)
    linear = [layer.conv for layer in layers(model) if isinstance(model.get_submodule(f"{layer.conv}.conv"), nn.Linear)]
    assert len(linear) == 2
    run = WAYS[way](model, x[:2], strict=True)
    for batch in (x, x[:1], x[:0]):
        with torch.no_grad():
            expected = model(batch)
        error = (run(batch) - expected).abs().max() / expected.abs().max() if len(batch) else 0.0
        assert error <= 1e-4 or margin(model, batch) < 1e-5
        assert run(batch).shape == expected.shape


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("head", HEADS)
def test_prefixes_of_neurons_equal_their_masks(way: str, head: str) -> None:
    model, x = classifier(head, None)
    run = WAYS[way](model, x[:2], strict=True)
    chosen = actions(model, len(x))
    assert len(chosen) == len(layers(model)) >= 4
    with acting(model, chosen), torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(run(x, chosen), expected, rtol=1e-4, atol=1e-4)
