"""Run-time pruning on a GPU: listed channels in a Triton kernel (FBS), buckets of samples (RNP).

Tested through Triton's interpreter only; no speed has been measured.
"""

from secateur.runtime.gpu.compiled import Compiled, compile_cuda

__all__ = ["Compiled", "compile_cuda"]
