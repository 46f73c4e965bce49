"""MNIST."""

from __future__ import annotations

from secateur.data.dataset import Source
from secateur.data.fetch import packed_or_torchvision


def mnist(root: str | None = None, download: bool = False, size: int | None = None) -> Source:
    """MNIST: 70,000 grey 28x28 handwritten digits, 10 classes (LeCun, Cortes, Burges 1998)."""
    return packed_or_torchvision("mnist", "MNIST", "L", root, download, size)
