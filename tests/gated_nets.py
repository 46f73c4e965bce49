"""Networks as after training for the tests of gates and engine: lived-in norms, predictors that look at inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from secateur.runtime.gates import FBS
from secateur.runtime.gates.fbs import pooled


def lived(model: nn.Module) -> nn.Module:
    """``model`` with statistics and affine parameters as after training, negative and zero scales among them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.normal_(module.weight, 0.5, 0.5)
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            with torch.no_grad():
                module.weight[0] = 0
    return model.eval()


@torch.no_grad()
def curious(model: nn.Module, x: torch.Tensor, scale: float = 0.5) -> nn.Module:
    """A gated model whose predictors look at their inputs: saliencies vary by ``scale`` over ``x``, layer by layer.

    Saliencies grow with the activations that they scale: much larger ones square every error from layer to layer.
    """

    def calibrate(gate: FBS, args: Any) -> None:
        nn.init.normal_(gate.predictor.weight)
        seen = pooled(args[0], gate.pooling) @ gate.predictor.weight.T
        gate.predictor.weight.div_(seen.std().clamp_min(1e-6) / scale)

    handles = [m.register_forward_pre_hook(calibrate) for m in model.modules() if isinstance(m, FBS)]
    model.eval()(x)
    for handle in handles:
        handle.remove()
    return model


def varied(batch: int, *shape: int) -> torch.Tensor:
    """Images whose channels differ in brightness and contrast, so that gates choose differently."""
    shape = shape or (3, 32, 32)
    spread = torch.rand(batch, shape[0], 1, 1) * 2
    return torch.randn(batch, *shape) * spread + torch.randn(batch, shape[0], 1, 1)
