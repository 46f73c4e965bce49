"""CIFAR-100."""

from __future__ import annotations

from secateur.data.dataset import Source
from secateur.data.fetch import packed_or_torchvision


def cifar100(root: str | None = None, download: bool = False, size: int | None = None) -> Source:
    """CIFAR-100: 60,000 colour 32x32 images, 100 classes, its fine labels (Krizhevsky 2009)."""
    return packed_or_torchvision("cifar100", "CIFAR100", "RGB", root, download, size)
