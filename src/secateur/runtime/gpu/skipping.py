"""Gated layers inside a network of other modules: whole maps come in and go out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.runtime.gates import Gated
from secateur.runtime.gpu.convolve import convolved
from secateur.runtime.gpu.filters import Filters
from secateur.runtime.gpu.maps import Maps
from secateur.runtime.program import gated_node
from secateur.types import EngineError


class Skipping(nn.Module):
    """What takes the place of a ``Gated`` layer in eval mode: the same function, but only the chosen is computed."""

    def __init__(self, path: str, layer: Gated, device: torch.device) -> None:
        super().__init__()
        self.gate = layer.gate
        self.filters = Filters.of(gated_node(path, layer, 0, 1), layer.gate, device)

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated maps (B, C, H, W) of ``x``."""
        return convolved(Maps(x.float(), x.shape[1]), self.filters, self.gate).whole()


def skip_(model: nn.Module, device: torch.device) -> list[str]:
    """Put ``Skipping`` in the place of the gated layers of ``model``; return why others are left as they are."""
    left = []
    for path, layer in [(p, m) for p, m in model.named_modules() if isinstance(m, Gated)]:
        try:
            model.set_submodule(path, Skipping(path, layer, device))
        except EngineError as error:
            left.append(f"{path}: {error}")
    return left
