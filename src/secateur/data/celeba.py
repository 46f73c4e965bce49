"""CelebA: faces with 40 attributes, one of which is the class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from secateur.data import parquet
from secateur.data.dataset import Source
from secateur.data.fetch import folder_of
from secateur.data.files import images_of
from secateur.types import DataError

ATTRIBUTE = "Smiling"  # the most balanced one: 48 % of the faces
IMAGES, ATTRIBUTES, PARTS = "img_align_celeba", "list_attr_celeba.txt", "list_eval_partition.txt"
TEST = 2  # number of the test part in the official partition; 0 and 1 are training and validation


def celeba(root: str | None = None, download: bool = False, size: int | None = None) -> Source:
    """CelebA: 202,599 colour 178x218 faces (Liu, Luo, Wang, Tang 2015), classes: not smiling, smiling."""
    return celeba_attribute(ATTRIBUTE, root, download, size)


def celeba_attribute(
    attribute: str, root: str | None = None, download: bool = False, size: int | None = None
) -> Source:
    """CelebA with another attribute as its two classes: ``celeba:Male``.

    Read from ``train.parquet`` and ``test.parquet`` (the label is a column named like the attribute, or
    ``label``), or from torchvision's layout: ``celeba/img_align_celeba``, ``list_attr_celeba.txt`` and
    ``list_eval_partition.txt``.  The official training and validation parts are the training part.

    Raises ``DataError`` when files are missing or damaged, or when there is no such attribute.
    """
    home = folder_of("celeba", root, download)
    packed = parquet.find("celeba", str(home))
    if packed is not None:
        found = parquet.read("celeba", packed, "RGB", size, (attribute, "label"))
        return Source("celeba", found.images, found.labels, _classes(attribute), found.test_from)
    folder = next((f for f in (home / "celeba", home) if (f / ATTRIBUTES).is_file()), None)
    if folder is None and download:
        _download(home)
        folder = home / "celeba"
    if folder is None:
        raise DataError(
            f"{home} holds neither celeba/train.parquet nor celeba/{ATTRIBUTES}; correct data.root, "
            "or set data.download=true."
        )
    names, labels = _labels(folder / ATTRIBUTES, attribute)
    parts = _partition(folder / PARTS, names)
    order = np.argsort(parts == TEST, kind="stable")
    paths = [str(folder / IMAGES / names[i]) for i in order]
    images = images_of("celeba", folder, paths, "RGB", size)
    return Source("celeba", images, torch.from_numpy(labels[order]), _classes(attribute), int((parts != TEST).sum()))


def _classes(attribute: str) -> tuple[str, str]:
    return f"not {attribute}", attribute


def _labels(path: Path, attribute: str) -> tuple[list[str], np.ndarray]:
    """Return file names and 0 or 1 per image from the list of attributes: a count, a header, then the rows."""
    lines = _lines(path)
    header = lines[1] if len(lines) > 1 else []
    if attribute not in header:
        raise DataError(f"{path} has no attribute {attribute!r}; it has {', '.join(header) or 'no header'}.")
    rows, column = lines[2:], header.index(attribute) + 1
    whole = lines[0] == [str(len(rows))] and all(len(row) == len(header) + 1 for row in rows)
    if not whole or not {row[column] for row in rows} <= {"1", "-1"}:
        raise DataError(
            f"{path} is truncated or damaged: line 1 counts the rows, each has a name and 1 or -1; fetch it again."
        )
    return [row[0] for row in rows], np.array([row[column] == "1" for row in rows], dtype=np.int64)


def _partition(path: Path, names: list[str]) -> np.ndarray:
    """Return the part (0, 1 or 2) of each image in ``names``."""
    part = {row[0]: row[1] for row in _lines(path) if len(row) == 2}
    missing = [name for name in names if part.get(name) not in ("0", "1", "2")]
    if missing:
        raise DataError(f"{path} is truncated or damaged: no part 0, 1 or 2 for {missing[0]}; fetch it again.")
    return np.array([int(part[name]) for name in names])


def _lines(path: Path) -> list[list[str]]:
    try:
        return [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); fetch it again.") from error


def _download(root: Path) -> None:
    """Let torchvision fetch the files, which it compares with their published MD5 sums."""
    try:
        from torchvision import datasets
    except ImportError as error:
        raise DataError("downloading CelebA needs torchvision: install secateur[vision].") from error
    try:
        datasets.CelebA(str(root), split="all", download=True)
    except Exception as error:  # RuntimeError, OSError, URLError, a quota of the server, ...
        raise DataError(
            f"CelebA could not be downloaded into {root} ({error}); put its files there yourself."
        ) from error
