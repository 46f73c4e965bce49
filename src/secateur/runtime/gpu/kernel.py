"""The Triton kernel: a convolution of listed input channels into listed output channels, as an implicit GEMM.

Loaded only when something is to run on it: Triton is there on Linux only, and decides as it is loaded whether it
compiles for the GPU or interprets (``TRITON_INTERPRET=1``, tensors of the CPU).
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def gathered(
    x, weight, shift, pi, ids_in, ids_out, out,  # tensors: see ``convolve.gathered``
    inputs, outputs, all_inputs, all_outputs,
    height, width, out_height, out_width,
    stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x,
    TAPS_X: tl.constexpr, TAPS: tl.constexpr,
    LISTED_IN: tl.constexpr, LISTED_OUT: tl.constexpr, BOOSTED: tl.constexpr, RELU: tl.constexpr,
    PRECISION: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """One program computes ``OUT`` listed outputs at ``PIXELS`` pixels of one sample."""
    sample = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    place = tl.program_id(2) * OUT + tl.arange(0, OUT)
    real = place < outputs
    unit = place
    if LISTED_OUT:
        unit = tl.load(ids_out + sample * outputs + place, mask=real, other=0)
    top = pixel // out_width * stride_y - pad_y
    left = pixel % out_width * stride_x - pad_x
    drawn = pixel < out_height * out_width
    total = tl.zeros((OUT, PIXELS), dtype=tl.float32)
    for first in range(0, inputs, IN):
        nth = first + tl.arange(0, IN)
        given = nth < inputs
        channel = nth
        if LISTED_IN:
            channel = tl.load(ids_in + sample * inputs + nth, mask=given, other=0)
        planes = x + (sample * inputs + nth[:, None]) * height * width
        for tap in range(TAPS):
            down = tap // TAPS_X
            row = top + down * dilation_y
            column = left + (tap - down * TAPS_X) * dilation_x
            inside = drawn & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            image = tl.load(planes + (row * width + column)[None, :], mask=given[:, None] & inside[None, :], other=0.0)
            filters = weight + (tap * all_outputs + unit[:, None]) * all_inputs + channel[None, :]
            taps = tl.load(filters, mask=real[:, None] & given[None, :], other=0.0)
            total = tl.dot(taps, image, total, input_precision=PRECISION)
    total += tl.load(shift + unit, mask=real, other=0.0)[:, None]
    if BOOSTED:
        total *= tl.load(pi + sample * outputs + place, mask=real, other=0.0)[:, None]
    if RELU:
        total = tl.where(total < 0, 0.0, total)  # a NaN stays one
    target = out + (sample * outputs + place[:, None]) * (out_height * out_width) + pixel[None, :]
    tl.store(target, total, mask=real[:, None] & drawn[None, :])
