"""``compile_engine(model, example)``: a callable that computes what the gates choose, and nothing else."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import nn

from secateur.runtime.engine import native
from secateur.runtime.engine.layers import lowered
from secateur.runtime.engine.steering import Steering
from secateur.runtime.engine.team import HEAD, HELPED, STOP, TICKET
from secateur.runtime.fallback import checked
from secateur.runtime.gates import Prefix, Steered
from secateur.runtime.program import read
from secateur.types import EngineError

ALIGNED = 64
HUGE = 4 << 20  # bytes from which on numpy asks for huge pages; what is not touched costs nothing


class Engine:
    """A compiled network: ``engine(x)`` for x (B, C, H, W) of the compiled size, any B; any number of threads.

    ``threads`` share a batch, sample by sample, or the convolutions of a single sample.  ``paths`` are the layers that
    take actions, in their order; a ``Steered`` model has none, because its controller decides inside the call.
    """

    def __init__(self, model: nn.Module, example: torch.Tensor, threads: int, width: int) -> None:
        network = model.model if isinstance(model, Steered) else model
        program = read(network, example)
        steering = None
        if isinstance(model, Steered):
            steering = Steering.of(network, model.controller, model.bias, program)
        lowering, self.table, self._image = lowered(program, width, steering)
        self._kept = lowering.arena.kept
        self._run, self._help = native.functions(width)
        self.shape = tuple(example.shape[1:])
        self.result = program.result_shape
        self.threads = threads
        prefixes = [node.path for node in program.nodes if isinstance(node.gate, Prefix)]
        self.paths = [] if steering else prefixes
        sizes = 4 * math.prod(self.shape), 4 * math.prod(self.result), 8 * len(self.paths)  # bytes of a sample
        self._steps = np.array(sizes, dtype=np.int64)
        self._fixed = self.table.ctypes.data, len(self.table), self._steps.ctypes.data
        self._free: list[Workspace] = []
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def __call__(self, x: torch.Tensor, actions: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Return the output (B, ...) in float32; raises ``EngineError`` for an input of another size.

        ``actions`` maps the path of each prefix gate to (B,) integers in 1 .. groups; without them all is computed.
        """
        if x.dim() != 4 or x.shape[1:] != self.shape:
            raise EngineError(f"compiled for (B, {', '.join(map(str, self.shape))}); got {tuple(x.shape)}.")
        if x.dtype is not torch.float32 or x.device.type != "cpu" or not x.is_contiguous():
            x = x.detach().to(device="cpu", dtype=torch.float32).contiguous()
        out = torch.empty(len(x), *self.result)
        chosen = self._actions(actions, len(x)) if actions is not None else None
        pointers = x.data_ptr(), out.data_ptr(), None if chosen is None else chosen.data_ptr()
        parts = min(self.threads, len(x))
        if self._pool is None or parts < 2:
            self._work(pointers, 0, len(x), helpers=self.threads - 1)
        else:
            bounds = [len(x) * part // parts for part in range(parts + 1)]
            list(self._pool.map(lambda ends: self._work(pointers, *ends), itertools.pairwise(bounds)))
        return out

    def _actions(self, actions: Mapping[str, torch.Tensor], batch: int) -> torch.Tensor:
        if set(actions) != set(self.paths) or any(a.shape != (batch,) for a in actions.values()):
            raise EngineError(f"actions must name {self.paths} with one integer per sample; got {list(actions)}.")
        return torch.stack([actions[path].to(torch.int64) for path in self.paths], dim=1).contiguous()

    def _work(self, pointers: tuple[int, int, int | None], begin: int, end: int, helpers: int = 0) -> None:
        """Run samples ``begin`` to ``end`` in a workspace of their own, with ``helpers`` inside each convolution."""
        try:
            space = self._free.pop()
        except IndexError:
            space = Workspace(self._image)
        table, length, steps = self._fixed
        given = [None if at is None else at + begin * int(step) for at, step in zip(pointers, self._steps, strict=True)]
        if self._pool is None:
            self._run(table, length, space.address, *given, steps, end - begin)
            self._free.append(space)
            return
        space.head[[HELPED, STOP, TICKET]] = int(helpers > 0), 0, 0
        helping = [self._pool.submit(self._help, space.address) for _ in range(helpers)]
        try:
            self._run(table, length, space.address, *given, steps, end - begin)
        finally:
            space.head[STOP] = 1
            for helper in helping:  # none may look at the workspace later
                if not helper.cancel():
                    helper.result()
        self._free.append(space)


class Workspace:
    """The memory of one call at a time: a copy of ``image`` that begins at a cache line, unless ``raw`` is given."""

    def __init__(self, image: np.ndarray, raw: np.ndarray | None = None) -> None:
        if raw is None:
            raw = np.empty(max(len(image), HUGE) + ALIGNED, dtype=np.uint8)
            raw = raw[-raw.ctypes.data % ALIGNED :][: len(image)]
        raw[:] = image
        self.raw, self.address = raw, raw.ctypes.data
        self.head = raw[:HEAD].view(np.int64)


def compile_engine(
    model: nn.Module, example: torch.Tensor, *, threads: int = 1, strict: bool = False, width: int | None = None
) -> Callable[..., torch.Tensor]:
    """Return a callable that runs ``model`` in eval mode on inputs of the example's size.

    It may be gated, steered, dense or compacted.  The weights are copied: compile again after training.  The result
    is compared with the model on ``example`` once.  A network that the engine does not know gives a ``Fallback`` with
    its ``reason``, or ``EngineError`` when ``strict``.  ``width`` is the number of floats per vector, 16 or 8, by
    default what the processor has.

    >>> chain = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    >>> engine = compile_engine(chain, torch.rand(1, 3, 9, 9))
    >>> engine(torch.rand(5, 3, 9, 9)).shape
    torch.Size([5, 8, 7, 7])
    """
    lanes = native.lanes if width is None else lambda: width
    return checked(lambda: Engine(model, example, threads, lanes()), model, example, "the engine", strict)
