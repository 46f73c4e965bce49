"""CIFAR-10."""

from __future__ import annotations

from secateur.data.dataset import Source
from secateur.data.fetch import packed_or_torchvision


def cifar10(root: str | None = None, download: bool = False, size: int | None = None) -> Source:
    """CIFAR-10: 60,000 colour 32x32 images, 10 classes (Krizhevsky 2009)."""
    return packed_or_torchvision("cifar10", "CIFAR10", "RGB", root, download, size)
