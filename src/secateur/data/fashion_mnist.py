"""Fashion-MNIST."""

from __future__ import annotations

from secateur.data.dataset import Source
from secateur.data.fetch import packed_or_torchvision


def fashion_mnist(root: str | None = None, download: bool = False, size: int | None = None) -> Source:
    """Fashion-MNIST: 70,000 grey 28x28 images of clothes, 10 classes (Xiao, Rasul, Vollgraf 2017; MIT)."""
    return packed_or_torchvision("fashion_mnist", "FashionMNIST", "L", root, download, size)
