"""Pointwise operators: merge along broadcast-aligned axes."""

from __future__ import annotations

from secateur.graph.flow import Axes, Axis, Flow
from secateur.graph.rules.table import arg, base_name, rule, tensor_refs
from secateur.graph.trace import Op, Ref

# f(0) = 0 for the one tensor argument (others are numbers that keep it)
KEEPS_ZERO = frozenset(
    "aten::" + name
    for name in [
        "relu",
        "relu6",
        "leaky_relu",
        "gelu",
        "silu",
        "mish",
        "tanh",
        "sin",
        "tan",
        "asin",
        "atan",
        "sinh",
        "asinh",
        "atanh",
        "elu",
        "selu",
        "celu",
        "hardswish",
        "hardtanh",
        "softsign",
        "abs",
        "neg",
        "sqrt",
        "square",
        "sign",
        "sgn",
        "erf",
        "expm1",
        "log1p",
        "round",
        "floor",
        "ceil",
        "trunc",
        "frac",
        "dropout",
        "native_dropout",
        "alpha_dropout",
        "feature_dropout",
        "clone",
        "copy",
        "_to_copy",
        "alias",
        "detach",
        "contiguous",
        "lift_fresh",
        "positive",
        "_prelu_kernel",
        "prelu",
        "rrelu_with_noise",
        "softshrink",
        "hardshrink",
        "threshold",
        "nan_to_num",
        "to",
        "bernoulli",
    ]
)
PRODUCTS = frozenset({"aten::mul", "aten::multiply", "aten::__and__", "aten::bitwise_and", "aten::logical_and"})
SUMS = frozenset({"aten::add", "aten::sub", "aten::rsub", "aten::maximum", "aten::minimum", "aten::lerp"})
INVERSES = frozenset({"aten::rsqrt", "aten::reciprocal", "aten::log", "aten::log2", "aten::log10"})
QUOTIENTS = frozenset({"aten::div", "aten::true_divide", "aten::fmod", "aten::remainder"})


@rule(
    "_to_copy clone alias detach contiguous lift_fresh lift_fresh_copy lift dropout native_dropout feature_dropout "
    "alpha_dropout masked_fill where lerp prelu _prelu_kernel rrelu_with_noise addcmul addcdiv clamp fill "
    "nan_to_num to type_as _conj resolve_conj resolve_neg hardtanh threshold bernoulli floor_divide _assert_async "
    "_assert_scalar zeros_like ones_like full_like empty_like rand_like randn_like view_as_real_copy "
    "_autocast_to_reduced_precision _autocast_to_full_precision set_data "
    "_functional_assert_async isnan isinf isfinite logical_not __and__ __or__ __xor__ _unsafe_masked_index_none "
    "log_sigmoid_forward rsqrt reciprocal softplus hardsigmoid hardswish silu mish logit logaddexp zero "
)
def pointwise(flow: Flow, op: Op) -> None:
    """Merge the aligned axes of all tensor arguments."""
    refs = tensor_refs(op)
    if not op.outs or op.outs[0] is None:
        return
    shape = flow.shape(op.outs[0])
    name = base_name(op.target)
    out: Axes = [None] * len(shape)
    for k in range(len(shape)):
        if shape[k] == 1:
            continue
        held: list[tuple[int, Axis | None]] = []
        for n, ref in enumerate(refs):
            own = flow.shape(ref)
            at = k - len(shape) + len(own)
            if at >= 0 and own[at] == shape[k]:
                held.append((n, flow.of(ref)[at]))
        if all(axis is None for _, axis in held):
            continue
        merged = held[0][1]
        for _, axis in held[1:]:
            merged = flow.tie(merged, axis)
        if merged is not None:
            zero = _zero(name, op, refs, held)
            source = merged.source if len(refs) == 1 and zero else None
            free = all(axis is not None and axis.free for _, axis in held)
            out[k] = Axis(merged.ids, zero, source, free)
    for n in range(len(op.outs)):
        if op.outs[n] is not None and flow.shape(op.outs[n]) == shape:
            flow.set(out, n)
    for axis in out:
        flow.role(axis, "along")
    if name in INVERSES or name in QUOTIENTS:
        for axis in flow.of(refs[-1]):
            if axis is not None and axis.source is not None:  # zeroing it would divide by zero
                flow.unmaskable.add(axis.source)


def _zero(name: str, op: Op, refs: list[Ref], held: list[tuple[int, Axis | None]]) -> bool:
    """Is the slice of a dead unit zero after this operator?"""
    flags = {n: axis is not None and axis.zero for n, axis in held}
    if name in PRODUCTS or name == "aten::addcmul_":
        return any(flags.values())
    if name in QUOTIENTS:
        return flags.get(0, False)
    if name in KEEPS_ZERO:
        return flags.get(0, False)
    if name in SUMS:
        numbers = [x for x in op.args[1:2] if isinstance(x, int | float) and x != 0]
        return not numbers and len(flags) == len(refs) and all(flags.values())
    if name == "aten::masked_fill":
        return flags.get(0, False) and arg(op, 2, "value") == 0
    if name == "aten::where":
        return all(flags.get(n, False) for n in (1, 2) if n < len(refs)) and len(refs) == 3
    if name == "aten::pow":
        power = arg(op, 1, "exponent")
        return flags.get(0, False) and isinstance(power, int | float) and power > 0
    if name == "aten::clamp":
        low, high = arg(op, 1, "min"), arg(op, 2, "max")
        if isinstance(low, Ref) or isinstance(high, Ref):
            return False
        return flags.get(0, False) and (low is None or low <= 0) and (high is None or high >= 0)
    return name == "aten::zeros_like"
