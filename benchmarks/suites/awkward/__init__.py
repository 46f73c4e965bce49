"""Tiny networks of one awkward construct each, written the way users write them."""

from __future__ import annotations

from benchmarks.suites.awkward import (  # noqa: F401 - importing lists the cases
    attention,
    attention_heads,
    attention_modern,
    concat,
    conditional,
    conv,
    conv_more,
    conv_weights,
    inputs,
    interfaces,
    models,
    movement,
    movement_more,
    norms,
    norms_more,
    recurrent,
    sizes,
    sizes_computed,
    structure,
    tensors,
    vision,
)
from benchmarks.suites.awkward.collect import CASES

__all__ = ["CASES"]
