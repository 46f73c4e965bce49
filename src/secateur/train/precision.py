"""Where bfloat16 pays while training."""

from __future__ import annotations

import torch
from torch import nn

WORTH = 2**23  # multiply-accumulates of a forward step below which the conversions cost more than they save


def half_pays(model: nn.Module, device: torch.device, macs: float) -> bool:
    """Return whether training passes of ``model`` with ``macs`` multiply-accumulates are faster in bfloat16.

    GPUs: where they have it.  CPUs: where instructions for it are there (AVX512-BF16, AMX) and all convolutions are
    plain ones; those over single channels took 1.55 times as long (MobileNetV2).
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    convolutions = [m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    plain = bool(convolutions) and all(m.groups == 1 for m in convolutions)
    return device.type == "cpu" and plain and macs >= WORTH and _has_instructions()


def _has_instructions() -> bool:
    found = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(bool(ask()) for ask in found if ask is not None)
