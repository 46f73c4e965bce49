"""The operator table: how units pass through each ATen operator, one file per family.

``RULES`` maps an operator's name (without namespace's overload and in-place mark) to ``rule(flow, op)``.  An
operator without a rule that is not pointwise freezes every unit that touches it.
"""

from secateur.graph.rules import attention, index, linear, make, move, norm, point, reduce, spatial
from secateur.graph.rules.table import RULES, apply_rule

__all__ = [
    "RULES",
    "apply_rule",
    "attention",
    "index",
    "linear",
    "make",
    "move",
    "norm",
    "point",
    "reduce",
    "spatial",
]
