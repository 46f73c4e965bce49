"""Run-time pruning: networks that decide per input what to compute, and the engine that skips the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.runtime.compiled import Compiled, compile

__all__ = ["Compiled", "compile"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # loaded on first use: who reads a checkpoint needs none of it
        from secateur.runtime import compiled

        return getattr(compiled, name)
    raise AttributeError(f"secateur.runtime has no {name!r}; it has {', '.join(__all__)}.")
