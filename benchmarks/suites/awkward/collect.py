"""How the awkward networks are listed: one decorator, and the usual inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.suites.case import Case, Inputs

CASES: list[Case] = []


def image(channels: int = 3, size: int = 8) -> Inputs:
    """Return a maker of images (batch, channels, size, size)."""
    return lambda batch: torch.randn(batch, channels, size, size)


def sequence(length: int = 6, width: int = 16) -> Inputs:
    """Return a maker of sequences (batch, length, width)."""
    return lambda batch: torch.randn(batch, length, width)


def signal(channels: int = 3, length: int = 16) -> Inputs:
    """Return a maker of signals (batch, channels, length)."""
    return lambda batch: torch.randn(batch, channels, length)


def vector(width: int = 16) -> Inputs:
    """Return a maker of vectors (batch, width)."""
    return lambda batch: torch.randn(batch, width)


def tokens(length: int = 6, vocabulary: int = 20) -> Inputs:
    """Return a maker of integer tokens (batch, length)."""
    return lambda batch: torch.randint(0, vocabulary, (batch, length))


def awkward(inputs: Inputs, cut: bool | None = True, **options: Any) -> Callable[[Any], Any]:
    """List the decorated class or function (no arguments -> model) as an awkward network."""

    def add(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        theme = make.__module__.rsplit(".", 1)[-1]
        CASES.append(Case("awkward", make.__name__, make, inputs, tags=(theme,), cut_expected=cut, **options))
        return make

    return add
