"""Size patches: the escape for sizes that are hard-coded in a module's own forward.

A patched module keeps its class.  While its forward runs, the integer arguments named in its patches are replaced
in the n-th call of that name it makes; everything else runs as written, so other batch sizes, train mode, backward
and deepcopy work.  A patch is data: (index of the call, its name, [(path, value)]).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from secateur.graph.calls import counted_as
from secateur.graph.expected import RATIO, fetch
from secateur.types import VerificationError


@dataclass(frozen=True)
class Patch:
    """Replace arguments of call number ``index`` of those named ``name`` in the forward of ``module``."""

    module: str
    index: int
    name: str
    changes: tuple[tuple[tuple[Any, ...], Any], ...]


def put(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return a copy of nested tuples, lists, dicts and slices with the value at ``path`` replaced.

    >>> put((1, [2, 3]), (1, 0), 9)
    (1, [9, 3])
    """
    if not path:
        return value
    step, rest = path[0], path[1:]
    if isinstance(tree, slice):
        parts = {"start": tree.start, "stop": tree.stop}
        parts[step] = value
        return slice(parts["start"], parts["stop"], tree.step)
    if isinstance(tree, dict):
        return {**tree, step: put(tree.get(step), rest, value)}
    if isinstance(tree, tuple | list):
        items = [put(item, rest, value) if k == step else item for k, item in enumerate(tree)]
        return items if isinstance(tree, list) else tuple(items)
    raise VerificationError(f"a size patch points at {path!r} inside {type(tree).__name__}; compact the model again.")


def call_with(func: Any, args: Any, kwargs: Any, changes: Any) -> Any:
    """Call ``func`` with the changed arguments."""
    if changes and changes[0][0] == ("sizes",):
        dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
        return torch.split(args[0], list(changes[0][1]), dim)
    both: Any = (tuple(args), dict(kwargs))
    for path, value in changes:
        if isinstance(value, list | tuple) and value and value[0] == RATIO:
            value = fetch(both[0], both[1], tuple(path)) * value[1] // value[2]
        both = put(both, tuple(path), value)
    return func(*both[0], **both[1])


class _Sizes(TorchFunctionMode):
    """Counts the size-taking calls of one forward, by name, and replaces arguments of the patched ones."""

    def __init__(self, patches: dict[tuple[str, int], Patch]) -> None:
        super().__init__()
        self.patches = patches
        self.names = {name for name, _ in patches}
        self.seen = dict.fromkeys(self.names, 0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = counted_as(getattr(func, "__name__", ""))
        if name not in self.names:
            return func(*args, **kwargs)
        patch = self.patches.get((name, self.seen[name]))
        self.seen[name] += 1
        if patch is None:
            return func(*args, **kwargs)
        return call_with(func, args, kwargs, patch.changes)


class SizedForward:
    """The forward of a patched module (a plain attribute: deepcopy and state_dict see nothing new)."""

    def __init__(self, module: nn.Module, patches: tuple[Patch, ...], where: str) -> None:
        self.module = module
        self.patches = patches
        self.where = where

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the class's forward with the sizes replaced."""
        with _Sizes({(p.name, p.index): p for p in self.patches}):
            return type(self.module).forward(self.module, *args, **kwargs)


def install(model: nn.Module, patches: tuple[Patch, ...]) -> None:
    """Give every patched module of ``model`` its ``SizedForward``; it takes the place of an earlier one."""
    by_module: dict[str, list[Patch]] = {}
    for patch in patches:
        by_module.setdefault(patch.module, []).append(patch)
    for path, own in by_module.items():
        module = model.get_submodule(path)
        module.__dict__["forward"] = SizedForward(module, tuple(own), path or type(module).__name__)


def installed(model: nn.Module) -> tuple[Patch, ...]:
    """All size patches of a model."""
    forwards = [vars(module).get("forward") for module in model.modules()]
    return tuple(patch for forward in forwards if isinstance(forward, SizedForward) for patch in forward.patches)
