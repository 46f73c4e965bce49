"""Packed image folders: ``train.parquet`` and ``test.parquet`` with encoded images and integer labels."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from secateur.data.dataset import Source
from secateur.types import DataError

BROKEN_IMAGE = (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError)


def find(name: str, root: str) -> Path | None:
    """Return ``root/name`` or ``root``, whichever holds ``train.parquet`` or ``test.parquet``, or None."""
    for folder in (Path(root) / name, Path(root)):
        if (folder / "train.parquet").exists() or (folder / "test.parquet").exists():
            return folder
    return None


def read(name: str, folder: Path, mode: str) -> Source:
    """Read a packed folder; ``mode`` is the Pillow mode of the images (``L`` grey, ``RGB``).

    Columns: ``image`` = struct<bytes, path> (PNG or JPEG) and ``label`` = integer; class names are in the
    ``huggingface`` key of the schema metadata.  Every image is decoded once, into one uint8 array.

    Raises ``DataError`` when a file is missing, truncated, without the columns, or holds a broken image.
    """
    train, labels, classes = _read_file(folder / "train.parquet", mode)
    test, test_labels, _ = _read_file(folder / "test.parquet", mode)
    if train.shape[1:] != test.shape[1:]:
        sizes = f"training images are {train.shape[1:]}, test images {test.shape[1:]}"
        raise DataError(f"{folder}: {sizes}; sizes must agree.")
    names = classes or tuple(str(i) for i in range(int(max(labels.max(), test_labels.max())) + 1))
    return Source(
        name,
        torch.from_numpy(np.concatenate([train, test])),
        torch.from_numpy(np.concatenate([labels, test_labels])),
        names,
        test_from=len(train),
    )


def _read_file(path: Path, mode: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Return uint8 images (n, channels, height, width), int64 labels and class names of one file."""
    table = _table(path)
    try:
        encoded = table["image"].combine_chunks().field("bytes").to_pylist()
        labels = np.asarray(table["label"].to_numpy()).astype(np.int64, casting="safe")
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} needs a column 'image' (struct with 'bytes') and an integer column 'label'; "
            f"found {', '.join(table.column_names) or 'none'} ({error})."
        ) from error
    return _decode(path, encoded, mode), labels, _class_names(table.schema.metadata)


def _table(path: Path) -> Any:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(f"{path} needs pyarrow: install secateur[data].") from error
    if not path.is_file():
        raise DataError(f"{path} is missing; the folder must hold train.parquet and test.parquet.")
    try:
        return parquet.read_table(path)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is truncated or no parquet file ({error}); fetch it again.") from error


def _decode(path: Path, encoded: list[Any], mode: str) -> np.ndarray:
    images: np.ndarray | None = None
    for row, data in enumerate(encoded):
        try:
            with Image.open(io.BytesIO(data)) as image:
                pixels = np.asarray(image.convert(mode))
        except BROKEN_IMAGE as error:
            raise DataError(f"{path}, row {row}: the image cannot be decoded ({error}).") from error
        if images is None:
            images = np.empty((len(encoded), *pixels.shape), dtype=np.uint8)
        if pixels.shape != images.shape[1:]:
            sizes = f"image of {pixels.shape}, the first is {images.shape[1:]}"
            raise DataError(f"{path}, row {row}: {sizes}; sizes must agree.")
        images[row] = pixels
    if images is None:
        raise DataError(f"{path} holds no images.")
    return images[:, None] if images.ndim == 3 else np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def _class_names(metadata: dict[bytes, bytes] | None) -> tuple[str, ...]:
    """Return the class names of a schema's ``huggingface`` metadata, or () when it holds none."""
    try:
        info = json.loads((metadata or {})[b"huggingface"])
        return tuple(map(str, info["info"]["features"]["label"]["names"]))
    except (KeyError, TypeError, ValueError):
        return ()
