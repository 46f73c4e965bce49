"""Gates: modules that decide per input which units of a layer to compute.

The masks of torch in this folder are the reference: training runs on them, and the fast engine must agree with them.
"""

from secateur.runtime.gates.choice import Choice, Gate, watch
from secateur.runtime.gates.fbs import FBS, penalty
from secateur.runtime.gates.follow import Follower
from secateur.runtime.gates.gated import Gated
from secateur.runtime.gates.prefix import Prefix, acting
from secateur.runtime.gates.rnp import Controller, Steered, controller_for, deciding
from secateur.runtime.gates.wrap import Gating, Layer, gate, layers, put_, restore_, rows

__all__ = [
    "FBS",
    "Choice",
    "Controller",
    "Follower",
    "Gate",
    "Gated",
    "Gating",
    "Layer",
    "Prefix",
    "Steered",
    "acting",
    "controller_for",
    "deciding",
    "gate",
    "layers",
    "penalty",
    "put_",
    "restore_",
    "rows",
    "watch",
]
