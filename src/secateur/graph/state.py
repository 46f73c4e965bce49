"""Run a model without leaving a trace on it: modes, buffers, caches and backends come back as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Run with every module in eval mode; each module's own mode comes back afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def state_kept(model: nn.Module, filled: list[tuple[str, str]] | None = None) -> Iterator[None]:
    """Give buffers and plain dicts (caches) back what they held; ``filled`` collects the dicts that a run filled."""
    buffers = [(m, n, b, b.detach().clone()) for m in model.modules() for n, b in m._buffers.items() if b is not None]
    dicts = {(path, name): dict(x) for path, m in model.named_modules() for name, x in plain_dicts(m)}
    try:
        yield
    finally:
        for module, name, tensor, value in buffers:
            if tensor.shape == value.shape and not torch.equal(tensor, value):
                tensor.data.copy_(value)
            now = module._buffers.get(name)
            if now is not None and now is not tensor and now.shape == tensor.shape:
                module._buffers[name] = tensor
        for (path, name), before in dicts.items():
            held = getattr(model.get_submodule(path), name, None)
            if isinstance(held, dict) and held.keys() != before.keys():
                if filled is not None:
                    filled.append((path, name))
                held.clear()
                held.update(before)


@contextlib.contextmanager
def quiet_backends() -> Iterator[None]:
    """Attention in its maths form, the fused encoder fast path off."""
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def caches_empty(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """Without the plain dicts of tensors that earlier runs filled: those that a run fills again when empty."""
    held = [
        (x, dict(x))
        for module in model.modules()
        for _, x in plain_dicts(module)
        if any(isinstance(v, torch.Tensor) for v in pytree.tree_leaves(x))
    ]
    if not held:
        yield
        return
    state = torch.random.get_rng_state()
    try:
        for now, _ in held:
            now.clear()
        with eval_mode(model), torch.no_grad():
            model(*args, **kwargs)
        again = all(now.keys() == before.keys() for now, before in held)
    except Exception:  # a table that the forward only reads
        again = False
    torch.random.set_rng_state(state)
    try:
        for now, before in held:
            now.clear()
            if not again:
                now.update(before)
        yield
    finally:
        for now, before in held:
            now.clear()
            now.update(before)


def plain_dicts(module: nn.Module) -> list[tuple[str, dict[Any, Any]]]:
    """Dicts that a module's own code put on it (caches by device, say)."""
    return [(n, x) for n, x in vars(module).items() if type(x) is dict and n not in _MODULE_DICTS]


_MODULE_DICTS = frozenset(vars(nn.Module()))
