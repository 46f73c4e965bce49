"""Look-ups: the indexed axis keeps its positions, the others pass."""

from __future__ import annotations

from secateur.graph.flow import Axes, Flow
from secateur.graph.rules.table import arg, rule, tensor_refs
from secateur.graph.trace import Op, Ref


@rule("embedding")
def embedding(flow: Flow, op: Op) -> None:
    """Rows are words (fixed), columns are units."""
    table = flow.of(op.args[0])
    if table[0] is not None:
        flow.cells.freeze(table[0].ids, f"rows are looked up by index in {flow.where}")
    flow.role(table[1], "out")
    flow.set([*[None] * len(flow.shape(op.args[1])), table[1]])


@rule("index _unsafe_index index_put _index_put_impl _unsafe_index_put")
def index(flow: Flow, op: Op) -> None:
    """Advanced indexing: indexed axes are fixed, axes indexed by None pass."""
    axes = flow.of(op.args[0])
    positions = [k for k, ref in enumerate(op.args[1]) if isinstance(ref, Ref)]
    used: set[int] = set()
    at = 0
    for ref in op.args[1]:
        if isinstance(ref, Ref):
            # a boolean mask covers as many axes as it has
            mask = flow.recording.values[ref.value].dtype.is_floating_point is False and _is_mask(flow, ref)
            width = len(flow.shape(ref)) if mask else 1
            used.update(range(at, at + width))
            flow.block(flow.of(ref))
            at += width
        else:
            at += 1
    flow.block([axes[k] for k in used if k < len(axes)], f"positions are looked up by index in {flow.where}")
    if "index_put" in op.target:
        value = op.args[2]
        if isinstance(value, Ref):
            _put(flow, axes, value, used)
        flow.set([None if k in used else axis for k, axis in enumerate(axes)])
        return
    rest = [axis for k, axis in enumerate(axes) if k not in used]
    shape = flow.shape(op.outs[0])
    new = len(shape) - len(rest)
    front = positions != list(range(positions[0], positions[-1] + 1)) if positions else False
    first = 0 if front else min(used, default=0)
    flow.set([*rest[:first], *[None] * new, *rest[first:]])


def _is_mask(flow: Flow, ref: Ref) -> bool:
    import torch

    return flow.recording.values[ref.value].dtype in (torch.bool, torch.uint8)


def _put(flow: Flow, axes: Axes, value: Ref, used: set[int]) -> None:
    own = flow.of(value)
    shape = flow.shape(value)
    kept = [axis for k, axis in enumerate(axes) if k not in used]
    for k in range(1, min(len(kept), len(own)) + 1):
        if shape[-k] > 1:
            flow.tie(kept[-k], own[-k])
    for axis in own[: max(len(own) - len(kept), 0)]:
        flow.block([axis])


@rule("index_select index_add index_copy index_fill")
def index_select(flow: Flow, op: Op) -> None:
    """One axis is looked up; for writes the other axes of the source are tied."""
    axes = list(flow.of(op.args[0]))
    if not axes:
        return
    dim = op.args[1] % len(axes)
    flow.block([axes[dim]], f"positions are looked up by index in {flow.where}")
    axes[dim] = None
    source = arg(op, 3, "source")
    if isinstance(source, Ref):
        for k, axis in enumerate(flow.of(source)):
            if k != dim:
                axes[k] = flow.tie(axes[k], axis)
            else:
                flow.block([axis])
    flow.set(axes)


@rule("gather scatter scatter_add scatter_reduce take_along_dim")
def gather(flow: Flow, op: Op) -> None:
    """The gathered axis is fixed; other axes pass where the index spans them fully."""
    axes = list(flow.of(op.args[0]))
    dim = op.args[1] % max(len(axes), 1)
    shape, size = flow.shape(op.args[0]), flow.shape(op.args[2])
    source = arg(op, 3, "src")
    writes = "scatter" in op.target
    for k, axis in enumerate(axes):
        if k == dim or shape[k] != size[k]:
            flow.block([axis], f"positions are looked up by index in {flow.where}")
            axes[k] = None
        elif isinstance(source, Ref):
            axes[k] = flow.tie(axis, flow.of(source)[k])
    for ref in tensor_refs(op)[1:2]:
        for k, axis in enumerate(flow.of(ref)):
            if axis is not None and (k >= len(axes) or axes[k] is None):
                flow.block([axis])
    if isinstance(source, Ref):
        flow.block([flow.of(source)[dim]])
    if not writes:
        axes[dim] = None
    flow.set(axes)


@rule("topk sort kthvalue mode")
def order(flow: Flow, op: Op) -> None:
    """Selection by value along one axis."""
    axes = list(flow.of(op.args[0]))
    name = op.target
    default = -1
    dim = arg(op, 2 if "topk" in name or "kthvalue" in name else 1, "dim", default)
    if isinstance(dim, bool) or not isinstance(dim, int):
        dim = default
    if axes:
        flow.block([axes[dim]], f"units are ordered by value in {flow.where}")
        axes[dim] = None
    for n in range(len(op.outs)):
        flow.set(axes, n)


@rule(
    "nonzero masked_select unique _unique2 unique_dim unique_consecutive masked_scatter bincount one_hot "
    "searchsorted bucketize histc"
)
def data_dependent(flow: Flow, op: Op) -> None:
    """Shapes that depend on values."""
    for ref in tensor_refs(op):
        flow.block(flow.of(ref), f"positions depend on values in {flow.where}")


@rule("torchvision::nms")
def suppression(flow: Flow, op: Op) -> None:
    """Boxes have no units."""
    for ref in tensor_refs(op):
        flow.block(flow.of(ref), f"boxes of {flow.where}")
