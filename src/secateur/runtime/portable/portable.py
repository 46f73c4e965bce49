"""``compile_portable(model, example)``: ONNX Runtime computes what the gates choose, without generated code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn

from secateur.runtime.fallback import checked
from secateur.runtime.gates import Prefix, Steered
from secateur.runtime.gates.rnp import steered
from secateur.runtime.nodes import Program
from secateur.runtime.portable.gates import Policy
from secateur.runtime.portable.layers import lower
from secateur.runtime.program import read
from secateur.types import EngineError

QUIET = 3  # errors only


class Portable:
    """A network in ONNX Runtime: ``portable(x)`` for x (B, C, H, W) of the compiled size, any B; any number of threads.

    A network without gates takes a batch at once.  With gates, samples run one by one, each with its own channels.
    ``threads`` work inside each operator.  ``paths`` are the layers that take actions, in their order; ``file`` is the
    ONNX model.
    """

    def __init__(self, model: nn.Module, example: torch.Tensor, threads: int) -> None:
        inner = model.model if isinstance(model, Steered) else model
        program = read(inner, example)
        gates = [node.path for node in program.nodes if isinstance(node.gate, Prefix)]
        policy = _policy(model, inner, gates)
        self.single = any(node.gate is not None for node in program.nodes)
        self.paths = [] if policy.controller is not None else gates
        self.groups = [inner.get_submodule(path).gate.groups for path in self.paths]  # type: ignore[union-attr]
        self.shape, self.result = tuple(example.shape[1:]), program.result_shape
        self.file = _file(program, policy, self.single, len(self.paths))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = QUIET
        try:
            self._session = onnxruntime.InferenceSession(self.file, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no base class of their own
            raise EngineError(f"ONNX Runtime refuses the graph: {error}") from error

    def __call__(self, x: torch.Tensor, actions: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Return the output (B, ...) in float32; raises ``EngineError`` for an input of another size.

        ``actions`` maps the path of each prefix gate to (B,) integers in 1 .. groups; without them all is computed.
        """
        if x.dim() != 4 or tuple(x.shape[1:]) != self.shape:
            raise EngineError(f"compiled for (B, {', '.join(map(str, self.shape))}); got {tuple(x.shape)}.")
        images = x.detach().to(device="cpu", dtype=torch.float32).contiguous().numpy()
        chosen = self._actions(actions, len(images))
        if not len(images):
            return torch.empty(0, *self.result)
        parts = [slice(n, n + 1) for n in range(len(images))] if self.single else [slice(None)]
        return torch.cat([self._run(images[part], chosen[part]) for part in parts])

    def _run(self, images: np.ndarray, actions: np.ndarray) -> torch.Tensor:
        given = {"image": images} | ({"actions": actions[0]} if self.paths else {})
        found: Any = self._session.run(None, given)[0]
        return torch.from_numpy(found).reshape(len(images), *self.result)

    def _actions(self, actions: Mapping[str, torch.Tensor] | None, batch: int) -> np.ndarray:
        if actions is None:
            return np.tile(np.array(self.groups, dtype=np.int64), (batch, 1))
        if set(actions) != set(self.paths) or any(a.shape != (batch,) for a in actions.values()):
            raise EngineError(f"actions must name {self.paths} with one integer per sample; got {list(actions)}.")
        chosen = torch.stack([actions[path].to(torch.int64) for path in self.paths], dim=1).numpy()
        if ((chosen < 1) | (chosen > self.groups)).any():
            raise EngineError(f"actions are 1 .. {self.groups} groups; got {chosen.min()} to {chosen.max()}.")
        return np.ascontiguousarray(chosen)


def _policy(model: nn.Module, inner: nn.Module, gates: list[str]) -> Policy:
    if any(module.policy is not None for module in inner.modules() if isinstance(module, Prefix)):
        raise EngineError("a gate has a policy of its own; give the actions to the compiled network instead.")
    if not isinstance(model, Steered):
        return Policy(None, 0.0, gates)
    paths = steered(inner)
    if paths != [path for path in gates if path in paths]:
        raise EngineError(f"the controller decides about {paths} in this order, but they run as {gates}.")
    return Policy(model.controller, model.bias, paths)


def _file(program: Program, policy: Policy, single: bool, actions: int) -> bytes:
    graph, result = lower(program, policy)
    batch: int | str = 1 if single else "batch"
    ins: dict = {"image": (np.float32, [batch, *program.shapes[program.source]])}
    return graph.model(ins | ({"actions": (np.int64, [actions])} if actions else {}), result)


def compile_portable(
    model: nn.Module, example: torch.Tensor, *, threads: int = 1, strict: bool = False
) -> Callable[..., torch.Tensor]:
    """Return a callable that runs ``model`` (gated, steered, dense or compacted) in ONNX Runtime, in eval mode.

    The weights are copied: compile again after training.  The result is compared with the model on ``example``
    once.  A network that cannot be expressed gives a ``Fallback`` with its ``reason``, or ``EngineError`` when
    ``strict``.

    >>> chain = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    >>> portable = compile_portable(chain, torch.rand(1, 3, 9, 9))
    >>> portable(torch.rand(5, 3, 9, 9)).shape
    torch.Size([5, 8, 7, 7])
    """
    return checked(lambda: Portable(model, example, threads), model, example, "ONNX Runtime", strict)
