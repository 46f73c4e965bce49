"""A convolution that computes what its gate chooses: listed channels (FBS) or prefixes by bucket (RNP)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from secateur.runtime.gates import FBS, Prefix
from secateur.runtime.gpu.filters import Filters
from secateur.runtime.gpu.maps import Maps
from secateur.types import EngineError

OUT, IN, PIXELS = 32, 32, 64  # what one program of the kernel computes; not tuned on any GPU


def convolved(x: Maps, filters: Filters, gate: nn.Module | None) -> Maps:
    """Return what a layer computes of ``x``: gate, convolution, norm, pi and ReLU.

    Channels in groups, and layers without a choice to make, are torch's convolution of whole maps.
    """
    if isinstance(gate, FBS):
        return _boosted(x, filters, gate)
    if isinstance(gate, Prefix) and gate.policy is not None:
        return bucketed(x, filters, gate(x.whole()).mask.sum(1))
    if filters.node.groups == 1 and x.ids is not None:
        return gathered(x, filters)
    if filters.node.groups == 1 and x.counts is not None:
        return bucketed(x, filters, None)
    return Maps(_finished(filters.run(x.whole()), filters), len(filters.shift))


def _boosted(x: Maps, filters: Filters, gate: FBS) -> Maps:
    """The layer of an FBS gate: its k winners, scaled by their saliencies."""
    saliency = gate.predictor.bias.expand(len(x.values), -1)
    if gate.enabled:
        saliency = gate.predictor(x.pooled(gate.pooling))
    saliency = saliency.relu()
    ids = None
    if gate.k < saliency.shape[1]:  # of equal saliencies the lower index wins, as in ``winners``
        order = saliency.sort(dim=1, descending=True, stable=True).indices
        ids = order[:, : gate.k].sort(dim=1).values
    if filters.node.groups == 1 and (ids is not None or x.ids is not None):
        return gathered(x, filters, ids, saliency if ids is None else saliency.gather(1, ids))
    if ids is not None:
        saliency = torch.zeros_like(saliency).scatter_(1, ids, saliency.gather(1, ids))
    return Maps(_finished(filters.run(x.whole()) * saliency[:, :, None, None], filters), saliency.shape[1])


def _finished(y: Tensor, filters: Filters) -> Tensor:
    return y.relu() if filters.node.relu else y


def gathered(x: Maps, filters: Filters, ids: Tensor | None = None, pi: Tensor | None = None) -> Maps:
    """Return the outputs ``ids`` (B, K_out) int64 of each sample (None: all), scaled by ``pi`` (B, K_out), compact.

    Runs the Triton kernel: for each sample, tile of outputs and tile of pixels, the sum over the taps of
    weights (outputs, inputs) times inputs (inputs, pixels), of listed channels only; then shift, pi and ReLU.

    Raises ``EngineError`` without Triton, or for tensors of the CPU outside Triton's interpreter.
    """
    kernel = _kernel(x.values.device)
    values, weight = x.values.contiguous(), filters.packed
    batch, inputs, height, width = values.shape
    size = filters.size(height, width)
    outputs = len(filters.shift) if ids is None else ids.shape[1]
    out = values.new_empty(batch, outputs, *size)
    node = filters.node
    if out.numel():
        kernel[batch, -(-size[0] * size[1] // PIXELS), -(-outputs // OUT)](
            values, weight, filters.shift, pi if pi is None else pi.contiguous(), x.ids, ids, out,
            inputs, outputs, weight.shape[3], weight.shape[2],
            height, width, *size,
            *node.stride, *node.padding, *node.dilation,
            TAPS_X=node.kernel[1], TAPS=node.kernel[0] * node.kernel[1],
            LISTED_IN=x.ids is not None, LISTED_OUT=ids is not None, BOOSTED=pi is not None, RELU=node.relu,
            PRECISION=precision(values.device), OUT=OUT, IN=IN, PIXELS=PIXELS,
        )  # fmt: skip
    return Maps(out, len(filters.shift), ids)


def precision(device: torch.device) -> str:
    """Return how the kernel multiplies: ``tf32`` where torch's own convolutions may, else ``ieee``."""
    rounded = device.type == "cuda" and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if rounded else "ieee"


def _kernel(device: torch.device) -> Any:
    try:
        from secateur.runtime.gpu import kernel
    except ImportError as error:
        raise EngineError(
            "gates on a GPU need triton, which comes with torch for CUDA on Linux; `pip install triton`, or run the "
            "model on the CPU with the engine."
        ) from error
    if device.type != "cuda" and not kernel.INTERPRETED:
        raise EngineError(
            f"the kernel of gates on a GPU takes CUDA tensors; these are on {device.type}. Move model and inputs to "
            "the GPU (TRITON_INTERPRET=1, set before the start, emulates it, slowly)."
        )
    return kernel.gathered


def bucketed(x: Maps, filters: Filters, outputs: Tensor | None) -> Maps:
    """Return whole maps with the first ``outputs`` (B,) channels of each sample, the others zero.

    Samples that compute the same number of outputs from the same number of leading inputs form a bucket, and each
    bucket is one convolution of torch with a slice of the weights: at most groups^2 of them.  The numbers go to the
    host, so this cannot be part of a CUDA graph.
    """
    values, batch, after = x.whole(), len(x.values), len(filters.shift)
    grouped = filters.node.groups > 1  # slices of weights would mix up the groups
    before = values.shape[1]
    full_in, full_out = (torch.full((batch,), n, device=values.device) for n in (before, after))
    pairs = torch.stack(
        [full_in if x.counts is None or grouped else x.counts, full_out if outputs is None else outputs]
    )
    kinds, which = pairs.cpu().unique(dim=1, return_inverse=True)
    out = values.new_zeros(batch, after, *filters.size(*values.shape[2:]))
    for number, (some_in, some_out) in enumerate(kinds.T.tolist()):
        members = (which == number).nonzero()[:, 0].to(values.device)
        if grouped:
            found = filters.run(values[members])[:, :some_out]
        else:
            found = filters.run(values[members, :some_in], some_in, some_out)
        out[members, :some_out] = _finished(found, filters)
    return Maps(out, after, counts=outputs)
