"""The fast engine: gated, dense and statically pruned networks run with generated code that skips what is not chosen.

Lanes of a vector are output pixels, weights are broadcast scalars, the active inputs are a list of address offsets and
the active outputs a list of row pointers.  So one copy of the weights serves every choice of channels.
"""

from secateur.runtime.engine.engine import Engine, Fallback, compile_engine
from secateur.runtime.engine.native import EngineError

__all__ = ["Engine", "EngineError", "Fallback", "compile_engine"]
