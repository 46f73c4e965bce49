"""``compile_cuda(model, example)``: a callable on the GPU that computes what the gates choose."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.graph.state import eval_mode
from secateur.runtime.fallback import check
from secateur.runtime.gates import Controller, Gate, Prefix, Steered, acting, deciding
from secateur.runtime.gpu.graphed import Graphed
from secateur.runtime.gpu.layers import Walk
from secateur.runtime.gpu.skipping import skip_
from secateur.runtime.program import read
from secateur.types import EngineError


class Compiled:
    """A compiled network: ``compiled(x)`` for x (B, C, H, W), any B; one caller at a time.

    ``reason`` is "" where the whole network was read; else it says which layer is not known: then the modules of the
    network run as they are, and its gated layers compute what they choose of whole maps.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self._device = example.device
        self.shape = tuple(example.shape[1:])
        self._model = copy.deepcopy(model).eval().requires_grad_(False).cpu()
        net = self._model.model if isinstance(self._model, Steered) else self._model
        self.reason = ""
        self._run: Callable[[Tensor], Tensor]
        try:
            self._run = Walk(read(net, example.detach().float().cpu()), net, self._device)
            for module in self._model.modules():  # the rest of the model stays behind
                if isinstance(module, Gate | Controller):
                    module.to(self._device)
        except EngineError as error:
            self._model.to(self._device)
            self.reason = "; ".join([str(error), *skip_(net, self._device)])
            self._run = net

    def __call__(self, x: Tensor, actions: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the output (B, ...) in float32 on the device.

        ``actions`` maps paths of prefix gates to (B,) integers in 1 .. groups; a gate without one computes all, and
        under a controller (``Steered``) what that decides.  Raises ``EngineError`` for an input of another size.
        """
        if x.dim() != 4 or tuple(x.shape[1:]) != self.shape:
            raise EngineError(f"compiled for (B, {', '.join(map(str, self.shape))}); got {tuple(x.shape)}.")
        x = x.detach().to(self._device, torch.float32).contiguous()
        with torch.no_grad(), self._deciding(actions):
            return self._run(x)

    @contextlib.contextmanager
    def _deciding(self, actions: Mapping[str, Tensor] | None) -> Iterator[None]:
        own: Any = self._model
        with contextlib.ExitStack() as stack:
            if isinstance(own, Steered):
                stack.enter_context(deciding(own.model, own.controller, bias=own.bias))
            if actions is not None:
                stack.enter_context(acting(own.model if isinstance(own, Steered) else own, actions))
            yield


def compile_cuda(model: nn.Module, example: Tensor, *, graph: bool = False) -> Callable[..., Tensor]:
    """Return a callable that runs ``model`` (gated, dense or compacted) in eval mode on the device of ``example``.

    FBS layers run in a Triton kernel on the listed channels, maps stay compact up to the next sum or linear layer;
    RNP layers are one convolution of torch per bucket of samples.  The weights are copied: compile again after
    training.  The result is compared with the model on ``example`` (B, C, H, W) once.  Products are rounded to TF32
    where torch's convolutions may be (``torch.backends.cudnn.conv.fp32_precision``).  ``graph`` records the network
    as a CUDA graph for each batch size.

    Raises ``EngineError`` when a result is off by more than 1e-3 of the largest, when model and example are on
    different devices, without Triton, or when ``graph`` is not possible.

    >>> from secateur.runtime.gates import gate
    >>> chain = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
    >>> _ = nn.init.ones_(chain[0].weight)
    >>> x = torch.rand(3, 3, 9, 9)  # prefixes need no kernel, so they run on the CPU too
    >>> run = compile_cuda(gate(chain, None, x).model, x)
    >>> [int(row.any((1, 2)).sum()) for row in run(x, {"0": torch.tensor([1, 2, 4])})]
    [2, 4, 8]
    """
    where = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if where - {example.device}:
        found = ", ".join(sorted(map(str, where)))
        raise EngineError(f"model and example must be on one device; they are on {found} and {example.device}.")
    if graph:
        _graphable(model, example)
    compiled = Compiled(model, example)
    with _precise(), eval_mode(model):
        check(compiled, model, example, "the GPU path")
    if not graph:
        return compiled
    if compiled.reason:
        raise EngineError(f"graph=True needs a network of which every layer is known: {compiled.reason}")
    return Graphed(compiled)


def _graphable(model: nn.Module, example: Tensor) -> None:
    if not torch.cuda.is_available() or example.device.type != "cuda":
        raise EngineError("graph=True records a CUDA graph: it needs a CUDA device, and model and example on it.")
    if any(isinstance(module, Prefix) for module in model.modules()):
        raise EngineError("graph=True needs shapes that do not depend on the input; prefix gates (RNP) change them.")


@contextlib.contextmanager
def _precise() -> Iterator[None]:
    """Convolutions without TF32: rounded products can change which channels win."""
    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = conv.fp32_precision
    try:
        conv.fp32_precision = "ieee"
        yield
    finally:
        conv.fp32_precision = before
