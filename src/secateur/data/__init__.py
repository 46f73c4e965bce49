"""Datasets: one file per source; the import list below is the registry."""

from __future__ import annotations

from collections.abc import Callable

from secateur.data.cifar10 import cifar10
from secateur.data.dataset import Dataset, Source, split
from secateur.data.digits import digits
from secateur.data.fashion_mnist import fashion_mnist
from secateur.data.mnist import mnist

SOURCES: dict[str, Callable[..., Source]] = {f.__name__: f for f in (cifar10, digits, fashion_mnist, mnist)}

__all__ = ["SOURCES", "Dataset", "Source", "split"]
