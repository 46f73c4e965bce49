"""The fast engine: gated, dense and statically pruned networks run with generated code that skips what is not chosen.

Lanes of a vector are output pixels, weights are broadcast scalars, the active inputs are a list of address offsets and
the active outputs a list of row pointers.  So one copy of the weights serves every choice of channels.
"""

from secateur.types import EngineError

try:
    import llvmlite  # noqa: F401
except ImportError as error:
    raise EngineError("the engine needs llvmlite; install it with `pip install secateur[engine]`.") from error

from secateur.runtime.engine.engine import Engine, compile_engine
from secateur.runtime.fallback import Fallback

__all__ = ["Engine", "Fallback", "compile_engine"]
