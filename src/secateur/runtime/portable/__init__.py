"""The portable path: gated networks as ONNX graphs that compute what is chosen, in ONNX Runtime.

FBS is TopK, then Gather of filters and of their inputs, then Conv; RNP is Slice of filters and inputs, then Conv, its
controller part of the graph.
"""

from secateur.types import EngineError

try:
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
except ImportError as error:
    raise EngineError(
        "the portable path needs onnx and onnxruntime; install them with `pip install secateur[portable]`."
    ) from error

from secateur.runtime.fallback import Fallback
from secateur.runtime.portable.portable import Portable, compile_portable

__all__ = ["Fallback", "Portable", "compile_portable"]
