"""Fused attention and recurrent kernels."""

from __future__ import annotations

from secateur.graph.flow import Axis, Flow
from secateur.graph.rules.table import arg, rule
from secateur.graph.trace import Op, Ref


@rule(
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention scaled_dot_product_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"
)
def attention(flow: Flow, op: Op) -> None:
    """(batch, heads, tokens, dim): heads tie over q, k, v; q.k contract dim; the output takes v's dim."""
    q, k, v = (list(flow.of(ref)) for ref in op.args[:3])
    shape_q, shape_k = flow.shape(op.args[0]), flow.shape(op.args[1])
    for axis in (q[-2], k[-2], v[-2]):
        flow.block([axis], f"tokens of {flow.where}")
    heads = q[-3]
    if shape_q[-3] == shape_k[-3]:
        heads = flow.tie(flow.tie(q[-3], k[-3]), v[-3])
    else:
        flow.block([q[-3], k[-3], v[-3]], f"unequal heads in {flow.where}")
    if heads is not None:
        flow.cells.mark_heads(heads.ids)
    inner = flow.tie(q[-1], k[-1])
    flow.mix(inner)
    zero = v[-3] is not None and v[-3].zero
    out = [*q[:-3], Axis(heads.ids, zero) if heads is not None else None, None, v[-1]]
    sizes = list(zip(q, shape_q, strict=True))
    flow.cost(float(shape_k[-2]), *sizes)
    flow.cost(float(shape_k[-2]), *sizes[:-1], (v[-1], flow.shape(op.args[2])[-1]))
    flow.set(out)


@rule("mkldnn_rnn_layer")
def rnn_layer(flow: Flow, op: Op) -> None:
    """One LSTM layer: gates are stacked along the rows of both weights; hidden units tie over all of them."""
    x = flow.of(op.args[0])
    w_ih, w_hh = flow.of(op.args[1]), flow.of(op.args[2])
    hidden = flow.shape(op.args[2])[1]
    flow.tie(x[-1], w_ih[1])
    flow.role(w_ih[1], "in")
    flow.role(w_hh[1], "in")
    gates = flow.shape(op.args[1])[0] // hidden
    state = w_hh[1]
    for axes in (w_ih, w_hh, *(flow.of(op.args[n]) for n in (3, 4) if isinstance(op.args[n], Ref))):
        rows = axes[0] if axes else None
        flow.role(rows, "out")
        if rows is not None and state is not None:
            for ids in rows.ids.reshape(gates, hidden):
                flow.cells.union(ids, state.ids)
    for n in (5, 6):
        ref = arg(op, n, "hx")
        if isinstance(ref, Ref) and flow.of(ref):
            flow.tie(state, flow.of(ref)[-1])
    steps = 1
    for size in flow.shape(op.args[0])[:-1]:
        steps *= size
    four = flow.shape(op.args[1])[0]
    flow.cost(float(steps), (w_ih[0], four), (w_ih[1], flow.shape(op.args[1])[1]))
    flow.cost(float(steps), (w_hh[0], four), (w_hh[1], hidden))
    # dead units: all gate pre-activations are zero, so g = tanh(0) = 0 and the state stays zero
    out = Axis(state.ids, True) if state is not None else None
    for n, index in enumerate(op.outs[:3]):
        if index is not None:
            flow.set([*[None] * (len(flow.shape(index)) - 1), out], n)
