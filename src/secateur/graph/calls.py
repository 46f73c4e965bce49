"""Python-level calls whose integers may be sizes of unit axes, and what those integers become after a cut.

A call recorded on the dense model knows the unit ids of its tensors.  ``bind`` keeps only calls that touch units;
``expected`` says, for a keep vector, which arguments the same line of Python needs on the smaller model.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from secateur.graph.flow import Flow

SHAPES = frozenset(["view", "reshape", "unflatten", "expand", "broadcast_to"])
MAKES = frozenset(["zeros", "ones", "full", "empty", "rand", "randn", "new_zeros", "new_ones", "new_full", "new_empty"])
SPLITS = frozenset(["split", "split_with_sizes", "chunk", "tensor_split", "unsafe_chunk"])
SLICES = frozenset(["__getitem__", "__setitem__", "narrow"])
OTHERS = frozenset(
    [
        "repeat",
        "tile",
        "repeat_interleave",
        "pad",
        "roll",
        "layer_norm",
        "group_norm",
        "instance_norm",
        "rms_norm",
        "channel_shuffle",
        "native_channel_shuffle",
        "scaled_dot_product_attention",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
    ]
)
SCALARS = frozenset(
    ["mul", "div", "__mul__", "__rmul__", "__truediv__", "__rtruediv__", "__imul__", "__itruediv__", "mul_", "div_"]
)
LIKE = frozenset(["expand_as", "view_as", "reshape_as"])
CALLS = LIKE | SCALARS | SHAPES | MAKES | SPLITS | SLICES | OTHERS


def counted_as(name: str) -> str:
    """The name a call is counted under: a chunk that became a split stays the same call.

    >>> counted_as("chunk"), counted_as("view")
    ('split', 'view')
    """
    return "split" if name in SPLITS else name


Ids = tuple[np.ndarray | None, ...]


@dataclass(frozen=True, eq=False)
class BoundCall:
    """A recorded call with the unit ids of its tensor arguments and results.

    ``owners`` lists (module path, how many calls of this name its forward had made before).  A call with a number
    (``SCALARS``) has all unit ids of the graph as its inputs; it is ``suspect`` when the number may be a size.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[Ids, ...]
    shapes: tuple[tuple[int, ...], ...]
    results: tuple[Ids, ...]
    result_shapes: tuple[tuple[int, ...], ...]
    module: str
    owners: tuple[tuple[str, int], ...]
    suspect: bool = False


def bind(flow: Flow, unit_of: np.ndarray) -> tuple[BoundCall, ...]:
    """Return the recorded calls that touch an axis with units."""
    from torch.utils import _pytree as pytree

    from secateur.graph.trace import Ref

    def ids(value: int) -> Ids:
        out = []
        for axis in flow.axes[value]:
            found = unit_of[flow.cells.find(axis.ids)] if axis is not None else None
            out.append(found if found is not None and (found >= 0).any() else None)
        return tuple(out)

    lengths: dict[int, list[np.ndarray]] = {}
    seen: set[int] = set()
    for axes in flow.axes:
        for axis in axes:
            if axis is not None and id(axis.ids) not in seen:
                seen.add(id(axis.ids))
                lengths.setdefault(len(axis.ids), []).append(axis.ids)
    lengths = {n: [u for x in many if ((u := unit_of[flow.cells.find(x)]) >= 0).any()] for n, many in lengths.items()}
    lengths = {n: many for n, many in lengths.items() if many}
    every = tuple(ids for many in lengths.values() for ids in many)
    bound = []
    for call in flow.recording.calls:
        number = call.name in SCALARS
        if number and not any(type(x) in (int, float) for x in call.args):
            continue
        refs = [x.value for x in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(x, Ref)]
        outs = [x for x in call.outs if x is not None]
        inputs, results = tuple(map(ids, refs)), tuple(map(ids, outs))
        if number:
            inputs, results = (every,), ()
        if any(a is not None for one in (*inputs, *results) for a in one):
            shapes = tuple(flow.shape(v) for v in refs)
            bound.append(
                BoundCall(
                    call.name, call.args, call.kwargs, inputs, shapes, results,
                    tuple(flow.shape(v) for v in outs), call.module, call.owners,
                    number and _suspect(call.args, lengths.keys()),
                )
            )  # fmt: skip
    return tuple(bound)


def _suspect(args: tuple[Any, ...], lengths: Collection[int]) -> bool:
    """Could a number come from the length n of an axis: n, n // k, their roots, or one over these?"""
    roots = [x**power for x in args if type(x) in (int, float) and x > 0 for power in (1, -1, 2, -2, 4, -4)]
    whole = {round(n) for n in roots if 1 < n < 1e7 and abs(n - round(n)) < 1e-4}
    return any(n in lengths or (n > 4 and any(length // (length // n) == n for length in lengths if length > n))
               for n in whole)  # fmt: skip
