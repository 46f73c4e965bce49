"""The engine and gates that it does not know: the model runs as it is, with a reason, and right."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gated_nets import curious, lived, varied
from secateur.models.build import build
from secateur.runtime.engine import Engine, Fallback, compile_engine
from secateur.runtime.gates import gate
from secateur.types import EngineError


def local() -> tuple[nn.Module, Tensor]:
    x = varied(3)
    model = gate(lived(build("cifarnet", widths=[8] * 8)), 0.5, x, threshold="local").model
    curious(model, x).train()(x)
    return model.eval(), x


def everywhere(name: str, **kwargs: object) -> tuple[nn.Module, Tensor]:
    x = varied(3)
    return curious(gate(lived(build(name, **kwargs)), 0.5, x, everywhere=True).model, x), x


CASES = {
    "a linear layer": (lambda: everywhere("s0", widths=[8, 8, 6, 4]), "a linear layer that reads"),
    "a shared mask": (lambda: everywhere("wide_resnet", depth=10, width=0.5), "shares the mask"),
    "depthwise": (lambda: everywhere("torchvision:mobilenet_v2"), "shares the mask"),
    "an activation": (lambda: everywhere("torchvision:convnext_tiny"), "aten::"),
    "a running threshold": (local, "running threshold"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_the_engine_does_not_know_runs_as_it_is(name: str) -> None:
    make, why = CASES[name]
    model, x = make()
    engine = compile_engine(model, x)
    assert isinstance(engine, Fallback)
    assert why in engine.reason
    with torch.no_grad():
        assert torch.equal(engine(x), model(x))
    with pytest.raises(EngineError, match=why):
        compile_engine(model, x, strict=True)


def test_chains_run_in_the_engine_with_everywhere_too() -> None:
    model, x = everywhere("resnet20", width=8, depth=8)
    engine = compile_engine(model, x, strict=True)
    assert isinstance(engine, Engine)
    with torch.no_grad():
        torch.testing.assert_close(engine(x), model(x), rtol=1e-4, atol=1e-4)
