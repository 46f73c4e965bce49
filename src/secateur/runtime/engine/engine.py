"""``compile_engine(model, example)``: a callable that computes what the gates choose, and nothing else."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import nn

from secateur.runtime.engine import native
from secateur.runtime.engine.layers import lowered
from secateur.runtime.engine.team import HEAD, HELPED, STOP, TICKET
from secateur.runtime.fallback import Fallback, check
from secateur.runtime.program import read
from secateur.types import EngineError

ALIGNED = 64


class Engine:
    """A compiled network: ``engine(x)`` for x (B, C, H, W) of the compiled size, any B; any number of threads.

    ``threads`` share a batch, sample by sample, or the convolutions of a single sample.  ``paths`` are the layers that
    take actions, in their order.
    """

    def __init__(self, model: nn.Module, example: torch.Tensor, threads: int, width: int) -> None:
        program = read(model, example)
        lowering, self.table, self._image = lowered(program, width)
        self._kept = lowering.arena.kept
        self._run, self._help = native.functions(width)
        self.shape = tuple(example.shape[1:])
        self.result = program.result_shape
        self.threads = threads
        self.paths = [n.path for n in program.nodes if n.gate is not None and hasattr(n.gate, "groups")]
        self._free: list[np.ndarray] = []
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def __call__(self, x: torch.Tensor, actions: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Return the output (B, ...) in float32; raises ``EngineError`` for an input of another size.

        ``actions`` maps the path of each prefix gate to (B,) integers in 1 .. groups; without them all is computed.
        """
        if x.dim() != 4 or tuple(x.shape[1:]) != self.shape:
            raise EngineError(f"compiled for (B, {', '.join(map(str, self.shape))}); got {tuple(x.shape)}.")
        x = x.detach().to(device="cpu", dtype=torch.float32).contiguous()
        out = torch.empty(len(x), *self.result)
        chosen = self._actions(actions, len(x)) if actions is not None else None
        parts = min(self.threads, len(x))
        bounds = [len(x) * part // max(parts, 1) for part in range(parts + 1)]
        jobs = [(x[a:b], out[a:b], None if chosen is None else chosen[a:b]) for a, b in itertools.pairwise(bounds)]
        if self._pool is None or len(jobs) < 2:
            for job in jobs:
                self._work(*job, helpers=self.threads - 1)
        else:
            list(self._pool.map(lambda job: self._work(*job), jobs))
        return out

    def _actions(self, actions: Mapping[str, torch.Tensor], batch: int) -> torch.Tensor:
        if set(actions) != set(self.paths) or any(a.shape != (batch,) for a in actions.values()):
            raise EngineError(f"actions must name {self.paths} with one integer per sample; got {list(actions)}.")
        return torch.stack([actions[path].to(torch.int64) for path in self.paths], dim=1).contiguous()

    def _work(self, x: torch.Tensor, out: torch.Tensor, actions: torch.Tensor | None, helpers: int = 0) -> None:
        """Run the samples of ``x`` in a workspace of their own, with ``helpers`` inside each convolution."""
        with self._lock:
            space = self._free.pop() if self._free else None
        if space is None:
            raw = np.empty(len(self._image) + ALIGNED, dtype=np.uint8)
            begin = -raw.ctypes.data % ALIGNED
            space = raw[begin : begin + len(self._image)]
            space[:] = self._image
        steps = np.array([_step(x), _step(out), 0 if actions is None else _step(actions)], dtype=np.int64)
        given = None if actions is None else actions.data_ptr()
        address = space.ctypes.data
        head = space[:HEAD].view(np.int64)
        head[[HELPED, STOP, TICKET]] = int(helpers > 0), 0, 0
        helping = [self._pool.submit(self._help, address) for _ in range(helpers)] if self._pool is not None else []
        try:
            pointers = (x.data_ptr(), out.data_ptr(), given, steps.ctypes.data)
            self._run(self.table.ctypes.data, len(self.table), address, *pointers, len(x))
        finally:
            head[STOP] = 1
            for helper in helping:  # none may look at the workspace later
                if not helper.cancel():
                    helper.result()
        with self._lock:
            self._free.append(space)


def _step(x: torch.Tensor) -> int:
    """Bytes from sample to sample."""
    return x.element_size() * (x[0].numel() if len(x) else 0)


def compile_engine(
    model: nn.Module, example: torch.Tensor, *, threads: int = 1, strict: bool = False, width: int | None = None
) -> Callable[..., torch.Tensor]:
    """Return a callable that runs ``model`` (gated, dense or compacted) in eval mode on inputs of the example's size.

    The weights are copied: compile again after training.  The result is compared with the model on ``example``
    once.  A network that the engine does not know gives a ``Fallback`` with its ``reason``, or ``EngineError`` when
    ``strict``.  ``width`` is the number of floats per vector, 16 or 8, by default what the processor has.

    >>> chain = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    >>> engine = compile_engine(chain, torch.rand(1, 3, 9, 9))
    >>> engine(torch.rand(5, 3, 9, 9)).shape
    torch.Size([5, 8, 7, 7])
    """
    training = model.training
    model.eval()
    try:
        engine = Engine(model, example, threads, native.lanes() if width is None else width)
        check(engine, model, example, "the engine")
        return engine
    except EngineError as error:
        if strict:
            raise EngineError(str(error)) from error
        return Fallback(model, str(error))
    finally:
        model.train(training)
