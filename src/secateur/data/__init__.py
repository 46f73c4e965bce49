"""Datasets: one file per source; the import list below is the registry."""

from __future__ import annotations

from collections.abc import Callable

from secateur.data.celeba import celeba, celeba_attribute
from secateur.data.cifar10 import cifar10
from secateur.data.cifar100 import cifar100
from secateur.data.dataset import Dataset, Source, split
from secateur.data.digits import digits
from secateur.data.fashion_mnist import fashion_mnist
from secateur.data.huggingface import huggingface
from secateur.data.imagefolder import imagefolder
from secateur.data.mnist import mnist
from secateur.types import DataError

SOURCES: dict[str, Callable[..., Source]] = {
    f.__name__: f for f in (celeba, cifar10, cifar100, digits, fashion_mnist, imagefolder, mnist)
}
FORMS: dict[str, Callable[..., Source]] = {"celeba": celeba_attribute, "hf": huggingface}  # PREFIX:WHAT
SPELLED = ("hf:NAME_OR_FOLDER", "celeba:ATTRIBUTE")

__all__ = ["FORMS", "SOURCES", "SPELLED", "Dataset", "Source", "known", "open_source", "split"]


def known(name: str) -> bool:
    """Return whether ``name`` is a registered source or has the form of one.

    >>> known("digits"), known("hf:ylecun/mnist"), known("hf:"), known("digit")
    (True, True, False, False)
    """
    prefix, _, rest = name.partition(":")
    return name in SOURCES or (prefix in FORMS and bool(rest))


def open_source(name: str, root: str | None = None, download: bool = False, image_size: int | None = None) -> Source:
    """Return the images of the source ``name``, scaled to ``image_size`` (None: as they are).

    >>> open_source("digits", image_size=4).images.shape
    torch.Size([1797, 1, 4, 4])
    """
    if not known(name):
        raise DataError(f"there is no dataset {name!r}; there are {', '.join((*SOURCES, *SPELLED))}.")
    if name in SOURCES:
        return SOURCES[name](root, download, image_size)
    prefix, _, rest = name.partition(":")
    return FORMS[prefix](rest, root, download, image_size)
