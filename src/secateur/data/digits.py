"""The embedded dataset: 1,797 handwritten digits of 8x8 pixels (attribution in ``digits.txt``)."""

from __future__ import annotations

import gzip
import zlib
from importlib import resources

import numpy as np
import torch

from secateur.data.dataset import Source, resized
from secateur.types import DataError

IMAGES = 1797


def digits(root: str | None = None, download: bool = False, size: int | None = None) -> Source:
    """UCI optical recognition of handwritten digits: 1,797 grey 8x8 images, 10 classes, no download.

    E. Alpaydin, C. Kaynak (1998), UCI Machine Learning Repository, CC BY 4.0.  Pixels are 0..16.

    >>> tuple(digits().images.shape)
    (1797, 1, 8, 8)
    """
    packed = resources.files("secateur.data").joinpath("digits.gz")
    try:
        raw = np.frombuffer(gzip.decompress(packed.read_bytes()), dtype=np.uint8).copy()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"the embedded digits cannot be read ({error}); reinstall secateur.") from error
    if raw.size != IMAGES * 65:
        raise DataError(f"{packed} unpacks to {raw.size} bytes, not {IMAGES * 65}; reinstall secateur.")
    images = torch.from_numpy(raw[: IMAGES * 64]).view(IMAGES, 1, 8, 8)
    labels = torch.from_numpy(raw[IMAGES * 64 :]).long()
    return resized(Source("digits", images, labels, tuple("0123456789"), white=16.0), size)
