"""A named dataset from a packed folder, or through torchvision when the user asks for a download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from secateur.data import parquet
from secateur.data.dataset import Source, resized
from secateur.types import DataError


def folder_of(name: str, root: str | None, download: bool = False) -> Path:
    """Return ``root`` as a path; raises ``DataError`` when it is not given or, without ``download``, not there."""
    if root is None:
        raise DataError(f"dataset {name!r} needs data.root, the folder that holds it or will hold it.")
    if not Path(root).is_dir() and not download:
        raise DataError(f"data.root {root!r} is not a folder; correct it, or set data.download=true.")
    return Path(root)


def packed_or_torchvision(name: str, cls: str, mode: str, root: str | None, download: bool, size: int | None) -> Source:
    """Return dataset ``name`` from parquet files under ``root``, else from ``torchvision.datasets.<cls>``.

    torchvision compares its files with their published MD5 sums, also after a download.
    Raises ``DataError`` when the folder is missing, or holds neither form and ``download`` is off.
    """
    home = folder_of(name, root, download)
    packed = parquet.find(name, str(home))
    if packed is not None:
        return parquet.read(name, packed, mode, size)
    images, labels, classes, test_from = _torchvision(name, cls, home, download)
    images = images[:, None] if mode == "L" else images.transpose(0, 3, 1, 2)
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    return resized(Source(name, pixels, torch.from_numpy(labels), classes, test_from), size)


def _torchvision(
    name: str, cls: str, root: Path, download: bool
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], int]:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise DataError(
            f"{root} holds no {name}/train.parquet; reading torchvision's files needs secateur[vision]."
        ) from error
    try:
        parts = [getattr(datasets, cls)(root, train=train, download=download) for train in (True, False)]
    except Exception as error:  # RuntimeError, OSError, URLError, EOFError, unpickling errors, ...
        raise DataError(
            f"{root} holds neither {name}/train.parquet nor whole torchvision files of {cls} ({error}); "
            "correct data.root, or set data.download=true."
        ) from error
    images = np.concatenate([np.asarray(part.data) for part in parts])
    labels = np.concatenate([np.asarray(part.targets) for part in parts]).astype(np.int64)
    return images, labels, tuple(map(str, parts[0].classes)), len(parts[0])
