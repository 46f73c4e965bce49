"""Constants made in the graph: uniform ones are free (fresh cells), others have fixed positions."""

from __future__ import annotations

from secateur.graph.flow import Axes, Axis, Flow
from secateur.graph.rules.table import base_name, rule
from secateur.graph.trace import Op

MAX_FREE = 1 << 16  # longer axes are positions (pixels, tokens), never units


@rule("zeros ones full empty new_zeros new_ones new_full new_empty empty_strided new_empty_strided rand randn")
def uniform(flow: Flow, op: Op) -> None:
    """A constant that is the same at every position takes whatever units it meets."""
    index = op.outs[0]
    if index is None:
        return
    zero = base_name(op.target) in ("aten::zeros", "aten::new_zeros", "aten::empty", "aten::new_empty")
    out: Axes = [Axis(flow.cells.fresh(size), zero) if 1 < size <= MAX_FREE else None for size in flow.shape(index)]
    flow.set(out)


@rule(
    "arange linspace eye scalar_tensor randint randperm tril_indices triu_indices logspace multinomial "
    "normal uniform random exponential tril triu _local_scalar_dense item is_nonzero equal _nested_tensor "
    "hann_window hamming_window bernoulli_p sym_size _pin_memory record_stream set_ "
)
def fixed(flow: Flow, op: Op) -> None:
    """Positions with a meaning of their own; units that come in stay where they are in a triangle, else freeze."""
    name = base_name(op.target)
    if name in ("aten::tril", "aten::triu"):
        axes = flow.of(op.args[0])
        flow.block(axes[-2:])
        flow.set([*axes[:-2], None, None])
