"""Pooling, resampling and patches: channels pass, spatial axes have no units."""

from __future__ import annotations

import numpy as np

from secateur.graph.flow import Axes, Axis, Flow
from secateur.graph.rules.table import arg, base_name, rule, tensor_refs
from secateur.graph.trace import Op

# how many trailing axes are spatial; 2 unless named here
SPATIAL = {"1d": 1, "2d": 2, "3d": 3, "linear1d": 1, "trilinear3d": 3}


@rule(
    "max_pool2d_with_indices max_pool3d_with_indices max_pool1d_with_indices max_pool1d max_pool2d max_pool3d "
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d _adaptive_avg_pool2d adaptive_avg_pool2d "
    "_adaptive_avg_pool3d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
    "mkldnn_max_pool2d fractional_max_pool2d "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d "
    "upsample_linear1d upsample_trilinear3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "_upsample_nearest_exact3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa upsample_lanczos2d "
    "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d "
    "grid_sampler_2d grid_sampler_3d max_unpool2d "
)
def pool(flow: Flow, op: Op) -> None:
    """Everything but the trailing spatial axes passes."""
    axes = list(flow.of(op.args[0]))
    name = base_name(op.target)
    n = 1 if "1d" in name else 3 if "3d" in name else 2
    flow.block(axes[len(axes) - n :], f"spatial axes of {flow.where}")
    out: Axes = [*axes[: len(axes) - n], *[None] * n]
    for ref in tensor_refs(op)[1:]:
        if "unpool" in name and len(flow.of(ref)) == len(axes):  # positions per channel: they follow the values
            out = [flow.tie(a, b) for a, b in zip(out, flow.of(ref), strict=True)]
        else:
            flow.block(flow.of(ref), f"coordinates of {flow.where}")
    for k in range(len(op.outs)):
        flow.set(out, k)


@rule("torchvision::roi_align torchvision::roi_pool torchvision::_roi_align")
def regions(flow: Flow, op: Op) -> None:
    """Channels of the feature map pass to every region."""
    axes = flow.of(op.args[0])
    flow.block([axes[0], *axes[2:], *flow.of(op.args[1])], f"regions of {flow.where}")
    flow.set([None, axes[1], None, None])


@rule("im2col")
def unfold_patches(flow: Flow, op: Op) -> None:
    """(N, C, H, W) -> (N, C k k, L): each channel is repeated over the window."""
    axes = flow.of(op.args[0])
    window = int(np.prod(arg(op, 1, "kernel_size")))
    at = len(axes) - 3
    channel = axes[at]
    flow.block(axes[at + 1 :])
    ids = Axis(np.repeat(channel.ids, window), channel.zero) if channel is not None else None
    flow.set([*axes[:at], ids, None])


@rule("col2im")
def fold_patches(flow: Flow, op: Op) -> None:
    """(N, C k k, L) -> (N, C, H, W): the window positions of a channel go together."""
    axes = flow.of(op.args[0])
    window = int(np.prod(arg(op, 2, "kernel_size")))
    at = len(axes) - 2
    channel = axes[at]
    flow.block(axes[at + 1 :])
    out = None
    if channel is not None:
        grid = flow.cells.factor(channel.ids.reshape(-1, window), flow.where)
        if grid[1] is not None:
            flow.cells.freeze(grid[1], flow.where)
        out = Axis(grid[0], channel.zero) if grid[0] is not None else None
    flow.set([*axes[:at], out, None, None])


@rule("unfold")
def window(flow: Flow, op: Op) -> None:
    """``Tensor.unfold``: windows along one axis become a last axis."""
    axes = list(flow.of(op.args[0]))
    dim = op.args[1] % max(len(axes), 1)
    flow.block([axes[dim]], f"windows of {flow.where}")
    axes[dim] = None
    flow.set([*axes, None])
