"""``compile(model)``: the fastest way to run a network that the machine supports, and why it is that one."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from secateur.runtime.fallback import Fallback
from secateur.runtime.gates import acting
from secateur.types import EngineError

CPU, CUDA = ("engine", "portable", "reference"), ("gpu", "reference")  # the fastest first


class Compiled:
    """A network ready to run: ``compiled(x)`` for x (B, C, H, W), any B.

    ``layer`` is what runs it: ``engine`` (generated code), ``portable`` (ONNX Runtime), ``gpu``, or ``reference`` (the
    module itself, masks and all); ``why`` maps each other layer to the reason why it does not.  ``layer`` is "" and
    ``why`` empty as long as no input has come.
    """

    def __init__(self, model: nn.Module, threads: int, forced: str | None) -> None:
        self.model, self.threads, self.forced = model, threads, forced
        self.layer, self.why = "", {}
        self.run: Callable[..., torch.Tensor] | None = None
        self._lock = threading.Lock()

    def __call__(self, x: torch.Tensor, actions: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Return the output (B, ...) in float32; ``actions`` (path -> (B,) in 1 .. groups) are for prefix gates.

        Raises ``EngineError`` for an input of another size than the example, unless the layer is ``reference``.
        """
        run = self.run or self.prepare(x)
        if actions is None:
            return run(x)
        if self.layer == "reference":
            with acting(self.model, actions):
                return run(x)
        return run(x, actions)

    def prepare(self, example: torch.Tensor) -> Callable[..., torch.Tensor]:
        """Compile for inputs of the size of ``example``, once; return what runs."""
        with self._lock:
            if self.run is None:
                self._choose(example)
        if self.run is None:
            raise EngineError(f"layer={self.forced!r} cannot run this network here: {self.why[self.forced or '']}")
        return self.run

    def _choose(self, example: torch.Tensor) -> None:
        why: dict[str, str] = {}
        for layer in _layers(self.model):
            if self.forced not in (None, layer):
                why[layer] = f"layer={self.forced!r} was asked for"
            elif self.layer:
                why[layer] = f"slower than {self.layer}"
            else:
                try:
                    self.run = MAKERS[layer](self.model, example, self.threads)
                    self.layer = layer
                    if layer == "gpu" and (reason := getattr(self.run, "reason", "")):
                        why["gpu throughout"] = f"only its gated layers: {reason}"
                except EngineError as error:
                    why[layer] = str(error)
        self.why = why

    def __repr__(self) -> str:
        if not self.layer:
            return f"Compiled(waits for its first input, threads={self.threads})"
        rows = [f"  not {layer}: {reason}" for layer, reason in self.why.items()]
        return "\n".join([f"Compiled(layer={self.layer!r}, threads={self.threads})", *rows])


def compile(
    model: nn.Module, example: torch.Tensor | None = None, *, threads: int = 1, layer: str | None = None
) -> Compiled:
    """Return a callable that runs ``model`` (gated, steered, dense or compacted) in eval mode, as fast as it can here.

    ``example`` (B, C, H, W) is an input of the size to come; without one the first call is the example.  The choice
    is the first that can run of ``engine`` (llvmlite; AVX2 or AVX-512), ``portable`` (ONNX Runtime) and ``reference``;
    ``layer`` asks for one.  A model on CUDA has ``gpu`` and ``reference``.  All but the reference copy the weights:
    compile again after training.

    Raises ``EngineError`` for a ``layer`` that does not exist or cannot run the network, with the reason.

    >>> chain = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    >>> compiled = compile(chain, torch.rand(1, 3, 9, 9), layer="reference")
    >>> compiled.layer, compiled(torch.rand(5, 3, 9, 9)).shape
    ('reference', torch.Size([5, 8, 7, 7]))
    """
    known = _layers(model)
    if layer not in (None, *known):
        where = "on CUDA" if known is CUDA else "on the CPU"
        raise EngineError(f"layer={layer!r} is not one of {', '.join(known)}, the layers of a model {where}.")
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise EngineError(f"threads must be a whole number from 1 on; got {threads!r}.")
    compiled = Compiled(model, threads, layer)
    if example is not None:
        compiled.prepare(example)
    return compiled


def _layers(model: nn.Module) -> tuple[str, ...]:
    return CUDA if any(parameter.is_cuda for parameter in model.parameters()) else CPU


def _engine(model: nn.Module, example: torch.Tensor, threads: int) -> Any:
    from secateur.runtime.engine import compile_engine

    return compile_engine(model, example, threads=threads, strict=True)


def _portable(model: nn.Module, example: torch.Tensor, threads: int) -> Any:
    from secateur.runtime.portable import compile_portable

    return compile_portable(model, example, threads=threads, strict=True)


def _gpu(model: nn.Module, example: torch.Tensor, threads: int) -> Any:
    try:
        return importlib.import_module("secateur.runtime.gpu").compile_cuda(model, example)
    except ImportError as error:
        raise EngineError(f"the path for CUDA is not there ({error}).") from error


def _reference(model: nn.Module, example: torch.Tensor, threads: int) -> Any:
    return Fallback(model, "the reference is what others are measured by")


MAKERS: dict[str, Callable[[nn.Module, torch.Tensor, int], Any]] = {
    "engine": _engine,
    "portable": _portable,
    "gpu": _gpu,
    "reference": _reference,
}
