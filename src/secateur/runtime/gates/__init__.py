"""Gates: modules that decide per input which units of a convolution to compute.

The masks of torch in this folder are the reference: training runs on them, and the fast engine must agree with them.
"""

from secateur.runtime.gates.choice import Choice, Gate, watch
from secateur.runtime.gates.fbs import FBS, penalty
from secateur.runtime.gates.gated import Gated
from secateur.runtime.gates.prefix import Prefix, acting
from secateur.runtime.gates.wrap import Gating, gate

__all__ = ["FBS", "Choice", "Gate", "Gated", "Gating", "Prefix", "acting", "gate", "penalty", "watch"]
