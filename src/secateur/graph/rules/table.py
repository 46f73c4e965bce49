"""Registration and application of operator rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils import _pytree as pytree

from secateur.graph.flow import Axis, Flow
from secateur.graph.trace import Op, Ref

Rule = Callable[[Flow, Op], None]
RULES: dict[str, Rule] = {}


def rule(names: str) -> Callable[[Rule], Rule]:
    """Register a rule for the operators named in ``names`` (space separated, namespace ``aten`` by default)."""

    def register(function: Rule) -> Rule:
        for name in names.split():
            key = name if "::" in name else f"aten::{name}"
            if key in RULES:
                raise ValueError(f"operator {key} has two rules")
            RULES[key] = function
        return function

    return register


def arg(op: Op, position: int, name: str, default: Any = None) -> Any:
    """Return an argument by position or keyword."""
    if position < len(op.args):
        return op.args[position]
    return op.kwargs.get(name, default)


def base_name(target: str) -> str:
    """``aten::add_.Tensor`` -> ``aten::add``.

    >>> base_name("aten::add_.Tensor"), base_name("aten::_to_copy")
    ('aten::add', 'aten::_to_copy')
    """
    name = target.split(".")[0]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def tensor_refs(op: Op) -> list[Ref]:
    """All tensor arguments of an operator, in order."""
    return [x for x in pytree.tree_leaves((op.args, op.kwargs)) if isinstance(x, Ref)]


def apply_rule(flow: Flow, op: Op, pointwise: Rule) -> None:
    """Pass units through one operator; write-backs of in-place operators tie destination and source."""
    flow.op = op
    name = base_name(op.target)
    found = RULES.get(name)
    if found is None and op.pointwise:
        found = pointwise
    if found is None:
        for ref in tensor_refs(op):
            flow.block(flow.of(ref), f"no rule for operator {name} in {op.module or 'the model'}")
    else:
        found(flow, op)
    inplace = op.target.split(".")[0] != name
    if inplace and op.args and isinstance(op.args[0], Ref) and op.outs and op.outs[0] is not None:
        _write_back(flow, op.args[0], op.outs[0])


def _write_back(flow: Flow, target: Ref, out: int) -> None:
    before, after = flow.of(target), flow.axes[out]
    if len(before) != len(after):
        return
    for k, (a, b) in enumerate(zip(before, after, strict=True)):
        if a is b:
            continue
        if a is None or b is None:
            flow.block([a, b], f"{flow.where} writes positions without units over units")
            continue
        flow.tie(a, b)
        after[k] = Axis(b.ids, b.zero and a.zero, None)
        before[k] = Axis(a.ids, a.zero and b.zero, a.source)
